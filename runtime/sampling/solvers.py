"""Solvers as tables: where a run evaluates the model, and what it makes of each evaluation.

A run of S evaluations has S + 1 nodes alpha_bar, from noise to picture, and a row of seven numbers
per evaluation, all float64:

    x0 = p · x + q · eps,    x' = a · x + b · x0 + c · x0₋₁ + d · x0₋₂ + e · noise

with x0₋₁ and x0₋₂ of the two evaluations before. Rows of an explicit start need no history: c and d
are 0 in the first row, d in the second.

Sources: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", eq. 12 and 16; Lu et al.,
"DPM-Solver++" (arXiv 2211.01095), data prediction, multistep, its integrals solved exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.sampling.choices import SOLVERS
from runtime.sampling.schedule import Floats, Schedule, log_snr

EPSILON = 1e-6  # as published with the cosine schedule's DDIM
# The grid of a run of S evaluations, found by measurement: log-SNR / 2 of the first is
# -(0.3 + 1.75 · ln S), so that what it neglects falls as a third-order step's error does; t of the
# last, whose x0 is the sample, is 0.25 / S. Below 8 the first half of them is of order 1: over such
# long steps x0 is better held than extrapolated where noise dominates. Deeper in the noise than
# `DEEPEST` a model's x0 is not worth a first step; above 30 all of the schedule is run through.
# A shifted schedule shifts first and deepest too: averaged over n × n pixels a picture is less
# noisy by ln n in these units, so that what shows at some depth shows there ln n further down.
FIRST, FIRST_PER_LOG, LAST_TIME = 0.3, 1.75, 0.25
DEEPEST = -5.7
FEW, MANY = 8, 30
KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Table:
    """Nodes alpha_bar `[S + 1]`, rising, and rows (p, q, a, b, c, d, e) `[S, 7]`, float64."""

    alpha_bar: Floats
    rows: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def update(self, step: int) -> tuple[float, ...]:
        """(keep, move, c, d, e) of x' = keep · x + move · eps + c · x0₋₁ + d · x0₋₂ + e · noise."""
        p, q, a, b, c, d, e = map(float, self.rows[step])
        return a + b * p, b * q, c, d, e

    @property
    def has_history(self) -> bool:
        """Does any row take the x0 of an evaluation before it?"""
        return bool(self.rows[:, 4:6].any())


def table(
    solver: str,
    schedule: Schedule,
    steps: int,
    spacing: str | None = None,
    eta: float = 0.0,
    restart: int = 0,
    strength: float = 1.0,
) -> Table:
    """The table of a run of `steps` evaluations with a solver over a spacing of `choices`.

    `restart`: a step that takes no x0 of those before it, as where the latent's size changes.
    `strength`: t of the noise that x begins with; 1 is noise alone, less an x that holds a picture,
    from which as many evaluations are made as the whole run makes there.
    """
    order = SOLVERS[solver].order
    spacing = spacing or spacing_of(solver, schedule)
    first, last = ends(schedule, steps)

    def nodes(t: float, start: float, count: int) -> Floats:
        if order == 0 and spacing == "time":
            return schedule.alpha_bar(np.linspace(t, 0.0, count + 1))
        return np.append(GRIDS[spacing](schedule, start, last, count), 1.0)

    whole = nodes(1.0, first, steps)
    held = steps // 2 if steps < FEW else 1
    if strength == 1:
        return _table(whole, order, eta, restart, held, steps <= MANY)
    left = evaluations(schedule, whole, strength)
    there = float(log_snr(schedule.alpha_bar(np.array(strength))))
    own = nodes(strength, max(first, there), left)
    return _table(own, order, eta, restart, max(1, held - steps + left))


def evaluations(schedule: Schedule, nodes: Floats, strength: float) -> int:
    """How many evaluations of a run over `nodes` [S + 1] are left at t = `strength`.

    None at 0, else by the nearest node, and one at least.
    """
    if strength == 0:
        return 0
    steps = len(nodes) - 1
    times = np.append(schedule.time(log_snr(nodes[:-1])), 0.0)
    place = np.interp(strength, times[::-1], np.arange(steps, -1.0, -1.0))
    return max(1, steps - round(float(place)))


def _table(
    nodes: Floats, order: int, eta: float, restart: int, held: int, noise: bool = False
) -> Table:
    found = rows(nodes, order, eta, restart, held, noise)
    return Table(nodes, np.array(found, np.float64).reshape(-1, 7))


def spacing_of(solver: str, schedule: Schedule) -> str:
    """The spacing of a run where none is asked for: the schedule's own, else the solver's."""
    return schedule.spacing or SOLVERS[solver].spacing


def rows(
    nodes: Floats, order: int, eta: float, restart: int = 0, held: int = 1, noise: bool = False
) -> list[tuple[float, ...]]:
    """The rows `[S, 7]` between nodes alpha_bar `[S + 1]`; see `table`.

    `held`: how many steps are of order 1 before the order rises. `noise`: the first x is noise
    alone, as at alpha_bar 0, though the model is told `nodes[0]`.
    """
    if order == 0:
        return [ddim_row(a, b, eta) for a, b in pairwise(nodes)]
    logs = log_snr(nodes) / 2
    found = []
    for step, (a, next_a) in enumerate(pairwise(nodes)):
        begin = restart if step >= restart else 0
        count = min(order, max(1, step - held + 2), step - begin + 1)
        known = logs[step - count + 1 : step + 1][::-1]
        found.append(multistep_row(a, next_a, known, logs[step + 1], eta, noise and step == 0))
    return found


def ddim_row(alpha_bar: float, next_alpha_bar: float, eta: float) -> tuple[float, ...]:
    """DDIM as published: with its guards of 1e-6, and noise that may exceed the step's own.

    x0 = (x - sqrt(1 - a) · eps) / (sqrt(a) + 1e-6), direction = (x - sqrt(a) · x0) /
    (sqrt(1 - a) + 1e-6), x' = sqrt(a') · x0 + sqrt(1 - a' - e²) · direction + e · noise.
    """
    root, rest = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    spread = sigma(alpha_bar, next_alpha_bar, eta)
    onward = math.sqrt(max(0.0, 1 - next_alpha_bar - spread**2)) / (rest + EPSILON)
    share = math.sqrt(next_alpha_bar) - onward * root
    return 1 / (root + EPSILON), -rest / (root + EPSILON), onward, share, 0.0, 0.0, spread


def sigma(alpha_bar: float, next_alpha_bar: float, eta: float) -> float:
    """Standard deviation of the noise that a step of DDIM adds; 0 where eta is 0."""
    posterior = max(0.0, (1 - next_alpha_bar) / (1 - alpha_bar + EPSILON))
    fresh = max(0.0, 1 - alpha_bar / (next_alpha_bar + EPSILON))
    return eta * math.sqrt(posterior * fresh)


def predict_x0(x: Any, eps: Any, alpha_bar: float) -> Any:
    """x0 = (x - sqrt(1 - a) · eps) / (sqrt(a) + 1e-6)."""
    return (x - eps * math.sqrt(1 - alpha_bar)) / (math.sqrt(alpha_bar) + EPSILON)


def predict_eps(x: Any, x0: Any, alpha_bar: float) -> Any:
    """eps = (x - sqrt(a) · x0) / (sqrt(1 - a) + 1e-6)."""
    return (x - x0 * math.sqrt(alpha_bar)) / (math.sqrt(1 - alpha_bar) + EPSILON)


def multistep_row(
    alpha_bar: float,
    next_alpha_bar: float,
    known: Floats,
    end: float,
    eta: float,
    noise: bool = False,
) -> tuple[float, ...]:
    """An exponential Adams step over λ = log-SNR / 2, from `known[0]` to `end`.

    x0 is taken to be the polynomial in λ through its estimates at `known` (the present one, then
    those before it), and the linear rest of the equation is solved exactly: with g = 1 + eta,

        x' = σ'/σ · e^(-eta·h) · x + sqrt(a') · g ∫₀ʰ e^(-g(h - s)) x0(λ + s) ds
             + σ' · sqrt(1 - e^(-2·eta·h)) · noise,    h = end - λ, σ = sqrt(1 - a).

    eta 0 is the probability flow; 1 the reverse SDE, at order 1 the step of ancestral sampling.
    With `noise` x is of alpha_bar 0 and x0, of order 1, was the same from there on.
    """
    root, rest = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    step, g = end - known[0], 1 + eta
    if math.isinf(step):
        return 1 / root, -rest / root, 0.0, 1.0, 0.0, 0.0, 0.0
    moments = [-math.expm1(-g * step)]
    for power in range(1, len(known)):  # g ∫ e^(-g(h - s)) s^power ds, by parts
        moments.append(step**power - power / g * moments[-1])
    powers = np.vander(known - known[0], increasing=True).T
    weights = np.linalg.solve(powers, np.array(moments)) if not noise else np.ones(1)
    weights *= math.sqrt(next_alpha_bar)
    onward = math.sqrt(1 - next_alpha_bar)
    keep = onward / (1.0 if noise else rest) * math.exp(-eta * step)
    spread = onward * math.sqrt(-math.expm1(-2 * eta * step))
    present, first, second = (*map(float, weights), 0.0, 0.0)[:3]
    return 1 / root, -rest / root, keep, present, first, second, spread


def ends(schedule: Schedule, steps: int) -> tuple[float, float]:
    """log-SNR of the first and the last evaluation."""
    least, last = log_snr(schedule.alpha_bar(np.array([1.0, LAST_TIME / steps])))
    if steps > MANY:
        return float(least), float(last)
    first = max(DEEPEST, -FIRST - FIRST_PER_LOG * math.log(steps)) + schedule.shift
    return max(2 * first, float(least)), float(last)


def _time(schedule: Schedule, first: float, last: float, steps: int) -> Floats:
    return schedule.alpha_bar(np.linspace(schedule.time(np.array(first)), 0.0, steps + 1)[:-1])


def _logsnr(schedule: Schedule, first: float, last: float, steps: int) -> Floats:
    return expit(np.linspace(first, last, steps))


def _karras(schedule: Schedule, first: float, last: float, steps: int) -> Floats:
    """Karras et al., "Elucidating the Design Space", eq. 5, with ρ = 7 and σ = e^(-log-SNR / 2)."""
    most, least = (math.exp(-end / 2 / KARRAS_RHO) for end in (first, last))
    return expit(-2 * KARRAS_RHO * np.log(np.linspace(most, least, steps)))


# alpha_bar of so many evaluations; the log-SNR of the first and the last one say where.
GRIDS: dict[str, Callable[[Schedule, float, float, int], Floats]] = {
    "time": _time,
    "logsnr": _logsnr,
    "karras": _karras,
}


def expit(log_snr: Floats) -> Floats:
    """alpha_bar of a log-SNR: 1 / (1 + e^(-log-SNR))."""
    found: Floats = 1 / (1 + np.exp(-log_snr))
    return found
