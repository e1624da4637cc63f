"""Noise schedules: x_t = sqrt(alpha_bar) · x0 + sqrt(1 - alpha_bar) · eps, t from 0 to 1 (noise).

The log-SNR is ln(alpha_bar / (1 - alpha_bar)), which falls as t rises. A schedule is data in a
manifest, named after its formula; `read` makes it an object that gives both for any t, and t back.
"""

from typing import Protocol

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from runtime.bundle.interface import CosineData, ScheduleData

Floats = NDArray[np.float64]


class Schedule(Protocol):
    """A falling function of t; arrays in, arrays of the same shape out, float64."""

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

    def alpha_bar(self, t: Floats) -> Floats:
        """As in `Schedule`."""
        angle = (np.asarray(t, np.float64) + self.offset) / (1 + self.offset) * np.pi / 2
        return np.maximum(np.cos(angle) ** 2, self.floor)

    def time(self, log_snr: Floats) -> Floats:
        """As in `Schedule`: the log-SNR is -2 · ln tan of the angle."""
        angle = np.arctan(np.exp(-np.asarray(log_snr, np.float64) / 2))
        return np.clip(angle * 2 / np.pi * (1 + self.offset) - self.offset, 0.0, 1.0)


KINDS: dict[type[ScheduleData], type[Cosine]] = {CosineData: Cosine}
COSINE = Cosine()


def read(data: ScheduleData) -> Schedule:
    """The schedule that a manifest describes."""
    return KINDS[type(data)](**asdict(data))


def log_snr(alpha_bar: Floats) -> Floats:
    """ln(alpha_bar / (1 - alpha_bar)), infinite at 0 and 1."""
    a = np.asarray(alpha_bar, np.float64)
    with np.errstate(divide="ignore"):
        found: Floats = np.log(a) - np.log1p(-a)
    return found
