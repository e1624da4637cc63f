"""The graphs of SiD2."""
