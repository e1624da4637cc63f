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


def grid(height: int, width: int) -> NDArray[np.float32]:
    """Coordinates of a height × width grid.

    Returns `[height, width, 4]` float32 in [-0.5, 0.5]: square x, square y, edge x, edge y.
    Computed in float64 and rounded once. Source: the specification's "Coordinates".
    """
    longer = max(height, width)
    out = np.empty((height, width, 4), np.float64)
    out[..., 0] = axis(width, 0.5 * width / longer)
    out[..., 1] = axis(height, 0.5 * height / longer)[:, None]
    out[..., 2] = axis(width, 0.5)
    out[..., 3] = axis(height, 0.5)[:, None]
    return out.astype(np.float32)
