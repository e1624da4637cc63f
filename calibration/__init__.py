"""Lower precision of a bundle's graphs: rewritten as ONNX, checked, measured; no PyTorch."""
