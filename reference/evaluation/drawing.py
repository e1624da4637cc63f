"""Digits to be judged: labels, a latent's size and a seed to images and latents."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reference.checkpoint import Models
from reference.classifier import IMAGE_SIDE, SEED
from reference.evaluation.digits import DIGITS, Size, asked, conditions
from reference.families.r2.training import canvas
from runtime.cli import size_name
from runtime.pipeline.pipeline import Pipeline
from runtime.sampling import schedule
from runtime.sampling.ddim import guide, predict_x0
from runtime.sampling.noise import COHERENT, NoiseStreams

TOKENS_AT_ONCE = 4000
START, LAST = 0.995, 0.01  # times of the first and the last evaluation

# Called with the step, the labels' slice and the estimate of x0 `[B, C, H, W]`.
OnEstimate = Callable[[int, slice, Tensor], object]


def batches(count: int, size: Size) -> list[slice]:
    """Slices whose tokens at a latent size fit in a processor's cache."""
    step = max(10, TOKENS_AT_ONCE // (size[0] * size[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True)
class Drawn:
    """images `[B, c, h, w]` and latents `[B, C, H, W]`, on the CPU."""

    images: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Sampling:
    """How digits are drawn where a measure does not say otherwise."""

    steps: int = 12
    guidance_scale: float = 2.0


class Drawing(Protocol):
    """Draws digits, by the models themselves or by their graphs."""

    @property
    def sampling(self) -> Sampling:
        """How it draws by default."""

    def labels(self, count: int) -> Tensor:
        """Labels of `count` digits to be asked for; see `reference.evaluation.digits`."""

    def __call__(
        self,
        labels: Tensor,
        latent: Size,
        image: Size | None = None,
        guidance_scale: float | None = None,
        noise: str = COHERENT,
    ) -> Drawn:
        """One digit per label, image i from noise i of `SEED`.

        `image` is by default of the latent's aspect, its shorter side `IMAGE_SIDE`.
        """

    def decode(self, latents: Tensor, image: Size) -> Tensor:
        """Latents `[B, C, H, W]` -> images `[B, c, *image]`."""


def in_batches(
    draw: Callable[[slice, Callable[[int], object]], Drawn],
    count: int,
    latent: Size,
    steps: int,
    desc: str,
) -> Drawn:
    """What `draw(part, on_step)` makes of each of the `batches`, behind a progress bar."""
    parts = batches(count, latent)
    with tqdm(total=len(parts) * steps, desc=f"{size_name(latent)}{desc}", unit="step") as bar:
        made = [draw(part, lambda _: bar.update()) for part in parts]
    return Drawn(torch.cat([d.images for d in made]), torch.cat([d.latents for d in made]))


@dataclass(frozen=True)
class GraphDrawing:
    """Draws with a bundle's graphs: what users run, and faster on a CPU."""

    pipeline: Pipeline
    sampling: Sampling = field(default_factory=Sampling)
    parts: tuple[int, ...] = (DIGITS,)

    def labels(self, count: int) -> Tensor:
        return asked(count, self.parts)

    def __call__(
        self,
        labels: Tensor,
        latent: Size,
        image: Size | None = None,
        guidance_scale: float | None = None,
        noise: str = COHERENT,
        **more: Any,
    ) -> Drawn:
        """See `Drawing`; `more` is passed to `Pipeline.generate`."""
        own = self.sampling
        scale = own.guidance_scale if guidance_scale is None else guidance_scale

        def draw(part: slice, on_step: Callable[[int], object]) -> Drawn:
            made = self.pipeline.generate(
                labels[part].tolist(),
                latent,
                image or canvas(latent, IMAGE_SIDE),
                own.steps,
                scale,
                seed=SEED,
                first_index=part.start,
                on_step=on_step,
                noise=noise,
                **more,
            )
            return Drawn(torch.from_numpy(made.images), torch.from_numpy(made.latents))

        return in_batches(draw, len(labels), latent, own.steps, f" at guidance {scale:g}")

    def decode(self, latents: Tensor, image: Size) -> Tensor:
        return torch.from_numpy(self.pipeline.decode(latents.numpy(), image))


@dataclass(frozen=True)
class TorchDrawing:
    """Draws with the models themselves, on their device."""

    models: Models
    sampling: Sampling = field(default_factory=Sampling)
    parts: tuple[int, ...] = (DIGITS,)

    def labels(self, count: int) -> Tensor:
        return asked(count, self.parts)

    @torch.inference_mode()
    def __call__(
        self,
        labels: Tensor,
        latent: Size,
        image: Size | None = None,
        guidance_scale: float | None = None,
        noise: str = COHERENT,
        on_estimate: OnEstimate | None = None,
    ) -> Drawn:
        """See `Drawing`; `on_estimate` sees x0 of every step, on the models' device."""
        own = self.sampling
        scale = own.guidance_scale if guidance_scale is None else guidance_scale

        def draw(part: slice, on_step: Callable[[int], object]) -> Drawn:
            def each(step: int, x0: Tensor) -> None:
                on_step(step)
                if on_estimate is not None:
                    on_estimate(step, part, x0)

            x0 = self._sample(labels, part, latent, scale, noise, each)
            return Drawn(self.decode(x0, image or canvas(latent, IMAGE_SIDE)), x0.cpu())

        return in_batches(draw, len(labels), latent, own.steps, f" at guidance {scale:g}")

    @torch.inference_mode()
    def decode(self, latents: Tensor, image: Size) -> Tensor:
        device = next(self.models.parameters()).device
        return self.models.r2ir.decode(latents.to(device), image).cpu()

    def _sample(
        self,
        labels: Tensor,
        part: slice,
        latent: Size,
        scale: float,
        noise: str,
        each: Callable[[int, Tensor], object],
    ) -> Tensor:
        """x0 of `labels[part]`, by DPM-Solver++ of order 3 (Lu et al. 2022, arXiv 2211.01095)."""
        models = self.models
        device = next(models.parameters()).device
        own = conditions(labels[part], models.config.condition.labels).to(device)
        branches, weights = [own], [scale]
        if scale != 1:
            branches, weights = [torch.zeros_like(own), own], [1 - scale, scale]
        text = models.condition(torch.stack(branches))
        shape = (models.config.r2id.latent_channels, *latent)
        streams = NoiseStreams(SEED, range(part.start, part.stop), shape, noise)
        x = torch.from_numpy(streams.draw()).to(device)
        grid = list(_alpha_bars(self.sampling.steps))
        history: list[Tensor] = []
        for index, a in enumerate(grid):
            film = torch.full((len(x),), a, device=device)
            estimate = predict_x0(x, guide(models.r2id(x, film, text), weights), a)
            each(index, estimate)
            if index == len(grid) - 1:
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
