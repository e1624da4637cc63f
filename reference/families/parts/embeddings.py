"""Fourier features of positions and of alpha_bar.

Shapes: N tokens, F frequencies. Always float32: at the top frequency a coordinate reaches
hundreds of radians, which lower precisions cannot resolve.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frequencies(high: int, low: int) -> Tensor:
    """f_i = π · 2^(i - low), i = 0 … high + low - 1; `[high + low]` float32."""
    return torch.tensor([math.pi * 2.0 ** (i - low) for i in range(high + low)])


def axes_features(xy: Tensor, f: Tensor) -> Tensor:
    """One system's features: `[..., 2]` -> `[..., 4F]`.

    sin(x·f), sin(y·f), cos(x·f), cos(y·f), then LayerNorm over the 4F without affine.
    """
    angles = xy.unsqueeze(-1) * f  # [..., 2, F]
    features = torch.cat([angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)
    return F.layer_norm(features, features.shape[-1:])


class PositionFeatures(nn.Module):
    """Coordinates `[..., 4]` (square x, y; edge x, y) -> features `[..., 8F]` float32."""

    frequencies: Tensor

    def __init__(self, high: int, low: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies(high, low), persistent=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        with torch.autocast(coordinates.device.type, enabled=False):
            square, edge = coordinates.float().split(2, -1)
            f = self.frequencies.float()
            return torch.cat([axes_features(square, f), axes_features(edge, f)], -1)


class TimeFeatures(nn.Module):
    """alpha_bar `[...]` in [0, 1] -> features `[..., 2F]` float32, normalised over 2F."""

    frequencies: Tensor

    def __init__(self, high: int, low: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies(high, low), persistent=False)

    def forward(self, alpha_bar: Tensor) -> Tensor:
        with torch.autocast(alpha_bar.device.type, enabled=False):
            # alpha_bar · (1 - 2e-6) written as a difference: torch.onnx's optimiser takes a
            # product with a number so near 1 for one with 1, and drops it.
            centred = alpha_bar.float() - alpha_bar.float() * 2e-6 - (0.5 - 1e-6)
            angles = centred.unsqueeze(-1) * self.frequencies.float()
            features = torch.cat([angles.sin(), angles.cos()], -1)
            return F.layer_norm(features, features.shape[-1:])
