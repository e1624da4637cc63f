"""Rotary positions of a grid of tokens.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", eq. 34, with angles of
places in the picture instead of indices, so that no size leaves the trained range.
"""

import torch
from torch import Tensor


def cell_centres(height: int, width: int) -> tuple[Tensor, Tensor]:
    """y `[h]` and x `[w]` of a grid's cells, the longer side in [-1, 1], the aspect kept; float64.

    y_r = (2r + 1 - h) / max(h, w), x likewise.
    """
    longer = max(height, width)
    y, x = (torch.arange(n, dtype=torch.float64) * 2 + 1 - n for n in (height, width))
    return y / longer, x / longer


def grid_angles(height: int, width: int, frequencies: Tensor) -> Tensor:
    """Angles `[h, w, ..., 2F]` float32 of `frequencies [..., F]` float64: y · f, then x · f."""
    inner = frequencies.shape
    y, x = (p.view(-1, *(1 for _ in inner)) * frequencies for p in cell_centres(height, width))
    size = (height, width, *inner)
    return torch.cat([y[:, None].expand(size), x[None].expand(size)], -1).float()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i with i + e/2 of `[..., e]` by angles `[..., e/2]`, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
