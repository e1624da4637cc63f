"""Model families: one folder each, and the parts that several share."""
