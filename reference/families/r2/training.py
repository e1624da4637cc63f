"""What each stage learns from a batch: its sizes, noise and loss."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import checkpoint
from reference.data import fit
from reference.families.parts.text import LabelCondition
from reference.families.r2.r2id import R2ID
from reference.families.r2.r2ir import R2IR, grid_tokens, tokens_from_grid
from runtime.sampling import schedule


@dataclass(frozen=True)
class Step:
    """What a loss needs besides the model: where it stands and what it may draw from."""

    index: int
    steps: int
    images: Tensor  # uint8 [B, c, s, s]
    labels: Tensor  # [B]
    draw: random.Random  # sizes; tensors are drawn from torch's seeded generator


def draw_size(draw: random.Random, sides: list[int], aspect: float) -> tuple[int, int]:
    """A latent's (height, width): half the time square, sides log-uniform, within `aspect`."""

    def side() -> int:
        low, high = math.log(sides[0] - 0.5), math.log(sides[1] + 0.5)
        return min(max(round(math.exp(draw.uniform(low, high))), sides[0]), sides[1])

    height = width = side()
    while draw.random() < 0.5:
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


class R2IRTask:
    """MSE of an image resampled to a latent of a drawn size and back."""

    token_inputs = (0, 1, 2, 3, 4)  # inputs whose axis 1 changes from batch to batch

    def __init__(self, config: dict[str, Any], models: checkpoint.Models, pad: bool):
        self.config, self.pad = config, pad

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Pixels and their coordinates, latent coordinates, queries and the pixels there."""
        c, device, batch = self.config, step.images.device, len(step.images)
        size = draw_size(step.draw, c["latent"], c["aspect"])
        progress = step.index / step.steps
        side = next((side for until, side in c["images"] if progress < until), c["images"][-1][1])
        height, width = canvas(size, side)
        pixels = wanted = tokens_from_grid(fit(step.images, height, width, self.pad))
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
    """MSE of eps at a uniform t, in latents of a drawn size.

    `condition_dropout` hides that share of the labels; "both" averages the loss under the null
    and under the true condition, as published.
    """

    token_inputs = (0, 1, 4)

    def __init__(self, config: dict[str, Any], models: checkpoint.Models, pad: bool):
        self.config, self.pad, self.r2ir = config, pad, models.r2ir
        self.labels = models.config.condition.labels

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Noisy latent, its coordinates, alpha_bar, labels and the noise in it."""
        c, device = self.config, step.images.device
        size = draw_size(step.draw, c["latent"], c["aspect"])
        image = fit(step.images, *canvas(size, step.images.shape[-1]), self.pad)
        with torch.no_grad():
            latent = tokens_from_grid(self.r2ir.encode(image, size))
        label = F.one_hot(step.labels, self.labels).float()  # [B, labels]
        if c["condition_dropout"] == "both":
            label = torch.stack([torch.zeros_like(label), label])  # [2, B, labels]
        else:
            shown = torch.rand(len(label), 1, device=device) >= c["condition_dropout"]
            label = (label * shown).unsqueeze(0)  # [1, B, labels]
        t = torch.rand(len(latent)).double().numpy()
        alpha_bar = torch.from_numpy(schedule.alpha_bar(t)).float().to(device)
        a = alpha_bar.view(-1, 1, 1)
        eps = torch.randn_like(latent)
        noisy = a.sqrt() * latent + (1 - a).sqrt() * eps
        return noisy, jittered(*size, len(latent), c["jitter"], device), alpha_bar, label, eps

    @staticmethod
    def loss(
        model: R2IDModels,
        noisy: Tensor,
        at: Tensor,
        alpha_bar: Tensor,
        label: Tensor,
        eps: Tensor,
    ) -> Tensor:
        predicted = model.r2id.predict_tokens(noisy, at, alpha_bar, model.condition(label))
        return F.mse_loss(predicted, eps.expand_as(predicted))


Task = R2IRTask | R2IDTask
