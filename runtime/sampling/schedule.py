"""The cosine noise schedule: x_t = sqrt(alpha_bar) · x0 + sqrt(1 - alpha_bar) · eps.

Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", eq. 17,
with t running from 0 (clean) to 1 (noise).
"""

import numpy as np
from numpy.typing import NDArray

OFFSET = 0.008
# Below this alpha_bar the division by sqrt(alpha_bar) in DDIM is not to be trusted.
FLOOR = 1e-6


def alpha_bar(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """alpha_bar(t) = cos²((t + 0.008) / 1.008 · π/2) for t in [0, 1]; same shape, float64."""
    return np.cos((np.asarray(t, np.float64) + OFFSET) / (1 + OFFSET) * np.pi / 2) ** 2


def timesteps(steps: int) -> NDArray[np.float64]:
    """The `steps` + 1 times from 1 down to 0 that bound `steps` intervals."""
    return np.linspace(1.0, 0.0, steps + 1)


def sampling_alpha_bar(steps: int) -> NDArray[np.float64]:
    """alpha_bar at `timesteps(steps)`, not below 1e-6: `[steps + 1]` float64, increasing."""
    return np.maximum(alpha_bar(timesteps(steps)), FLOOR)
