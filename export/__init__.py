"""From a checkpoint to a bundle: ONNX graphs with dynamic height and width, checked."""
