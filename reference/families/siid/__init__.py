"""SIID: axial transformers over folded pixels, the first of the line."""
