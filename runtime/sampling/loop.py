"""The sampling loop: a table applied to a model, be its arrays of numpy or of torch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from runtime.errors import NumericalError
from runtime.sampling.solvers import Table

# predict(x, step) -> eps, guided, shaped as x.
Predictor = Callable[[Any, int], Any]
# Called after a step with its number, from 0, and what gives its estimate of x0, if it is wanted.
StepCallback = Callable[[int, Callable[[], Any]], object]
# hold(x, node): x with what an edit keeps put back, as it is at a node of the table.
Hold = Callable[[Any, int], Any]


def sample(
    predict: Predictor,
    x: Any,
    table: Table,
    noise: Callable[[int], Any] | None = None,
    on_step: StepCallback | None = None,
    first: int = 0,
    last: int | None = None,
    hold: Hold | None = None,
) -> Any:
    """`x` after the steps `first` … `last` - 1 of a table, all of them by default.

    `noise(step)` gives unit noise shaped as x and is asked only where a row adds some.
    `on_step` is called after each step; what it raises ends the run. `hold` is, too, and gives the
    x that the next step takes. Of a part, the row of `first` must take no history. Raises
    NumericalError where x leaves the finite numbers.
    """
    before: list[Any] = []  # x0 of the last two evaluations, the latest first
    for step in range(first, len(table) if last is None else last):
        p, q, *_ = map(float, table.rows[step])
        keep, move, *history, spread = table.update(step)
        eps = predict(x, step)
        estimate = partial(_estimate, x, eps, p, q)
        x0 = estimate() if table.has_history else None
        x = x * keep + eps * move
        for weight, earlier in zip(history, before, strict=False):
            if weight:
                x = x + earlier * weight
        if spread > 0 and noise is not None:
            x = x + noise(step) * spread
        require_finite(x, f"step {step + 1} of {len(table)}")
        if hold is not None:
            x = hold(x, step + 1)
        before = [x0, *before[:1]]
        if on_step is not None:
            on_step(step, estimate)
    return x


def _estimate(x: Any, eps: Any, p: float, q: float) -> Any:
    return x * p + eps * q


def require_finite(x: Any, where: str, what: str = "the latent") -> None:
    """Raise NumericalError where `x`, which is `what`, has NaN or infinity; max carries both."""
    if not math.isfinite(float(abs(x).max())):
        raise NumericalError(
            f"found NaN or infinity in {what} at {where}; expected finite numbers. "
            "Try a lower guidance_scale or a precision of fp32, and report the command if it stays"
        )
