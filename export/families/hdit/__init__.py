"""The graphs of HDiT."""
