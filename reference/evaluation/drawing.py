"""Digits to be judged: labels, a latent's size and a seed to images and latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from reference.classifier import IMAGE_SIDE, SEED
from reference.data import Images
from reference.evaluation.digits import DIGITS, Size, asked, conditions, shown
from reference.families.r2.model import R2Models
from reference.families.r2.training import canvas
from runtime.bundle.interface import CosineData, ScheduleData, size_name
from runtime.pipeline.bundle import Bundle
from runtime.progress import Bar
from runtime.sampling.choices import SOLVER, SOLVERS, WHOLE
from runtime.sampling.guidance import guide
from runtime.sampling.loop import sample
from runtime.sampling.noise import COHERENT, NoiseStreams
from runtime.sampling.schedule import Schedule, log_snr, read
from runtime.sampling.solvers import Table, table

TOKENS_AT_ONCE = 4000

# Called with the step, the labels' slice and the estimate of x0 `[B, C, H, W]`.
OnEstimate = Callable[[int, slice, Tensor], object]
OnStep = Callable[[int, Tensor], object]


def batches(count: int, size: Size) -> list[slice]:
    """Slices whose tokens at a latent size fit in a processor's cache."""
    step = max(1, TOKENS_AT_ONCE // (size[0] * size[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass(frozen=True)
class Drawn:
    """images `[B, c, h, w]` and latents `[B, C, H, W]`, on the CPU."""

    images: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Sampling:
    """How digits are drawn where a measure does not say otherwise; fields as of `Request`."""

    solver: str = SOLVER
    steps: int | None = None
    guidance_scale: float = 2.0
    guidance_interval: tuple[float, float] = WHOLE

    @property
    def count(self) -> int:
        """The number of evaluations."""
        return self.steps or SOLVERS[self.solver].steps

    def table(self, schedule: Schedule) -> Table:
        """What PyTorch models are sampled by."""
        return table(self.solver, schedule, self.count)

    def scales(self, table: Table, schedule: Schedule, scale: float) -> list[float]:
        """The guidance scale of each step of a table: `scale` within the interval, else 1."""
        (low, high), times = self.guidance_interval, schedule.time(log_snr(table.alpha_bar[:-1]))
        return [scale if low <= t <= high else 1.0 for t in times]


class Drawing(Protocol):
    """Draws digits, by the models themselves or by their graphs."""

    @property
    def sampling(self) -> Sampling:
        """How it draws by default."""

    @property
    def decoupled(self) -> bool:
        """Whether what is diffused is decoded to an image of any size; else it is the image."""

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
        """One digit per label, image i from noise i of `SEED`; `image` by default as `shape`."""

    def decode(self, latents: Tensor, image: Size) -> Tensor:
        """Latents `[B, C, H, W]` -> images `[B, c, *image]`."""


def shape(draw: Drawing, latent: Size) -> Size:
    """The size of the images that are judged: of the latent's aspect, the shorter side
    `IMAGE_SIDE`; where pixels are diffused, the latent's own."""
    return canvas(latent, IMAGE_SIDE) if draw.decoupled else latent


def in_batches(
    draw: Callable[[slice, Callable[[object], object]], Drawn],
    count: int,
    latent: Size,
    steps: int,
    desc: str,
) -> Drawn:
    """What `draw(part, on_step)` makes of each of the `batches`, behind a progress bar."""
    parts = batches(count, latent)
    with Bar(total=len(parts) * steps, desc=f"{size_name(latent)}{desc}", unit="step") as bar:

        def on_step(_: object) -> None:  # what update gives would stop a run
            bar.update()

        made = [draw(part, on_step) for part in parts]
    return Drawn(torch.cat([d.images for d in made]), torch.cat([d.latents for d in made]))


@dataclass(frozen=True)
class GraphDrawing:
    """Draws with a bundle's graphs: what users run, and faster on a CPU."""

    pipeline: Bundle
    sampling: Sampling = field(default_factory=Sampling)
    parts: tuple[int, ...] = (DIGITS,)

    @property
    def decoupled(self) -> bool:
        return self.pipeline.interface.decoupled

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
        """See `Drawing`; `more` is passed to `Bundle.generate`."""
        own = self.sampling
        scale = own.guidance_scale if guidance_scale is None else guidance_scale

        def draw(part: slice, on_step: Callable[[object], object]) -> Drawn:
            made = self.pipeline.generate(
                [*map(tuple, labels[part].view(part.stop - part.start, -1).tolist())],
                latent,
                on_step,
                image=image or shape(self, latent),
                solver=own.solver,
                steps=own.count,
                guidance_scale=scale,
                guidance_interval=own.guidance_interval,
                seed=SEED,
                first_index=part.start,
                noise=noise,
                **more,
            )
            return Drawn(torch.from_numpy(made.images), torch.from_numpy(made.latents))

        return in_batches(draw, len(labels), latent, own.count, f" at guidance {scale:g}")

    def decode(self, latents: Tensor, image: Size) -> Tensor:
        return torch.from_numpy(self.pipeline.decode(latents.numpy(), image))


@dataclass(frozen=True)
class TorchDrawing:
    """Draws with the models themselves, on their device, over the schedule of their bundle."""

    models: Any
    sampling: Sampling = field(default_factory=Sampling)
    parts: tuple[int, ...] = (DIGITS,)
    schedule: ScheduleData = field(default_factory=CosineData)

    @property
    def decoupled(self) -> bool:
        return isinstance(self.models, R2Models)

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

        def draw(part: slice, on_step: Callable[[object], object]) -> Drawn:
            def each(step: int, x0: Tensor) -> None:
                on_step(step)
                if on_estimate is not None:
                    on_estimate(step, part, x0)

            x0 = self._sample(labels, part, latent, scale, noise, each)
            return Drawn(self.decode(x0, image or shape(self, latent)), x0.cpu())

        return in_batches(draw, len(labels), latent, own.count, f" at guidance {scale:g}")

    @torch.inference_mode()
    def encode(self, images: Images, chosen: Tensor | slice, latent: Size) -> Tensor:
        """What is diffused of real digits at a latent's size and aspect, `[N, C, *latent]`."""
        pixels = shown(images, chosen, shape(self, latent))
        pixels = pixels.to(next(self.models.parameters()).device)
        return self.models.r2ir.encode(pixels, latent) if self.decoupled else pixels

    @torch.inference_mode()
    def decode(self, latents: Tensor, image: Size) -> Tensor:
        if not self.decoupled:
            return latents.clamp(-1, 1).cpu()
        device = next(self.models.parameters()).device
        return self.models.r2ir.decode(latents.to(device), image).cpu()

    def _sample(
        self, labels: Tensor, part: slice, size: Size, scale: float, noise: str, each: OnStep
    ) -> Tensor:
        """The latents of `labels[part]` at a latent size; `each(step, x0)` is called per step."""
        models, device = self.models, next(self.models.parameters()).device
        own = conditions(labels[part], models.config.labels).to(device)
        schedule = read(self.schedule, size)
        table = self.sampling.table(schedule)
        both = models.denoiser(torch.stack([torch.zeros_like(own), own]), table.alpha_bar)
        alone = models.denoiser(own.unsqueeze(0), table.alpha_bar)
        scales = self.sampling.scales(table, schedule, scale)

        def predict(x: Tensor, step: int) -> Tensor:
            g = scales[step]
            eps = alone(x, step)[0] if g == 1 else guide(both(x, step), (1 - g, g))
            p, q = map(float, table.rows[step, :2])
            each(step, p * x + q * eps)
            return eps

        config = models.config
        channels = config.r2id.latent_channels if self.decoupled else config.channels
        streams = NoiseStreams(SEED, range(part.start, part.stop), (channels, *size), noise)
        found: Tensor = sample(predict, torch.from_numpy(streams.draw()).to(device), table)
        return found
