"""Classifier-free guidance: eps is a weighted sum over conditions, and the weights may change.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", eq. 6; Kynkäänniemi et al.,
"Applying Guidance in a Limited Interval" (arXiv 2404.07724).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UsageError
from runtime.sampling.choices import WHOLE
from runtime.sampling.labels import Combination
from runtime.sampling.schedule import Floats


@dataclass(frozen=True)
class Guidance:
    """conditions float32 `[K, B, labels]` and their weights float32 `[steps, K, B]`."""

    conditions: NDArray[np.float32]
    weights: NDArray[np.float32]

    def branches(self, step: int) -> tuple[int, ...]:
        """Which of the conditions count in a step, for one of the images at least."""
        return tuple(map(int, np.flatnonzero(np.abs(self.weights[step]).max(1) > 0)))

    def at(self, step: int) -> list[NDArray[np.float32]]:
        """The weights `[B, 1, 1, 1]` of `branches(step)`."""
        return [self.weights[step, k].reshape(-1, 1, 1, 1) for k in self.branches(step)]


def guidance(
    each: Sequence[Mapping[Combination, float]],
    count: int,
    scale: float,
    times: Floats,
    interval: tuple[float, float] = WHOLE,
) -> Guidance:
    """eps = eps_null + g · Σ w_i (eps_i - eps_null); g is `scale` within `interval`, outside it 1.

    `each` image's conditions, as numbers among `count` labels, with their weights w_i. `times`: t
    of every step. Conditions that count in no step drop out.
    """
    branches = 1 + max(len(w) for w in each)
    conditions = np.zeros((branches, len(each), count), np.float32)
    shares = np.zeros((branches, len(each)), np.float64)
    for image, own in enumerate(each):
        for branch, (numbers, weight) in enumerate(own.items(), 1):
            conditions[branch, image, list(numbers)] = 1
            shares[branch, image] = weight
    inside = (times >= interval[0]) & (times <= interval[1])
    scales = np.where(inside, scale, 1.0).reshape(-1, 1, 1)
    weights = (scales * shares).astype(np.float32)
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    used = np.abs(weights).max((0, 2)) > 0
    return Guidance(conditions[used], weights[:, used])


def guide(eps: Any, weights: Sequence[Any]) -> Any:
    """Σ weights[k] · eps[k]: with (1 - g, g) for (null, condition) this is guidance by g.

    A weight is a number, or an array `[B, 1, 1, 1]` of one number per image.
    """
    if len(eps) != len(weights):
        raise UsageError(f"{len(weights)} weights for {len(eps)} branches of eps; expected as many")
    total = eps[0] * weights[0]
    for branch, weight in zip(eps[1:], weights[1:], strict=True):
        total = total + branch * weight
    return total


def guided(denoise: Callable[[Any, int], Any], weights: Sequence[Any]) -> Callable[[Any, int], Any]:
    """`denoise(x, step)`, which gives eps per branch, guided by the same `weights` in each step."""
    return lambda x, step: guide(denoise(x, step), weights)
