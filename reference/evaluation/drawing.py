"""Digits to be judged: labels, a latent's size and a seed to images and latents."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference.checkpoint import Models
from reference.classifier import IMAGE_SIDE, SEED
from reference.families.r2.training import canvas
from runtime.cli import size_name
from runtime.sampling import schedule
from runtime.sampling.ddim import guide, predict_x0
from runtime.sampling.noise import COHERENT, NoiseStreams

TOKENS_AT_ONCE = 4000
START, LAST = 0.995, 0.01  # times of the first and the last evaluation

Size = tuple[int, int]


def batches(count: int, size: Size) -> list[slice]:
    """Slices whose tokens at a latent size fit in a processor's cache."""
    step = max(10, TOKENS_AT_ONCE // (size[0] * size[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True)
class TorchDrawing:
    """Draws with the models themselves, on their device."""

    models: Models
    steps: int = 12

    def __call__(
        self, labels: Tensor, latent: Size, guidance: float, image: Size | None = None
    ) -> tuple[Tensor, Tensor]:
        """One digit per label `[B]`: images `[B, c, *image]` and latents `[B, C, *latent]`.

        Both on the CPU; `image` is of the latent's aspect, its shorter side `IMAGE_SIDE`.
        """
        made: list[tuple[Tensor, Tensor]] = []
        parts = batches(len(labels), latent)
        desc = f"{size_name(latent)} at guidance {guidance:g}"
        with tqdm(total=len(parts) * self.steps, desc=desc, unit="step") as bar:
            for part in parts:
                x0 = self._sample(labels, part, latent, guidance, bar.update)
                shape = image or canvas(latent, IMAGE_SIDE)
                made.append((self.models.r2ir.decode(x0, shape).cpu(), x0.cpu()))
        images, latents = zip(*made, strict=True)
        return torch.cat(images), torch.cat(latents)

    def _sample(
        self,
        labels: Tensor,
        part: slice,
        latent: Size,
        guidance: float,
        on_step: Callable[[], object],
    ) -> Tensor:
        """x0 of `labels[part]`, by DPM-Solver++ of order 3 (Lu et al. 2022, arXiv 2211.01095)."""
        models = self.models
        device = next(models.parameters()).device
        own = F.one_hot(labels[part], models.config.condition.labels).float().to(device)
        branches, weights = [own], [guidance]
        if guidance != 1:
            branches, weights = [torch.zeros_like(own), own], [1 - guidance, guidance]
        text = models.condition(torch.stack(branches))
        shape = (models.config.r2id.latent_channels, *latent)
        streams = NoiseStreams(SEED, range(part.start, part.stop), shape, COHERENT)
        x = torch.from_numpy(streams.draw()).to(device)
        grid = list(_alpha_bars(self.steps))
        history: list[Tensor] = []
        for index, a in enumerate(grid):
            film = torch.full((len(x),), a, device=device)
            estimate = predict_x0(x, guide(models.r2id(x, film, text), weights), a)
            on_step()
            if index == self.steps - 1:
                break
            history = [estimate, *history[:2]]
            x = _step(x, history, grid[max(0, index - 2) : index + 2])
        return estimate


def _log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _alpha_bars(steps: int) -> Iterator[float]:
    """alpha_bar of each evaluation: λ uniform from `START` to `LAST`."""
    first, last = (_log_snr(float(schedule.alpha_bar(np.array(t)))) for t in (START, LAST))
    for value in np.linspace(first, last, steps) if steps > 1 else [first]:
        yield float(1 / (1 + math.exp(-2 * value)))


def _step(x: Tensor, history: list[Tensor], grid: list[float]) -> Tensor:
    """x at the last of `grid` (alpha_bars) from x at the one before; newest estimate first."""
    lambdas = [_log_snr(a) for a in grid]
    now, onward = grid[-2:]
    h = lambdas[-1] - lambdas[-2]
    alpha = math.sqrt(onward)
    shrink = math.expm1(-h)
    x = x * (math.sqrt(1 - onward) / math.sqrt(1 - now)) - history[0] * (alpha * shrink)
    if len(history) == 1:
        return x
    r0 = (lambdas[-2] - lambdas[-3]) / h
    d0 = (history[0] - history[1]) / r0
    if len(history) == 2:
        return x - d0 * (alpha * shrink / 2)
    r1 = (lambdas[-3] - lambdas[-4]) / h
    d1 = (history[1] - history[2]) / r1
    first = d0 + (d0 - d1) * (r0 / (r0 + r1))
    second = (d0 - d1) / (r0 + r1)
    phi_2, phi_3 = shrink / h + 1, (shrink + h) / h**2 - 0.5
    return x + first * (alpha * phi_2) - second * (alpha * phi_3)
