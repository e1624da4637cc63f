"""Golden files: what the published implementations compute, and what of it was compared."""

import argparse
import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from reference.families.parts.published import Published

FOLDER = Path(__file__).parents[2] / "golden"


class Golden:
    """A golden file's tensors and settings; `close` keeps account of what was compared."""

    def __init__(self, name: str):
        self.path = FOLDER / f"{name}.safetensors"
        with safe_open(self.path, "pt") as file:
            self.tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            self.meta: dict[str, Any] = {
                k: json.loads(v) for k, v in file.metadata().items() if v[0] in "{0123456789"
            }
        self.compared: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def state(self, part: str = "") -> Published:
        """The state dict `state.<part>.*` as a published file."""
        prefix = f"state.{part}." if part else "state."
        tensors = {k.removeprefix(prefix): v for k, v in self.tensors.items() if prefix in k}
        self.compared |= {k for k in self.tensors if k.startswith(prefix)}
        return Published(Path(f"{part}.pt"), tensors, self.meta.get(part))

    def named(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        pairs = [(m, t) for k, t in self.tensors.items() if (m := re.fullmatch(pattern, k))]
        assert pairs, pattern
        return pairs

    def close(self, found: Tensor, name: str, tolerance: float) -> None:
        """Within `tolerance` of the largest value of the tensor `name`."""
        wanted = self.tensors[name]
        assert found.shape == wanted.shape, name
        largest = wanted.abs().max().clamp_min(1e-30)
        error = ((found - wanted).abs().max() / largest).item()
        assert error <= tolerance, f"{name}: {error:.2e}"
        self.compared.add(name)

    def rest(self, *inputs: str) -> set[str]:
        """What was neither compared nor is one of the `inputs`, patterns of whole names."""
        given = re.compile("|".join(inputs))
        return {k for k in self.tensors if not given.fullmatch(k)} - self.compared


Denoise = Callable[[Tensor, int], Tensor]  # eps [K, B, ...] of x at a step


def cosine_alpha_bar(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """cos²((t + 0.008)/1.008 · π/2), not below 1e-6."""
    return np.maximum(np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2, 1e-6)


def walk(
    denoise: Denoise,
    x: Tensor,
    alpha_bars: NDArray[np.float64],
    guidance: float,
    eta: float,
    noise: Tensor,
    interval: tuple[float, float] = (0.0, math.inf),
    clip: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DDIM as the pages write it: the sample, the last step's x0 and its guided eps.

    Guidance holds where the noise level √((1 - a)/a) is within `interval`; `clip` clamps x0.
    """
    x0 = eps = x
    for step, (a, after) in enumerate(pairwise(map(float, alpha_bars))):
        g = guidance if interval[0] < math.sqrt((1 - a) / a) <= interval[1] else 1.0
        null, cond = denoise(x, step)
        eps = null * (1 - g) + cond * g
        x0 = (x - math.sqrt(1 - a) * eps) / (math.sqrt(a) + 1e-6)
        x0 = x0.clamp(-1, 1) if clip else x0
        direction = (x - math.sqrt(a) * x0) / (math.sqrt(1 - a) + 1e-6)
        posterior, fresh = (1 - after) / (1 - a + 1e-6), 1 - a / (after + 1e-6)
        spread = eta * math.sqrt(max(0.0, posterior) * max(0.0, fresh))
        x = math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - spread**2)) * direction
        x = x + spread * noise[step]
    return x, x0, eps


def options(**given: Any) -> argparse.Namespace:
    """The command line's options of a conversion."""
    return argparse.Namespace(**{"name": "golden", "heads": None, "fold": None} | given)
