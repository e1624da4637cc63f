"""Profiles of a plan: which sizes each covers, and which one a request runs with.

A profile maps every dynamic axis to (minimum, optimum, maximum). Kernels are chosen for the
optimum and run at every size between the ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.bundle.interface import Count
from runtime.errors import UsageError

Profile = dict[str, tuple[Count, Count, Count]]


@dataclass(frozen=True)
class Cost:
    """Time of a run, affine in tokens, in units of one token's time at a profile's optimum.

    `fixed`: what a run costs however small it is (launches), as a number of tokens. `idle`: the
    part of a token's time that a kernel chosen for more tokens spends on each absent one. `extra`:
    the part by which each token beyond the optimum costs more than one that the kernel was chosen
    for. The defaults are given, not measured: about 300 launches of 3 µs beside a token's 2.6
    MFLOP at 10 TFLOP/s; a quarter either way for tiles that are too large or too small. `fixed`
    has no say in which of two profiles is the cheaper one for a request.
    """

    fixed: float = 4096
    idle: float = 0.25
    extra: float = 0.25

    def time(self, tokens: float, optimum: float) -> float:
        """Time of `tokens` with a profile whose optimum has `optimum` of them."""
        absent, beyond = max(optimum - tokens, 0), max(tokens - optimum, 0)
        return self.fixed + tokens + self.idle * absent + self.extra * beyond

    def slowdown(self, tokens: float, optimum: float) -> float:
        """`time` as a multiple of the time with a profile made for `tokens`; at least 1."""
        return self.time(tokens, optimum) / self.time(tokens, tokens)


def tokens(sizes: Mapping[str, int]) -> int:
    """What a run's time grows with: the product of its axes."""
    return math.prod(sizes.values())


def covers(profile: Profile, sizes: Mapping[str, int]) -> bool:
    """Whether every axis of `sizes` lies within the profile."""
    return all(profile[axis][0] <= size <= profile[axis][2] for axis, size in sizes.items())


def choose(file: str, profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The number of the profile that covers `sizes` and whose optimum runs them cheapest.

    Raises UsageError naming every profile's range and the nearest legal sizes.
    """
    legal = [number for number, profile in enumerate(profiles) if covers(profile, sizes)]
    if not legal:
        raise UsageError(
            f"{file}: {_sizes(sizes)} is outside its profiles, as min..opt..max: "
            f"{'; '.join(describe(profile) for profile in profiles)}. "
            f"The nearest legal size is {_sizes(nearest(profiles, sizes))}"
        )
    wanted, cost = tokens(sizes), Cost()

    def time(number: int) -> float:
        return cost.time(wanted, tokens({axis: profiles[number][axis][1] for axis in sizes}))

    return min(legal, key=time)


def nearest(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> dict[str, int]:
    """The legal sizes with the smallest change of any axis, as a ratio, from `sizes`."""

    def clipped(profile: Profile) -> dict[str, int]:
        return {a: min(max(size, profile[a][0]), profile[a][2]) for a, size in sizes.items()}

    def distance(found: dict[str, int]) -> float:
        return sum(abs(math.log(found[axis] / max(size, 0.5))) for axis, size in sizes.items())

    return min(map(clipped, profiles), key=distance)


def describe(profile: Profile) -> str:
    """One line: `batch 1..3..8, height 4..16..64, …`."""
    return ", ".join(f"{axis} {low}..{best}..{high}" for axis, (low, best, high) in profile.items())


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
