"""What is to be drawn, and what of it can be checked without a bundle's files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import LARGEST, Interface, ScheduleData, Size, check_size
from runtime.errors import UsageError
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVER, SOLVERS, SPACINGS, WHOLE
from runtime.sampling.guidance import Guidance, guidance
from runtime.sampling.labels import Label, Labels
from runtime.sampling.noise import COHERENT, KINDS, LARGEST_SEED
from runtime.sampling.schedule import Schedule, log_snr, read

MOST_STEPS = 10_000
STRENGTH = 0.6  # of an edit where none is asked for; with a mask 1, since the rest is kept
SEAM_SHARE = 16  # of a picture's shorter side: the width of its seam


@dataclass(frozen=True)
class Request:
    """One image per entry of `labels`, as one batch; sizes are (height, width).

    A label is a name or a number, a tuple of such of several parts, a mapping of these to weights,
    or None for no condition.

    Image i has the noise of (seed, first_index + i), or of pair i of `keys` where requests are
    drawn together, of the kind `noise`. `steps` evaluations are made by `solver` over `spacing`
    (None: the solver's own numbers of both). guidance_scale 1 runs the condition alone, 0 the null
    condition alone, None is the bundle's own; at t outside `guidance_interval` it is 1. With
    `continue_at` the steps from `continue_from` on (default: half of them) run at that larger
    latent, which takes one evaluation more. `image` defaults to the training ratio of the largest
    latent.

    `init` is a picture to begin with, float32 `[1 or B, c, h, w]` in [-1, 1] of any size, with the
    noise of t = `strength` (0 to 1, default STRENGTH): as many of the steps are made as are left
    there, none at 0. `mask`, float32 `[1 or B, 1, h, w]` in [0, 1] of any size, is 1 where the
    picture is drawn anew; where it is 0 its pixels stay as they are, with a transition of `seam`
    pixels inside of what is drawn (default: 1 / SEAM_SHARE of the shorter side). `image` then
    defaults to the picture's size.
    """

    labels: Sequence[Label]
    latent: Size
    image: Size | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    eta: float = 0.0
    seed: int = 0
    first_index: int = 0
    noise: str = COHERENT
    continue_at: Size | None = None
    continue_from: int | None = None
    solver: str = SOLVER
    spacing: str | None = None
    guidance_interval: tuple[float, float] = WHOLE
    init: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    strength: float | None = None
    mask: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    seam: int | None = None
    keys: Sequence[tuple[int, int]] | None = None

    @property
    def start_time(self) -> float:
        """t of the noise that a run begins with: `strength`, or 1 where it begins with noise."""
        if self.init is None:
            return 1.0
        default = STRENGTH if self.mask is None else 1.0
        return default if self.strength is None else float(self.strength)

    @property
    def begins_with_picture(self) -> bool:
        """Whether `init` has a part in the latents at all."""
        return self.init is not None and (self.start_time < 1 or self.mask is not None)

    def drawn_size(self, interface: Interface) -> Size:
        """The size of the images: `image`, that of `init`, or what the latent was trained for."""
        if self.image is not None:
            return self.image
        if self.init is not None and interface.decoupled:
            return self.init.shape[2], self.init.shape[3]
        return interface.image_size(self.largest)

    def seam_width(self, size: Size) -> int:
        """The pixels of the seam in images of the size that `seam` is of."""
        return min(size) // SEAM_SHARE if self.seam is None else self.seam

    @property
    def count(self) -> int:
        """The number of evaluations of a run that begins with noise alone."""
        return SOLVERS[self.solver].steps if self.steps is None else self.steps

    @property
    def noise_keys(self) -> Sequence[tuple[int, int]]:
        """(seed, index) of each image's noise."""
        if self.keys is not None:
            return self.keys
        return [(self.seed, self.first_index + i) for i in range(len(self.labels))]

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
        return solvers.table(*given, restart=self.turn, strength=self.start_time)

    def guidance(self, table: solvers.Table, data: ScheduleData, interface: Interface) -> Guidance:
        """Conditions and their weights in each step of a table; raises UsageError."""
        times = self.schedule(data).time(log_snr(table.alpha_bar[:-1]))
        each = Labels(interface.labels, interface.parts).of_images(self.labels)
        count = len(interface.labels)
        return guidance(each, count, self.scale(interface), times, self.guidance_interval)

    def scale(self, interface: Interface) -> float:
        """The guidance scale: what is asked for, or the bundle's own."""
        return interface.guidance_scale if self.guidance_scale is None else self.guidance_scale

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
            "guidance_scale": (self.scale(interface), -100, 100),
            "eta": (self.eta, 0, 10),
            "seed": (self.seed, 0, LARGEST_SEED),
            "strength": (self.start_time, 0, 1),
            "seam": (self.seam or 0, 0, LARGEST),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; expected {low} to {high}")
        Labels(interface.labels, interface.parts).of_images(self.labels)
        self.check_keys()
        self.check_edit()
        self.check_continuation()

    def check_types(self) -> None:
        """Raise UsageError where a value is of another type than its field."""
        for name in ("latent", "image", "continue_at"):
            if (size := getattr(self, name)) is not None or name == "latent":
                check_size(name, size)
        for name in ("steps", "seed", "first_index", "continue_from", "seam"):
            value = getattr(self, name)
            if value is None and name not in ("seed", "first_index"):
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise _wrong_type(name, value, "a whole number")
        for name in ("guidance_scale", "eta", "strength"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (value is None and name != "eta"):
                raise _wrong_type(name, value, "a number")
        for name in ("solver", "spacing", "noise"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong_type(name, getattr(self, name), "a name")
        interval = self.guidance_interval
        pair = isinstance(interval, Sequence) and len(interval) == 2
        if not pair or not all(isinstance(end, Real) for end in interval):
            raise _wrong_type("guidance_interval", interval, "two numbers, as in (0.2, 0.8)")

    def check_edit(self) -> None:
        """Raise UsageError for what is said of an edit where there is none."""
        needs = {"strength": "init", "mask": "init", "seam": "mask"}
        for name, needed in needs.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise UsageError(f"{name} is given alone; expected {needed} with it")
        if self.init is not None and self.continue_at is not None:
            raise UsageError(
                "continue_at is given with init; expected one of them: an edit has one latent. "
                "For a larger one pass latent"
            )

    def check_keys(self) -> None:
        """Raise UsageError where `keys` are no pair per image."""
        whole = all(
            isinstance(key, tuple)
            and len(key) == 2
            and all(isinstance(n, Integral) and 0 <= n <= LARGEST_SEED for n in key)
            for key in self.noise_keys
        )
        if not whole or len(self.noise_keys) != len(self.labels):
            raise UsageError(
                f"keys are {self.keys!r}; expected (seed, index) for each of the "
                f"{len(self.labels)} images, numbers from 0 to {LARGEST_SEED}"
            )

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
