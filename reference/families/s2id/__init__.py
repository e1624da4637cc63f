"""S2ID: axial transformers in which every pixel is a token."""
