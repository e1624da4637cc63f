"""A bundle opened: engines by graph, diffusion, tiles."""
