"""What is to be drawn, and what of it can be checked without a bundle's files."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from runtime.bundle.interface import Interface, ScheduleData, Size, check_size
from runtime.errors import UsageError
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVER, SOLVERS, SPACINGS, WHOLE
from runtime.sampling.guidance import Guidance, guidance
from runtime.sampling.labels import Label, Labels
from runtime.sampling.noise import COHERENT, KINDS, LARGEST_SEED
from runtime.sampling.schedule import Schedule, log_snr, read

MOST_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """One image per entry of `labels`, as one batch; sizes are (height, width).

    A label is a name or a number, a tuple of such of several parts, a mapping of these to weights,
    or None for no condition.

    Image i has the noise of (seed, first_index + i), of the kind `noise`. `steps` evaluations are
    made by `solver` over `spacing` (None: the solver's own numbers of both). guidance_scale 1 runs
    the condition alone, 0 the null condition alone; at t outside `guidance_interval` it is 1. With
    `continue_at` the steps from `continue_from` on (default: half of them) run at that larger
    latent, which takes one evaluation more. `image` defaults to the training ratio of the largest
    latent.
    """

    labels: Sequence[Label]
    latent: Size
    image: Size | None = None
    steps: int | None = None
    guidance_scale: float = 2.0
    eta: float = 0.0
    seed: int = 0
    first_index: int = 0
    noise: str = COHERENT
    continue_at: Size | None = None
    continue_from: int | None = None
    solver: str = SOLVER
    spacing: str | None = None
    guidance_interval: tuple[float, float] = WHOLE

    @property
    def count(self) -> int:
        """The number of evaluations."""
        return SOLVERS[self.solver].steps if self.steps is None else self.steps

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
        """The step from which `continue_at` is the latent's size, `count` where it never is."""
        if self.continue_at is None:
            return self.count
        return self.count // 2 if self.continue_from is None else self.continue_from

    def schedule(self, data: ScheduleData) -> Schedule:
        """A bundle's schedule for the size that a run begins with: it fixes all of its nodes."""
        return read(data, self.latent)

    def table(self, data: ScheduleData) -> solvers.Table:
        """The solver's table over a bundle's schedule, its history forgotten at `turn`."""
        given = (self.solver, self.schedule(data), self.count, self.spacing, self.eta)
        return solvers.table(*given, restart=self.turn)

    def guidance(self, table: solvers.Table, data: ScheduleData, interface: Interface) -> Guidance:
        """Conditions and their weights in each step of a table; raises UsageError."""
        times = self.schedule(data).time(log_snr(table.alpha_bar[:-1]))
        each = Labels(interface.labels, interface.parts).of_images(self.labels)
        count = len(interface.labels)
        return guidance(each, count, self.guidance_scale, times, self.guidance_interval)

    def check(self, interface: Interface) -> None:
        """Raise UsageError for what no bundle with this interface's labels can draw."""
        self.check_types()
        kinds = {
            "solver": (self.solver, SOLVERS),
            "spacing": (self.spacing, (None, *SPACINGS)),
            "noise": (self.noise, KINDS),
        }
        for name, (kind, known) in kinds.items():
            if kind not in known:
                names = " or ".join(each for each in known if each)
                raise UsageError(f"{name} is {kind!r}; expected {names}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UsageError(f"guidance_interval is {low}..{high}; expected 0 <= low <= high <= 1")
        limits = {
            "steps": (self.count, 1, MOST_STEPS),
            "guidance_scale": (self.guidance_scale, -100, 100),
            "eta": (self.eta, 0, 10),
            "seed": (self.seed, 0, LARGEST_SEED),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; expected {low} to {high}")
        Labels(interface.labels, interface.parts).of_images(self.labels)
        self.check_continuation()

    def check_types(self) -> None:
        """Raise UsageError where a value is of another type than its field."""
        for name in ("latent", "image", "continue_at"):
            if (size := getattr(self, name)) is not None or name == "latent":
                check_size(name, size)
        for name in ("steps", "seed", "first_index", "continue_from"):
            value = getattr(self, name)
            if value is None and name in ("steps", "continue_from"):
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise _wrong_type(name, value, "a whole number")
        for name in ("guidance_scale", "eta"):
            if not isinstance(getattr(self, name), Real):
                raise _wrong_type(name, getattr(self, name), "a number")
        for name in ("solver", "spacing", "noise"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong_type(name, getattr(self, name), "a name")
        interval = self.guidance_interval
        pair = isinstance(interval, Sequence) and len(interval) == 2
        if not pair or not all(isinstance(end, Real) for end in interval):
            raise _wrong_type("guidance_interval", interval, "two numbers, as in (0.2, 0.8)")

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
        if not 0 < self.turn < self.count:
            raise UsageError(
                f"continue_from is {self.turn} of {self.count} steps; expected some before and "
                "some after it"
            )


def _wrong_type(name: str, value: Any, expected: str) -> UsageError:
    return UsageError(f"{name} is {value!r}; expected {expected}")
