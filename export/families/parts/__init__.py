"""What the graphs of several families share."""
