"""R2IR and R2ID: a resampler and the model that diffuses in its latents."""
