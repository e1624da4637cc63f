"""What training needs of SiD2's noise schedule beyond what drawing does: how fast it falls."""

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from reference.families.sid2.config import ScheduleConfig
from runtime.bundle.interface import ShiftedCosineData, Size
from runtime.sampling.schedule import ShiftedCosine


def schedule_of(config: ScheduleConfig, size: Size) -> ShiftedCosine:
    """The schedule of a configuration for images of `size` (height, width)."""
    return ShiftedCosine(ShiftedCosineData(**asdict(config)), size)


def slope(schedule: ShiftedCosine, t: NDArray[np.float64]) -> NDArray[np.float64]:
    """d log-SNR / dt at t in [0, 1], negative throughout."""
    low, high = schedule.angles
    angle = low + np.asarray(t, np.float64) * (high - low)
    noise = schedule.data.noise_low / schedule.data.noise_high
    return np.asarray(-4 * (high - low) / np.sin(2 * angle) + 2 * np.log(noise))


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
