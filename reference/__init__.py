"""The PyTorch side: models, training, evaluation, checkpoints."""
