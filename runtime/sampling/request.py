"""What is to be drawn, and what of it can be checked without a bundle's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.errors import UsageError
from runtime.sampling.noise import COHERENT, KINDS, LARGEST_SEED

# One image's condition: a label's number, several with weights, or None for no condition.
Label = int | Mapping[int, float] | None

MOST_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """One image per entry of `labels`, as one batch; sizes are (height, width).

    Image i has the noise of (seed, first_index + i), of the kind `noise`. guidance_scale 1 runs
    the condition alone, 0 the null condition alone. With `continue_at` the steps from
    `continue_from` on (default: half of them) run at that larger latent. `image` defaults to the
    training ratio of the largest latent.
    """

    labels: Sequence[Label]
    latent: Size
    image: Size | None = None
    steps: int = 50
    guidance_scale: float = 2.0
    eta: float = 0.0
    seed: int = 0
    first_index: int = 0
    noise: str = COHERENT
    continue_at: Size | None = None
    continue_from: int | None = None

    @property
    def indices(self) -> range:
        """What names the images' noise."""
        return range(self.first_index, self.first_index + len(self.labels))

    @property
    def largest(self) -> Size:
        """The latent's size at the last step."""
        return self.continue_at or self.latent

    @property
    def turn(self) -> int:
        """The step from which `continue_at` is the latent's size, `steps` where it never is."""
        if self.continue_at is None:
            return self.steps
        return self.steps // 2 if self.continue_from is None else self.continue_from

    def check(self, labels: Sequence[str]) -> None:
        """Raise UsageError for what no bundle with these `labels` can draw."""
        limits = {
            "steps": (self.steps, 1, MOST_STEPS),
            "guidance_scale": (self.guidance_scale, -100, 100),
            "eta": (self.eta, 0, 10),
            "seed": (self.seed, 0, LARGEST_SEED),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; expected {low} to {high}")
        if self.noise not in KINDS:
            raise UsageError(f"noise is {self.noise!r}; expected {' or '.join(KINDS)}")
        if not self.labels:
            raise UsageError("no label is given; expected one per image, None for no condition")
        for label in self.labels:
            for number in weighted(label):
                if not 0 <= number < len(labels):
                    raise UsageError(
                        f"label {number} is not in this bundle; expected 0 to {len(labels) - 1} "
                        f"({', '.join(labels)})"
                    )
        self.check_continuation()

    def check_continuation(self) -> None:
        """Raise UsageError where steps at `latent` cannot go on at `continue_at`."""
        if self.continue_at is None:
            if self.continue_from is not None:
                raise UsageError("continue_from is given alone; expected continue_at with it")
            return
        (height, width), (larger, wider) = self.latent, self.continue_at
        if larger <= height or larger * width != wider * height:
            raise UsageError(
                f"continue_at is {larger}x{wider}; expected a larger size of the aspect of the "
                f"latent {height}x{width}, as {2 * height}x{2 * width}"
            )
        if not 0 < self.turn < self.steps:
            raise UsageError(
                f"continue_from is {self.turn} of {self.steps} steps; expected some before and "
                "some after it"
            )

    def branches(self, count: int) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Conditions `[K, B, count]` and each branch's weight per image, `[B, 1, 1, 1]`.

        eps = eps_null + g · Σ w_i (eps_i - eps_null); branches of weight 0 in all images drop out.
        """
        each = [weighted(label) for label in self.labels]
        branches = 1 + max(len(w) for w in each)
        conditions = np.zeros((branches, len(each), count), np.float32)
        weights = np.zeros((branches, len(each)), np.float32)
        for image, own in enumerate(each):
            for branch, (number, weight) in enumerate(own.items(), 1):
                conditions[branch, image, number] = 1
                weights[branch, image] = self.guidance_scale * weight
            weights[0, image] = 1 - weights[1:, image].sum()
        used = np.abs(weights).max(1) > 0
        return conditions[used], [w.reshape(-1, 1, 1, 1) for w in weights[used]]


def weighted(label: Label) -> dict[int, float]:
    """A condition's labels and their weights."""
    if label is None:
        return {}
    return dict(label) if isinstance(label, Mapping) else {int(label): 1.0}
