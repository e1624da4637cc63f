"""SiD2: Simpler Diffusion, a residual U-ViT in pixels."""
