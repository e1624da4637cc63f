"""Lower precision of a bundle's graphs, measured. This version has fp32 graphs only."""
