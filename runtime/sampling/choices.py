"""What a request may choose among, by name, and the defaults: known without numpy."""

from typing import NamedTuple


class Solver(NamedTuple):
    """`order` 0 is DDIM as published; then what its evaluations are even in, and how many."""

    order: int
    spacing: str
    steps: int


SOLVERS = {
    "ddim": Solver(0, "time", 50),
    "dpm++2m": Solver(2, "logsnr", 12),
    "dpm++3m": Solver(3, "logsnr", 12),
}
SOLVER = "dpm++3m"  # the default
SPACINGS = ("time", "logsnr", "karras")
WHOLE = (0.0, 1.0)  # the guidance interval that is every t
