"""Fourier features of positions and of alpha_bar.

Shapes: N tokens, F frequencies. Always float32: at the top frequency a coordinate reaches
hundreds of radians, which lower precisions cannot resolve.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT_OF_ONE = 34 * 2.0**-24  # what the float32 nearest to 1 - 2e-6 lacks of 1


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


class GridFeatures(nn.Module):
    """Coordinates `[B, h, w, 4]` of a whole grid -> features `[B, h, w, 8F]` float32.

    The sines and cosines of a system are normalised over its 4F channels and all positions
    together, then scaled and shifted per channel, alike in both systems: a position's features
    depend on the grid that it is part of.
    """

    frequencies: Tensor

    def __init__(self, high: int, low: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies(high, low), persistent=False)
        self.norm = nn.GroupNorm(1, 4 * (high + low))

    def forward(self, coordinates: Tensor) -> Tensor:
        with torch.autocast(coordinates.device.type, enabled=False):
            angles = coordinates.float().unsqueeze(-1) * self.frequencies.float()  # [B, h, w, 4, F]
            systems = []
            for part in angles.split(2, -2):
                waves = torch.cat([part.sin(), part.cos()], -2).flatten(-2).movedim(-1, 1)
                # PyTorch 2.13 crashes in GroupNorm's backward on a CPU where an input laid out
                # channels last needs no gradient.
                systems.append(self.norm(waves.contiguous()))
            return torch.cat(systems, 1).movedim(1, -1)


class TimeFeatures(nn.Module):
    """alpha_bar `[...]` in [0, 1] -> features `[..., 2F]` float32, normalised over 2F.

    `affine`: with a learnt scale and shift per channel. `short`: what the factor of alpha_bar lacks
    of 1, 2e-6 as it is specified or as float32 has it.
    """

    frequencies: Tensor

    def __init__(self, high: int, low: int, affine: bool = False, short: float = SHORT_OF_ONE):
        super().__init__()
        self.short = short
        self.register_buffer("frequencies", frequencies(high, low), persistent=False)
        self.norm = nn.LayerNorm(2 * (high + low), elementwise_affine=affine)

    def forward(self, alpha_bar: Tensor) -> Tensor:
        with torch.autocast(alpha_bar.device.type, enabled=False):
            # alpha_bar · (1 - 2e-6) written as a difference: torch.onnx's optimiser takes a
            # product with a number so near 1 for one with 1, and drops it.
            centred = alpha_bar.float() - alpha_bar.float() * self.short - (0.5 - 1e-6)
            angles = centred.unsqueeze(-1) * self.frequencies.float()
            return self.norm(torch.cat([angles.sin(), angles.cos()], -1))
