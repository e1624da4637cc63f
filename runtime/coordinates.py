"""Pixel coordinates: where a pixel is in the composition, and how far from the edges.

A grid has h rows and w columns. Two systems, each an (x, y) pair:

- square: the longer side spans ±0.5, the shorter one ±0.5 · short/long, centred;
- edge: each side spans ±0.5.
"""

import numpy as np
from numpy.typing import NDArray

# Both ends of the published linspace stay this far inside the span.
MARGIN = 1e-6


def axis(count: int, half_span: float) -> NDArray[np.float64]:
    """`count` points from -half_span + 1e-6 to half_span - 1e-6; a single point is the first."""
    return np.linspace(-half_span + MARGIN, half_span - MARGIN, count, dtype=np.float64)


class Grid:
    """The coordinates of a height × width grid, of which a part is made when it is asked for.

    A pixel's coordinates are its row's and its column's, so a tile of a grid of any size holds
    exactly what the whole grid would hold there. Computed in float64 and rounded once. Source: the
    specification's "Coordinates".
    """

    def __init__(self, height: int, width: int):
        longer = max(height, width)
        self.rows = _both(height, 0.5 * height / longer)  # [height, 2] float32: square y, edge y
        self.columns = _both(width, 0.5 * width / longer)  # [width, 2] float32: square x, edge x

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Coordinates of single pixels: two arrays of one shape -> `[*shape, 4]` float32."""
        y, x = self.rows[rows], self.columns[columns]
        return np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)

    def window(self, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """Coordinates of a rectangle of pixels, `[height, width, 4]` float32 in [-0.5, 0.5]."""
        out = np.empty((height, width, 4), np.float32)
        out[..., 0::2] = self.columns[left : left + width]
        out[..., 1::2] = self.rows[top : top + height, None]
        return out


def grid(height: int, width: int) -> NDArray[np.float32]:
    """Coordinates of a whole height × width grid.

    Returns `[height, width, 4]` float32 in [-0.5, 0.5]: square x, square y, edge x, edge y.
    """
    return Grid(height, width).window(0, 0, height, width)


def _both(count: int, half_span: float) -> NDArray[np.float32]:
    return np.stack([axis(count, half_span), axis(count, 0.5)], -1).astype(np.float32)
