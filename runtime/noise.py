"""Noise: every image has a stream of its own, derived from (seed, index).

An image's noise therefore does not depend on how many images are drawn with it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LARGEST_SEED = (1 << 63) - 1


class NoiseStreams:
    """Standard normal noise for several images, float32."""

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]):
        """`seed` and `indices` in 0 … 2^63 - 1; `shape` of one image's latent, `[C, H, W]`."""
        self.shape = shape
        self.generators = [
            np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
            for index in indices
        ]

    def draw(self) -> NDArray[np.float32]:
        """The next noise of every stream: `[B, C, H, W]`."""
        return np.stack([g.standard_normal(self.shape, np.float32) for g in self.generators])
