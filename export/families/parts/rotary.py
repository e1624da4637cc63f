"""Rotary angles as a graph computes them, of the size alone."""

import torch
from torch import Tensor


def grid_angles(height: int, width: int, frequencies: Tensor) -> Tensor:
    """`[h, w, .., 2F]` float32 of frequencies `[.., F]`: y · f, then x · f.

    As `reference.families.parts.rotary.grid_angles`, without numbers that a trace would keep.
    """
    y, x = (torch.arange(side, dtype=torch.float32) for side in (height, width))
    # The greatest, not the last: a slice of the end fixes the size.
    longer = torch.maximum(y.amax(0, True), x.amax(0, True)) + 1
    inner = (1,) * frequencies.dim()
    by_row, by_column = (
        ((p * 2 - p.amax(0, True)) / longer).reshape(-1, *inner) * frequencies for p in (y, x)
    )
    rows = by_row.unsqueeze(1) + torch.zeros_like(by_column)
    return torch.cat([rows, by_column + torch.zeros_like(by_row).unsqueeze(1)], -1)
