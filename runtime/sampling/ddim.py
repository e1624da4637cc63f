"""DDIM, the only sampler: PyTorch models and engines are both just a callable to it.

The arithmetic uses operators alone, so `x` may be a numpy array or a torch tensor.
Source: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", eq. 12 and 16; Ho and
Salimans, "Classifier-Free Diffusion Guidance", eq. 6. Coefficients are float64 until the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runtime.errors import NumericalError, UsageError
from runtime.sampling.schedule import sampling_alpha_bar

EPSILON = 1e-6

# denoise(x, step) -> eps, one per branch along its first axis.
# step runs from 0 to `steps`, where t = 1 to 0.
Denoiser = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Sample:
    """What a trajectory ends in: the sample and the last estimate of x0, shaped as x."""

    x: Any
    x0: Any


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


def predict_x0(x: Any, eps: Any, alpha_bar: float) -> Any:
    """x0 = (x - sqrt(1 - a) · eps) / (sqrt(a) + 1e-6)."""
    return (x - eps * math.sqrt(1 - alpha_bar)) / (math.sqrt(alpha_bar) + EPSILON)


def predict_eps(x: Any, x0: Any, alpha_bar: float) -> Any:
    """eps = (x - sqrt(a) · x0) / (sqrt(1 - a) + 1e-6)."""
    return (x - x0 * math.sqrt(alpha_bar)) / (math.sqrt(1 - alpha_bar) + EPSILON)


def sigma(alpha_bar: float, next_alpha_bar: float, eta: float) -> float:
    """Standard deviation of the noise that a step adds; 0 where eta is 0."""
    posterior = max(0.0, (1 - next_alpha_bar) / (1 - alpha_bar + EPSILON))
    fresh = max(0.0, 1 - alpha_bar / (next_alpha_bar + EPSILON))
    return eta * math.sqrt(posterior * fresh)


def step_weights(alpha_bar: float, next_alpha_bar: float, eta: float) -> tuple[float, ...]:
    """(keep, move, spread) of a step as one sum: x' = keep · x + move · eps + spread · noise.

    direction = (x - sqrt(a) · x0) / (sqrt(1 - a) + 1e-6) with x0 as above, and
    x' = sqrt(a') · x0 + sqrt(1 - a' - spread²) · direction, collected by x and eps.
    """
    root, rest = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    spread = sigma(alpha_bar, next_alpha_bar, eta)
    onward = math.sqrt(max(0.0, 1 - next_alpha_bar - spread**2)) / (rest + EPSILON)
    # x' = onward · x + (sqrt(a') - onward · sqrt(a)) · x0
    share = (math.sqrt(next_alpha_bar) - onward * root) / (root + EPSILON)
    return onward + share, -share * rest, spread


def sample(
    denoise: Denoiser,
    x: Any,
    steps: int,
    weights: Sequence[Any],
    eta: float = 0.0,
    noise: Callable[[int], Any] | None = None,
    on_step: Callable[[int], object] | None = None,
    first: int = 0,
    last: int | None = None,
) -> Sample:
    """Run `steps` DDIM steps from noise `x` and estimate x0 once more at t = 0.

    `denoise(x, step)` returns one eps per guidance branch, `weights` says how they combine.
    `noise(step)` gives unit noise shaped as x and is asked only where eta > 0. `on_step(step)`
    is called after each step. `first` and `last` run a part: from x at step `first` to x and x0 at
    step `last`. Raises NumericalError where x leaves the finite numbers.
    """
    last = steps if last is None else last
    alpha_bars = [float(a) for a in sampling_alpha_bar(steps)]
    for step, (a, a_next) in enumerate(pairwise(alpha_bars[first : last + 1]), first):
        keep, move, spread = step_weights(a, a_next, eta)
        x = x * keep + guide(denoise(x, step), weights) * move
        if spread > 0 and noise is not None:
            x = x + noise(step) * spread
        require_finite(x, f"step {step + 1} of {steps}")
        if on_step is not None:
            on_step(step)
    x0 = predict_x0(x, guide(denoise(x, last), weights), alpha_bars[last])
    require_finite(x0, "the last estimate of x0")
    return Sample(x, x0)


def require_finite(x: Any, where: str) -> None:
    """Raise NumericalError where `x` holds a NaN or an infinity (max carries both on)."""
    if not math.isfinite(float(abs(x).max())):
        raise NumericalError(
            f"found NaN or infinity in the latent at {where}; expected finite numbers. "
            "Try a lower guidance_scale or a precision of fp32, and report the command if it stays"
        )
