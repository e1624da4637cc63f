"""The graphs of R2IR and R2ID."""
