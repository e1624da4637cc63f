"""The graphs of S2ID."""
