"""The shifted cosine schedule of the log SNR λ: larger pictures get more noise.

Hoogeboom et al., "Simpler Diffusion", arXiv 2410.19324, and the predecessor's eq. 5, arXiv
2301.11093: at t = 1 as noisy as pictures of side `noise_low` are, at t = 0 as `noise_high`.
x_t = √sigmoid(λ) · x0 + √sigmoid(-λ) · eps. All in float64.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reference.families.sid2.config import ScheduleConfig

FLOOR = 1e-6  # of alpha_bar: below it x0 = (z - σ·eps)/α is not to be trusted


@dataclass(frozen=True)
class Schedule:
    """λ over t in [0, 1] (0 clean, 1 noise) for images of `height` × `width` pixels."""

    config: ScheduleConfig
    height: int
    width: int

    def _angles(self) -> tuple[float, float]:
        c = self.config
        return math.atan(math.exp(-c.logsnr_max / 2)), math.atan(math.exp(-c.logsnr_min / 2))

    def logsnr(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """λ(t): the cosine schedule, shifted by 2·ln(noise / d), d = √(height · width)."""
        low, high = self._angles()
        d = math.sqrt(self.height * self.width)
        clean = 2 * math.log(self.config.noise_high / d)
        noisy = 2 * math.log(self.config.noise_low / d)
        t = np.asarray(t, np.float64)
        return -2 * np.log(np.tan(low + t * (high - low))) + (1 - t) * clean + t * noisy

    def slope(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """dλ/dt, negative throughout."""
        low, high = self._angles()
        angle = low + np.asarray(t, np.float64) * (high - low)
        shift = 2 * math.log(self.config.noise_low / self.config.noise_high)
        return -4 * (high - low) / np.sin(2 * angle) + shift

    def sampling_alpha_bar(self, steps: int) -> NDArray[np.float64]:
        """alpha_bar = sigmoid(λ) at t = 1 … 0, not below 1e-6: `[steps + 1]`, increasing."""
        return np.maximum(sigmoid(self.logsnr(np.linspace(1.0, 0.0, steps + 1))), FLOOR)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logsnr(alpha_bar: NDArray[np.float64]) -> NDArray[np.float64]:
    """λ = ln ᾱ - ln(1 - ᾱ); needs float64, float32 loses 0.1 at λ = 15."""
    return np.log(alpha_bar) - np.log1p(-np.asarray(alpha_bar, np.float64))
