"""Resolution ranges → profiles: the split with the smallest expected slow-down.

Sizes are cut into bands of tokens, height × width; a profile is the smallest box around the legal
sizes of its band. Every size has a number of tokens, so every legal size lies in a profile and no
gap is left at an edge. Boxes overlap, and the runtime takes the profile that is cheapest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write
from runtime.bundle.interface import Range as AxisRange
from runtime.bundle.manifest import GraphSpec
from runtime.bundle.profiles import Cost, Profile, covers, describe
from runtime.errors import UsageError

Range = tuple[int, int]
Size = tuple[int, int]
CANDIDATES = 40  # optima that are tried over a range
SAMPLES = 24  # sizes per side that the expectation is taken over
# What most requests have: a label and no label; 50 steps.
USUAL = {"conditions": 2, "steps": 51}


@dataclass(frozen=True)
class SizeRange:
    """Legal sizes: height and width within their ranges, longer : shorter side within `aspect`."""

    height: Range
    width: Range
    aspect: Fraction | None = None

    def widths(self, height: int) -> Range:
        """The legal widths at a height; empty (low > high) where there are none."""
        low, high = self.width
        if self.aspect is not None:
            low = max(low, -(-height * self.aspect.denominator // self.aspect.numerator))
            high = min(high, height * self.aspect.numerator // self.aspect.denominator)
        return low, high

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Every height that has a legal width: `[rows, 3]` of height, least and most width.

        Raises UsageError where no size is legal.
        """
        heights = range(self.height[0], self.height[1] + 1)
        rows = np.array([(h, *self.widths(h)) for h in heights], np.int64)
        rows = rows[rows[:, 1] <= rows[:, 2]]
        if not len(rows):
            raise UsageError(
                f"no size from {self.height[0]}x{self.width[0]} to {self.height[1]}x"
                f"{self.width[1]} has sides within {self.aspect}:1; expected a wider --aspect"
            )
        return rows

    def box(self, low: int, high: int) -> tuple[Range, Range]:
        """The smallest ranges of height and width around the legal sizes of low..high tokens."""
        heights, least, most = self.rows.T
        least, most = np.maximum(least, -(-low // heights)), np.minimum(most, high // heights)
        own = least <= most
        tall = heights[own]
        return (int(tall[0]), int(tall[-1])), (int(least[own].min()), int(most[own].max()))

    @cached_property
    def path(self) -> list[Size]:
        """Legal sizes from the fewest tokens to the most, as square as can be: optima to try."""
        squarest = {h: int(np.clip(h, low, high)) for h, low, high in self.rows.tolist()}
        (bottom, least, _), (top, _, most) = self.rows[0].tolist(), self.rows[-1].tolist()
        path = [(bottom, width) for width in spread(least, squarest[bottom], CANDIDATES)]
        path += [(height, squarest[height]) for height in spread(bottom, top, CANDIDATES)]
        path += [(top, width) for width in spread(squarest[top], most, CANDIDATES)]
        return sorted(set(path), key=lambda size: size[0] * size[1])

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """Sizes that stand for the range, `[samples, 2]`: equally many per octave of a side."""
        first, last = int(self.rows[0, 0]), int(self.rows[-1, 0])
        return np.array(
            [
                (height, width)
                for height in spread(first, last, SAMPLES)
                for width in spread(*self.widths(height), SAMPLES)
            ]
        )


def spread(low: int, high: int, count: int) -> list[int]:
    """At most `count` integers from low to high, evenly in their logarithm, ends included."""
    return np.unique(np.rint(np.geomspace(low, high, count)).astype(np.int64)).tolist()


def middle(limits: Range) -> int:
    """The integer nearest to the geometric mean of a range."""
    return round((limits[0] * limits[1]) ** 0.5)


def plan_profiles(
    sizes: SizeRange, batch: Range, count: int, cost: Cost | None = None
) -> list[Profile]:
    """At most `count` profiles of batch, height and width, ordered by their optimum's tokens.

    Fewer where more would not lower `expected_slowdown`. Raises UsageError where no size is legal.
    """
    cost = cost or Cost()
    splits = [_profiles(sizes, batch, bands) for bands in _splits(sizes, batch, count, cost)]
    return min(splits, key=lambda split: expected_slowdown(sizes, batch, split, cost))


def expected_slowdown(
    sizes: SizeRange, batch: Range, profiles: Sequence[Profile], cost: Cost | None = None
) -> float:
    """Mean time over `sizes` and batches as a multiple of that with a profile for each alone.

    Sides and batches are taken uniform in their logarithm, each with its cheapest profile.
    """
    cost, times = cost or Cost(), []
    for batch_size in spread(*batch, SAMPLES):
        for height, width in sizes.samples.tolist():
            request = {"batch": batch_size, "height": height, "width": width}
            times.append(
                min(
                    cost.slowdown(
                        batch_size * height * width,
                        profile["batch"][1] * profile["height"][1] * profile["width"][1],
                    )
                    for profile in profiles
                    if covers(profile, request)
                )
            )
    return float(np.mean(times))


def _profiles(sizes: SizeRange, batch: Range, bands: list[tuple[int, int, int]]) -> list[Profile]:
    """Profiles of bands, each (first, optimum, end) as indices into the path."""
    counts = [height * width for height, width in sizes.path]
    counts.append(counts[-1] + 1)
    profiles = []
    for first, best, end in bands:
        (short, tall), (narrow, wide) = sizes.box(counts[first], counts[end] - 1)
        height, width = sizes.path[best]
        profiles.append(
            {
                "batch": (batch[0], middle(batch), batch[1]),
                "height": (short, height, tall),
                "width": (narrow, width, wide),
            }
        )
    return profiles


def _splits(
    sizes: SizeRange, batch: Range, count: int, cost: Cost
) -> list[list[tuple[int, int, int]]]:
    """The best split into 1, 2, … `count` bands, by dynamic programming over the path."""
    price, optimum = _band_prices(sizes, batch, cost)
    ends = len(price)
    best, splits = price[0], [[(0, int(optimum[0, -1]), ends)]]
    cuts: list[NDArray[np.int64]] = []
    for _ in range(2, min(count, ends) + 1):
        # totals[cut, end]: the best bands - 1 bands up to cut, and one more from there to end.
        totals = np.full((ends, ends), np.inf)
        totals[1:] = best[:-1, None] + price[1:]
        cuts.append(totals.argmin(0))
        best = totals.min(0)
        marks = [ends]
        for cut in reversed(cuts):
            marks.append(int(cut[marks[-1] - 1]))
        marks = [0, *sorted(marks)]
        splits.append([(a, int(optimum[a, b - 1]), b) for a, b in pairwise(marks)])
    return splits


def _band_prices(
    sizes: SizeRange, batch: Range, cost: Cost
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed slow-down and best optimum of every band: `[first, last]`, both inclusive.

    Infinite where last < first.
    """
    counts = np.array([height * width for height, width in sizes.path])
    place = np.searchsorted(counts, sizes.samples.prod(1), side="right") - 1
    # sums[optimum, i]: slow-down of the samples of path[i] .. path[i + 1] with that optimum.
    sums = np.zeros((len(counts), len(counts)))
    for row, best in enumerate(counts.tolist()):
        for batch_size in spread(*batch, SAMPLES):
            wanted = batch_size * sizes.samples.prod(1)
            slow = [cost.slowdown(n, best * middle(batch)) for n in wanted.tolist()]
            sums[row] += np.bincount(place, slow, len(counts))
    total = np.pad(sums.cumsum(1), ((0, 0), (1, 0)))
    price = np.full(sums.shape, np.inf)
    optimum = np.zeros(sums.shape, np.int64)
    for first in range(len(counts)):
        for last in range(first, len(counts)):
            own = total[first : last + 1, last + 1] - total[first : last + 1, first]
            optimum[first, last] = first + own.argmin()
            price[first, last] = own.min()
    return price, optimum


@dataclass(frozen=True)
class Ranges:
    """What plans are asked to cover; `steps` counts DDIM steps."""

    latent: SizeRange
    image: SizeRange
    batch: Range
    conditions: Range
    steps: Range
    profiles: int
    cost: Cost

    @cached_property
    def latent_profiles(self) -> list[Profile]:
        """Profiles of the latent's sizes."""
        return plan_profiles(self.latent, self.batch, self.profiles, self.cost)

    @cached_property
    def image_profiles(self) -> list[Profile]:
        """Profiles of the image's sizes."""
        return plan_profiles(self.image, self.batch, self.profiles, self.cost)

    def of_graph(self, spec: GraphSpec, labels: int) -> list[Profile]:
        """A graph's profiles over its own axes; raises UsageError outside the graph's range."""
        image = spec.lifetime in ("image", "tile")
        split = self.image_profiles if image else self.latent_profiles
        split = split if "height" in spec.ranges else split[:1]
        conditions = self.conditions
        if spec.lifetime == "prompt" and "conditions" in spec.ranges:
            # Every distinct condition of a batch is one label's or none's.
            conditions = (1, min(labels + 1, spec.ranges["conditions"].maximum))
        limits = {"conditions": conditions, "steps": (self.steps[0] + 1, self.steps[1] + 1)}
        found = []
        for profile in split:
            every = dict(profile)
            for axis, (low, high) in limits.items():
                every[axis] = (low, min(max(USUAL[axis], low), high), high)
            found.append({axis: fitted(every[axis], legal) for axis, legal in spec.ranges.items()})
        for axis, legal in spec.ranges.items():
            least = min(profile[axis][0] for profile in found)
            most = max(profile[axis][2] for profile in found)
            if least < legal.minimum or most > legal.maximum:
                raise UsageError(
                    f"{spec.file}: {axis} {least}..{most} is asked for; the graph takes "
                    f"{legal}. Ask for a smaller range"
                )
        return found


def fitted(limits: tuple[int, int, int], legal: AxisRange) -> tuple[int, int, int]:
    """The legal multiples in (minimum, optimum, maximum)."""
    of = legal.multiple
    low, high = -(-limits[0] // of) * of, limits[2] // of * of
    return low, min(max(legal.nearest(limits[1]), low), high), high


def explain(ranges: Ranges, path: Path) -> None:
    """Print the profiles of both ranges and draw them: tokens against expected time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sides = {"latent": ranges.latent, "image": ranges.image}
    for axes, (name, sizes) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        own = (sizes, ranges.batch)
        slow = [
            expected_slowdown(*own, plan_profiles(*own, n, ranges.cost), ranges.cost)
            for n in range(1, ranges.profiles + 1)
        ]
        profiles = plan_profiles(*own, ranges.profiles, ranges.cost)
        print(f"{name}: expected slow-down with 1, 2, … profiles: " + ", ".join(map(_ratio, slow)))
        for number, profile in enumerate(profiles):
            print(f"  profile {number}: {describe(profile)} (min..optimum..max)")
        draw(axes, profiles, ranges.cost)
        axes.set_title(f"{name}: {_ratio(slow[-1])} × the time of a profile for every size")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(path)


def draw(axes: Any, profiles: list[Profile], cost: Cost) -> None:
    """One range: each profile's band of tokens and what a run takes with it; smaller is better."""

    def tokens(profile: Profile, end: int) -> int:
        return profile["batch"][end] * profile["height"][end] * profile["width"][end]

    for number, profile in enumerate(profiles):
        low, best, high = (tokens(profile, end) for end in range(3))
        counts = [low * (high / low) ** (i / 99) for i in range(100)]
        colour = f"C{number}"
        label = f"profile {number}: {profile['height'][1]}x{profile['width'][1]}"
        axes.plot(counts, [cost.time(n, best) for n in counts], colour, label=label)
        axes.plot(best, cost.time(best, best), "o", color=colour)
        axes.axvspan(low, high, color=colour, alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel="tokens: batch × height × width")
    axes.set_ylabel("expected time, in tokens at an optimum")
    axes.legend()


def _ratio(value: float) -> str:
    return f"{value:.3f}"
