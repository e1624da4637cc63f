"""What each stage learns from a batch: its sizes, noise and loss."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reference import checkpoint
from reference.data import Images, fit, paint
from reference.families.parts.text import LabelCondition
from reference.families.r2.r2id import R2ID
from reference.families.r2.r2ir import R2IR, Summary, grid_tokens, tokens_from_grid
from runtime.sampling import schedule

SUMMARISED_AT_ONCE = 256  # images
LEAST_ALPHA_BAR = 4.54e-5  # sigmoid(-10), where the sigmoid weight's schedule ends


@dataclass(frozen=True)
class Step:
    """What a loss needs besides the model: where it stands and what it may draw from.

    `chosen` are the images' numbers in the data set, `hues` those to paint them in, if any.
    """

    index: int
    steps: int
    images: Tensor  # uint8 [B, c, s, s]
    condition: Tensor  # [B, labels], a one for each part of what is drawn
    draw: random.Random  # sizes; tensors are drawn from torch's seeded generator
    chosen: Tensor  # [B]
    hues: Tensor | None = None  # [B, 2]

    def stage(self, table: Sequence[Sequence[Any]]) -> Sequence[Any]:
        """The row of `table` that holds now; a row begins with the share of steps it ends at."""
        progress = self.index / self.steps
        return next((row for row in table if progress < row[0]), table[-1])

    def picture(self, height: int, width: int, pad: bool) -> Tensor:
        """The images as float32 `[B, c, height, width]` in [-1, 1]."""
        image = fit(self.images, height, width, pad)
        return image if self.hues is None else paint(image, self.hues)


def draw_size(
    draw: random.Random, sides: Sequence[int], aspect: float, square: float
) -> tuple[int, int]:
    """A latent's (height, width): sides log-uniform, within `aspect`, at least `square` square."""

    def side() -> int:
        low, high = math.log(sides[0] - 0.5), math.log(sides[1] + 0.5)
        return min(max(round(math.exp(draw.uniform(low, high))), sides[0]), sides[1])

    height = width = side()
    while draw.random() >= square:
        height, width = side(), side()
        if max(height, width) <= aspect * min(height, width):
            break
        height = width
    return height, width


def canvas(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Image (height, width) of the same aspect as latent `size`; its shorter side is `side`."""
    shorter = min(size)
    return round(side * size[0] / shorter), round(side * size[1] / shorter)


def jittered(height: int, width: int, batch: int, share: float, device: torch.device) -> Tensor:
    """Coordinates `[batch, height · width, 4]` with `share` of the specified jitter.

    Source: the specification's "Coordinates": σ is half a pixel, per sample and pixel.
    """
    plain = grid_tokens(height, width, device)
    longer = max(height, width)
    sigma = torch.tensor([longer, longer, width, height], device=device).reciprocal() * share / 2
    return plain + torch.randn(batch, *plain.shape[1:], device=device) * sigma


def loss_weight(kind: str, parameter: float, alpha_bar: Tensor) -> Tensor:
    """What the squared error of eps counts at alpha_bar `[B]`; t is drawn uniformly.

    `uniform` counts all alike. `min-snr` is min(SNR, parameter) / SNR: Hang et al., "Efficient
    Diffusion Training via Min-SNR Weighting Strategy", eq. 6. `sigmoid` is
    -dλ/dt / 2 · sigmoid(parameter - λ) of the log SNR λ: Hoogeboom et al., "Simpler Diffusion".
    """
    a = alpha_bar.clamp(min=LEAST_ALPHA_BAR)
    snr = a / (1 - a)
    if kind == "min-snr":
        return snr.clamp(max=parameter) / snr
    if kind == "sigmoid":  # the cosine schedule's λ = 2·log cot u has dλ/du = -4 / sin 2u
        slope = math.pi / (1 + schedule.OFFSET) / (2 * (a * (1 - a)).sqrt())
        return slope * torch.sigmoid(parameter - snr.log())
    return torch.ones_like(a)


def hide(condition: Tensor, parts: Sequence[int], share: float) -> Tensor:
    """Conditions `[B, labels]` with `share` of them hidden whole.

    Where they have several parts, `share` of each part is hidden as well.
    """
    shown = torch.rand(len(condition), 1) >= share
    if len(parts) == 1:
        return condition * shown.to(condition.device)
    each = torch.rand(len(condition), len(parts)) >= share
    spread = each.repeat_interleave(torch.tensor(parts), 1) & shown
    return condition * spread.to(condition.device)


class R2IRTask:
    """MSE of an image resampled to a latent of a drawn size and back."""

    token_inputs = (0, 1, 2, 3, 4)  # inputs whose axis 1 changes from batch to batch

    def __init__(self, config: dict[str, Any], models: checkpoint.Models, images: Images):
        self.config, self.pad = config, images.pad

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Pixels and their coordinates, latent coordinates, queries and the pixels there."""
        c, device, batch = self.config, step.images.device, len(step.images)
        size = draw_size(step.draw, step.stage(c["latent"])[1:], c["aspect"], c["square"])
        height, width = canvas(size, step.stage(c["images"])[1])
        pixels = wanted = tokens_from_grid(step.picture(height, width, self.pad))
        image_at = jittered(height, width, batch, c["jitter"], device)
        latent_at = jittered(*size, batch, c["jitter"], device)
        query_at = jittered(height, width, batch, c["jitter"], device)
        if 0 < c["queries"] < height * width:
            chosen = torch.randperm(height * width, device=device)[: c["queries"]]
            query_at, wanted = query_at[:, chosen], pixels[:, chosen]
        return pixels, image_at, latent_at, query_at, wanted

    @staticmethod
    def loss(
        model: R2IR,
        pixels: Tensor,
        image_at: Tensor,
        latent_at: Tensor,
        query_at: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        latent = model.encode_tokens(pixels, image_at, latent_at)
        return F.mse_loss(model.decode_tokens(latent, latent_at, query_at), wanted)


class R2IDModels(nn.Module):
    """R2ID and the condition, which are trained together."""

    def __init__(self, models: checkpoint.Models):
        super().__init__()
        self.r2id: R2ID = models.r2id
        self.condition: LabelCondition = models.condition


class R2IDTask:
    """Weighted MSE of eps at t drawn uniformly, one in each B-th of [0, 1], at a drawn size.

    `condition_dropout` hides that share of the labels; "both" averages the loss under the null
    and under the true condition, as published.
    """

    token_inputs = (0, 1, 4)

    def __init__(self, config: dict[str, Any], models: checkpoint.Models, images: Images):
        self.config, self.r2ir = config, models.r2ir
        self.pad, self.parts = images.pad, images.parts
        self.side = images.pixels.shape[-1]
        kept = config["keep_summaries"] and not images.painted
        self.summaries = summaries(models.r2ir, images) if kept else None

    def latent(self, step: Step, size: tuple[int, int]) -> Tensor:
        """The images as latent tokens `[B, N, C]`; square ones from kept summaries."""
        shape = canvas(size, self.side)
        with torch.no_grad():
            if self.summaries is not None and shape == (self.side, self.side):
                chosen = step.chosen
                own = [(kv[chosen].float(), k[chosen].float()) for kv, k in self.summaries]
                return self.r2ir.encode_summary(own, grid_tokens(*size, chosen.device))
            return tokens_from_grid(self.r2ir.encode(step.picture(*shape, self.pad), size))

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Noisy latent, its coordinates, alpha_bar, labels, the noise in it and what it counts."""
        c, device = self.config, step.images.device
        size = draw_size(step.draw, step.stage(c["latent"])[1:], c["aspect"], c["square"])
        latent = self.latent(step, size)
        label = step.condition
        if c["condition_dropout"] == "both":
            label = torch.stack([torch.zeros_like(label), label])  # [2, B, labels]
        else:
            label = hide(label, self.parts, c["condition_dropout"]).unsqueeze(0)  # [1, B, labels]
        t = (torch.rand(1).double() + torch.arange(len(latent)) / len(latent)) % 1
        alpha_bar = torch.from_numpy(schedule.alpha_bar(t.numpy())).float().to(device)
        a = alpha_bar.view(-1, 1, 1)
        eps = torch.randn_like(latent)
        noisy = a.sqrt() * latent + (1 - a).sqrt() * eps
        at = jittered(*size, len(latent), c["jitter"], device)
        kind, parameter = c["loss_weight"]
        return noisy, at, alpha_bar, label, eps, loss_weight(kind, parameter, alpha_bar)

    @staticmethod
    def loss(
        model: R2IDModels,
        noisy: Tensor,
        at: Tensor,
        alpha_bar: Tensor,
        label: Tensor,
        eps: Tensor,
        weight: Tensor,
    ) -> Tensor:
        predicted = model.r2id.predict_tokens(noisy, at, alpha_bar, model.condition(label))
        return ((predicted - eps).square().mean((-2, -1)) * weight).mean()


@torch.no_grad()
def summaries(r2ir: R2IR, images: Images) -> Summary:
    """Of every image at its own size, in float16: what an encode reads, whatever the latent's size.

    They count relative to each other alone, so that they are means here, which float16 holds.
    """
    count, side = len(images), images.pixels.shape[-1]
    at = grid_tokens(side, side, images.pixels.device)
    parts = []
    for start in tqdm(range(0, count, SUMMARISED_AT_ONCE), desc="summaries", unit="batch"):
        pixels = fit(images.pixels[start : start + SUMMARISED_AT_ONCE], side, side, images.pad)
        own = r2ir.summarise(tokens_from_grid(pixels), at)
        parts.append([((kv / side**2).half(), (k / side**2).half()) for kv, k in own])
    return [
        (torch.cat([kv for kv, _ in block]), torch.cat([k for _, k in block]))
        for block in zip(*parts, strict=True)
    ]


Task = R2IRTask | R2IDTask
