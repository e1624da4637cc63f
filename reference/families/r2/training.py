"""What each stage learns from a batch: its sizes, noise and loss."""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.data import Images
from reference.families.parts.config import read
from reference.families.parts.text import LabelCondition
from reference.families.parts.training import (
    IN_BLOCK,
    Stage,
    Step,
    Task,
    branches,
    jitter,
    loss_weight,
    times,
    widened,
)
from reference.families.r2.config import ModelConfig
from reference.families.r2.initialisation import initialise_r2id, initialise_r2ir
from reference.families.r2.initialisation import start_from as start_from  # what --init calls
from reference.families.r2.model import R2Models
from reference.families.r2.r2id import R2ID
from reference.families.r2.r2ir import R2IR, Summary, grid_tokens, tokens_from_grid
from runtime.sampling.schedule import COSINE

DROPOUTS = ("attention_dropout", "cross_dropout", "ffn_dropout")
KEYS = frozenset({"attention_dropout", "ffn_dropout", "jitter", "latent", "aspect", "square"})


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
    return plain + jitter(batch, height, width, share, device).flatten(1, 2)


class R2Task(Task):
    """Muon updates the matrices inside the blocks."""

    def is_block_matrix(self, name: str) -> bool:
        return bool(IN_BLOCK.search(name))


class R2IRTask(R2Task):
    """MSE of an image resampled to a latent of a drawn size and back."""

    token_inputs = (0, 1, 2, 3, 4)  # inputs whose axis 1 changes from batch to batch

    def __init__(self, config: dict[str, Any], models: R2Models, images: Images):
        self.config, self.pad, self.model = config, images.pad, models.r2ir

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
    def loss(model: R2IR, *inputs: Tensor) -> Tensor:
        pixels, image_at, latent_at, query_at, wanted = inputs
        latent = model.encode_tokens(pixels, image_at, latent_at)
        return F.mse_loss(model.decode_tokens(latent, latent_at, query_at), wanted)


class R2IDModels(nn.Module):
    """R2ID and the condition, which are trained together."""

    def __init__(self, models: R2Models):
        super().__init__()
        self.r2id: R2ID = models.r2id
        self.condition: LabelCondition = models.condition


class R2IDTask(R2Task):
    """Weighted MSE of eps at t drawn uniformly, one in each B-th of [0, 1], at a drawn size.

    `condition_dropout` hides that share of the labels; "both" averages the loss under the null
    and under the true condition, as published.
    """

    token_inputs = (0, 1, 4)

    def __init__(self, config: dict[str, Any], models: R2Models, images: Images):
        self.config, self.r2ir = config, models.r2ir.requires_grad_(False)
        self.model, self.labels = R2IDModels(models), models.config.condition.labels
        self.pad, self.parts = images.pad, images.parts
        self.side = images.pixels.shape[-1]
        self.encode_tokens = models.r2ir.encode_tokens
        self.summaries: Summaries | None = None
        if config["keep_summaries"] and not images.painted:
            self.summaries = Summaries(models.r2ir, len(images), images.pixels.device)

    def latent(self, step: Step, size: tuple[int, int]) -> Tensor:
        """The images as latent tokens `[B, N, C]`; square ones from kept summaries."""
        shape = canvas(size, self.side)
        with torch.no_grad():
            picture = step.picture(*shape, self.pad)
            if self.summaries is not None and shape == (self.side, self.side):
                own = self.summaries.of(step.chosen, picture)
                return self.r2ir.encode_summary(own, grid_tokens(*size, picture.device))
            at, to = (grid_tokens(*s, picture.device) for s in (shape, size))
            return self.encode_tokens(tokens_from_grid(picture), at, to)

    def compile_inputs(self) -> None:
        self.encode_tokens = torch.compile(self.r2ir.encode_tokens, dynamic=True)

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Noisy latent, its coordinates, alpha_bar, labels, the noise in it and what it counts."""
        c, device = self.config, step.images.device
        size = draw_size(step.draw, step.stage(c["latent"])[1:], c["aspect"], c["square"])
        latent = self.latent(step, size)
        label = branches(widened(step.condition, self.labels), self.parts, c["condition_dropout"])
        t = times(len(latent))
        alpha_bar = torch.from_numpy(COSINE.alpha_bar(t.numpy())).float().to(device)
        a = alpha_bar.view(-1, 1, 1)
        eps = torch.randn_like(latent)
        noisy = a.sqrt() * latent + (1 - a).sqrt() * eps
        at = jittered(*size, len(latent), c["jitter"], device)
        kind, parameter = c["loss_weight"]
        return noisy, at, alpha_bar, label, eps, loss_weight(kind, parameter, alpha_bar)

    @staticmethod
    def loss(model: R2IDModels, *inputs: Tensor) -> Tensor:
        noisy, at, alpha_bar, label, eps, weight = inputs
        predicted = model.r2id.predict_tokens(noisy, at, alpha_bar, model.condition(label))
        return ((predicted - eps).square().mean((-2, -1)) * weight).mean()


class Summaries:
    """What an encode reads of images at their own size, each computed when it is first asked for.

    Sums count relative to each other alone, so that they are kept as means, which float16 holds.
    One image at a time: the bits of a sum then do not depend on the batch that asked for it.
    """

    def __init__(self, r2ir: R2IR, count: int, device: torch.device):
        c = r2ir.config
        shape = (count, c.heads, c.width // c.heads)
        self.r2ir = r2ir
        self.kept: Summary = [
            (
                torch.empty(*shape, shape[-1], dtype=torch.float16, device=device),
                torch.empty(shape, dtype=torch.float16, device=device),
            )
            for _ in range(c.encoder_blocks)
        ]
        self.known = torch.zeros(count, dtype=torch.bool)

    def of(self, chosen: Tensor, pixels: Tensor) -> Summary:
        """Of the images numbered `chosen` `[B]`, whose pixels are `[B, c, s, s]` in [-1, 1]."""
        side = pixels.shape[-1]
        at = grid_tokens(side, side, pixels.device)
        for number, own in zip(chosen.tolist(), pixels.split(1), strict=True):
            if not self.known[number]:
                found = self.r2ir.summarise(tokens_from_grid(own), at)
                for (kv, k), (own_kv, own_k) in zip(self.kept, found, strict=True):
                    kv[number], k[number] = own_kv[0] / side**2, own_k[0] / side**2
                self.known[number] = True
        return [(kv[chosen].float(), k[chosen].float()) for kv, k in self.kept]


STAGES = (
    Stage("r2ir", R2IRTask, KEYS | {"queries", "images"}, ("r2ir",)),
    Stage(
        "r2id",
        R2IDTask,
        KEYS | {"cross_dropout", "condition_dropout", "loss_weight", "keep_summaries"},
        ("r2ir", "r2id"),
    ),
)


def build(config: dict[str, Any], source: str) -> R2Models:
    """Fresh models with the configuration's dropouts, initialised from torch's generator."""
    dropouts = {
        stage.name: {key: config[stage.name][key] for key in DROPOUTS if key in config[stage.name]}
        for stage in STAGES
    }
    models = R2Models(read(ModelConfig, config["model"], source), **dropouts)
    initialise_r2ir(models.r2ir)
    initialise_r2id(models.r2id)
    return models
