"""Noise schedules: x_t = sqrt(alpha_bar) · x0 + sqrt(1 - alpha_bar) · eps, t from 0 to 1 (noise).

The log-SNR is ln(alpha_bar / (1 - alpha_bar)), which falls as t rises. A schedule is data in a
manifest, named after its formula; `read` makes it an object for one size, which gives both for any
t, and t back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from runtime.bundle.interface import (
    CosineData,
    KarrasData,
    ScheduleData,
    ShiftedCosineData,
    Size,
)

Floats = NDArray[np.float64]
HALVINGS = 60  # of t's interval, until float64 tells no more apart


class Schedule(Protocol):
    """A falling function of t; arrays in, arrays of the same shape out, float64."""

    @property
    def spacing(self) -> str | None:
        """The spacing of a solver's nodes that suits it, None where any does."""
        ...

    @property
    def shift(self) -> float:
        """How much log-SNR / 2 is moved by the size of what is diffused; 0 where it is not."""
        ...

    def alpha_bar(self, t: Floats) -> Floats:
        """The signal's share of the variance at t in [0, 1]."""
        ...

    def time(self, log_snr: Floats) -> Floats:
        """t in [0, 1] at which the log-SNR is `log_snr`, the nearest where it never is."""
        ...


class Cosine(CosineData, frozen=True):
    """alpha_bar(t) = cos²((t + offset) / (1 + offset) · π/2), and not below `floor`.

    Below `floor` an x0 that is divided by sqrt(alpha_bar) is not to be trusted. Source: Nichol and
    Dhariwal, "Improved Denoising Diffusion Probabilistic Models", eq. 17.
    """

    spacing = None
    shift = 0.0

    def alpha_bar(self, t: Floats) -> Floats:
        """As in `Schedule`."""
        angle = (np.asarray(t, np.float64) + self.offset) / (1 + self.offset) * np.pi / 2
        return np.maximum(np.cos(angle) ** 2, self.floor)

    def time(self, log_snr: Floats) -> Floats:
        """As in `Schedule`: the log-SNR is -2 · ln tan of the angle."""
        angle = np.arctan(np.exp(-np.asarray(log_snr, np.float64) / 2))
        return np.clip(angle * 2 / np.pi * (1 + self.offset) - self.offset, 0.0, 1.0)


class Karras(KarrasData, frozen=True):
    """sigma(t)^(1/rho) = sigma_min^(1/rho) + t · (sigma_max^(1/rho) - sigma_min^(1/rho)).

    alpha_bar = 1 / (1 + sigma²). Source: Karras et al., "Elucidating the Design Space of
    Diffusion-Based Generative Models", eq. 5.
    """

    spacing = "karras"
    shift = 0.0

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha_bar(self, t: Floats) -> Floats:
        """As in `Schedule`."""
        least, most = self._ends()
        root = least + np.asarray(t, np.float64) * (most - least)
        return 1 / (1 + root ** (2 * self.rho))

    def time(self, log_snr: Floats) -> Floats:
        """As in `Schedule`: sigma is e^(-log-SNR / 2)."""
        least, most = self._ends()
        root = np.exp(-np.asarray(log_snr, np.float64) / (2 * self.rho))
        return np.clip((root - least) / (most - least), 0.0, 1.0)


@dataclass(frozen=True)
class ShiftedCosine:
    """log-SNR(t) = -2 · ln tan u(t) + 2 · (1 - t) · ln(high / d) + 2 · t · ln(low / d).

    d = sqrt(height · width), u even in t between the angles of `logsnr_max` and `logsnr_min`: at
    t = 1 a picture is as noisy as one of side `noise_low` would be in the cosine schedule, at t = 0
    as one of side `noise_high`. Source: Hoogeboom et al., "Simple diffusion", arXiv 2301.11093,
    eq. 5, and "Simpler Diffusion", arXiv 2410.19324.
    """

    data: ShiftedCosineData
    size: Size

    spacing = None

    @property
    def shift(self) -> float:
        """As in `Schedule`: that of the noise, where a run begins."""
        return math.log(self.data.noise_low / self.side)

    @property
    def side(self) -> float:
        """The side of a square as large as the picture."""
        return math.sqrt(self.size[0] * self.size[1])

    @property
    def angles(self) -> tuple[float, float]:
        """u at t = 0 and at t = 1."""
        ends = self.data.logsnr_max, self.data.logsnr_min
        low, high = (math.atan(math.exp(-end / 2)) for end in ends)
        return low, high

    def log_snr(self, t: Floats) -> Floats:
        """log-SNR at t in [0, 1]."""
        (low, high), t = self.angles, np.asarray(t, np.float64)
        clean = 2 * math.log(self.data.noise_high / self.side)
        cosine = -2 * np.log(np.tan(low + t * (high - low)))
        return np.asarray(cosine + (1 - t) * clean + 2 * t * self.shift)

    def alpha_bar(self, t: Floats) -> Floats:
        """As in `Schedule`."""
        return np.maximum(1 / (1 + np.exp(-self.log_snr(t))), self.data.floor)

    def time(self, log_snr: Floats) -> Floats:
        """As in `Schedule`, by halving."""
        wanted = np.asarray(log_snr, np.float64)
        low, high = np.zeros_like(wanted), np.ones_like(wanted)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            before = self.log_snr(middle) > wanted
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        return (low + high) / 2


KINDS: dict[type, Callable[[Any, Size], Schedule]] = {
    CosineData: lambda data, size: Cosine(**asdict(data)),
    KarrasData: lambda data, size: Karras(**asdict(data)),
    ShiftedCosineData: ShiftedCosine,
}
COSINE = Cosine()


def read(data: ScheduleData, size: Size) -> Schedule:
    """The schedule that a manifest describes, for latents of `size` (height, width)."""
    return KINDS[type(data)](data, size)


def log_snr(alpha_bar: Floats) -> Floats:
    """ln(alpha_bar / (1 - alpha_bar)), infinite at 0 and 1."""
    a = np.asarray(alpha_bar, np.float64)
    with np.errstate(divide="ignore"):
        found: Floats = np.log(a) - np.log1p(-a)
    return found
