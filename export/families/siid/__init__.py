"""The graphs of SIID."""
