"""What a step takes besides its latent: kept, indexed by the step, gathered by branch.

Letters: B images, K conditions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.manifest import Array


@dataclass(frozen=True)
class StepInputs:
    """What a step takes besides its latent: what outlives it, and what it takes of the schedule.

    `fixed` stays as it is; that of `branched` has an axis of conditions first. `varying` has a
    leading axis of points of the schedule; that of `gathered` then one of distinct conditions, of
    which `place` `[K, B]` says which is whose.
    """

    fixed: dict[str, Array]
    branched: frozenset[str]
    varying: dict[str, Array]
    gathered: frozenset[str]
    place: NDArray[np.int64]

    def kept(self, branches: tuple[int, ...]) -> dict[str, Array]:
        """The inputs that stay, of some of the conditions."""
        if len(branches) == len(self.place):
            return self.fixed
        return {
            name: value[list(branches)] if name in self.branched else value
            for name, value in self.fixed.items()
        }

    def of_step(self, step: int, branches: tuple[int, ...]) -> dict[str, Array]:
        """The inputs that change with the step, of some of the conditions."""
        return {
            name: gather(value[step], self.place[list(branches)])
            if name in self.gathered
            else value[step, ...]
            for name, value in self.varying.items()
        }

    def at(self, step: int, branches: tuple[int, ...] | None = None) -> dict[str, Array]:
        """All inputs of a step but its latent, of some of the conditions or of all."""
        own = tuple(range(len(self.place))) if branches is None else branches
        return self.kept(own) | self.of_step(step, own)


def distinct(conditions: Array) -> tuple[Array, NDArray[np.int64]]:
    """Distinct rows `[n, labels]` of conditions `[K, B, labels]`, and which is whose `[K, B]`."""
    count, batch, labels = conditions.shape
    if not labels:  # of an unconditional model, where all are alike
        return conditions[0, :1], np.zeros((count, batch), np.int64)
    rows, place = np.unique(conditions.reshape(-1, labels), axis=0, return_inverse=True)
    return rows, place.reshape(count, batch)


def gather(rows: Array, place: NDArray[np.int64]) -> Array:
    """Rows of distinct conditions `[n, ...]` as each branch and image has them, `[K, B, ...]`."""
    return np.ascontiguousarray(rows[place])
