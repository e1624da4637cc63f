"""HDiT: the Hourglass Diffusion Transformer of k-diffusion."""
