"""What training asks of a family: stages, each a task; and what several tasks share."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.data import Images, fit, paint
from runtime.sampling.schedule import COSINE

WEIGHTS = ("uniform", "min-snr", "sigmoid")
# Matrices that Muon updates in R2, SIID and S2ID.
IN_BLOCK = re.compile(r"(encoder|decoder)\.\d+\.(attention|cross|ffn)\.")
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

    def picture(self, height: int, width: int, pad: bool, mode: str = "bilinear") -> Tensor:
        """The images as float32 `[B, c, height, width]` in [-1, 1], resampled by `mode`."""
        image = fit(self.images, height, width, pad, mode)
        return image if self.hues is None else paint(image, self.hues)


@dataclass(frozen=True)
class Group:
    """Parameters by name whose rate is `share` of the configuration's, decayed or not."""

    names: Sequence[str]
    decayed: bool = True
    share: float = 1.0


class Task:
    """One stage of training: the module that learns, what it is given, and its loss.

    Made from the stage's section of the configuration when the stages before it are done.
    """

    model: nn.Module
    token_inputs: ClassVar[tuple[int, ...]] = ()  # inputs whose axis 1 changes between batches

    def __init__(self, config: dict[str, Any], models: Any, images: Images):
        raise NotImplementedError

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """What `loss` takes at a step, after the model."""
        raise NotImplementedError

    def compile_inputs(self) -> None:
        """Compile what is slow in `inputs`, where there is such a thing."""

    @staticmethod
    def loss(model: Any, *inputs: Tensor) -> Tensor:
        """A number to make small."""
        raise NotImplementedError

    def groups(self) -> list[Group]:
        """All parameters, in groups that the optimizer treats alike."""
        return [Group([name for name, _ in self.model.named_parameters()])]

    def is_block_matrix(self, name: str) -> bool:
        """Does Muon, where a configuration asks for it, update this matrix?"""
        raise NotImplementedError

    @staticmethod
    def average_decay(config: dict[str, Any], step: int) -> float:
        """What the average of weights keeps of itself at a step, from 1 on."""
        return min(float(config["ema"]), (1 + step) / (10 + step))


@dataclass(frozen=True)
class Stage:
    """A stage's name, its task, its own keys of a configuration, and what makes a state useless.

    A state belongs to the `sections` of [model] that it was trained with.
    """

    name: str
    task: type[Task]
    keys: frozenset[str]
    sections: tuple[str, ...]


@torch.no_grad()
def take_over(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Copy what fits by name and shape in place; returns the names of those that do not."""
    fresh = [n for n in wanted if n not in found or found[n].shape != wanted[n].shape]
    for name in wanted.keys() - set(fresh):
        wanted[name].copy_(found[name])
    return fresh


def times(count: int) -> Tensor:
    """t `[count]` uniform in [0, 1), one in each `count`-th of it; float64."""
    return (torch.rand(1).double() + torch.arange(count) / count) % 1


def jitter(batch: int, height: int, width: int, share: float, device: torch.device) -> Tensor:
    """What is added to the coordinates of a grid, `[batch, height, width, 4]`.

    `share` of the specification's jitter: Gaussian, σ half a pixel, per sample and pixel.
    """
    longer = max(height, width)
    sigma = torch.tensor([longer, longer, width, height], device=device).reciprocal() * share / 2
    return torch.randn(batch, height, width, 4, device=device) * sigma


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
        slope = math.pi / (1 + COSINE.offset) / (2 * (a * (1 - a)).sqrt())
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


def branches(condition: Tensor, parts: Sequence[int], share: float | str) -> Tensor:
    """Conditions to learn under, `[K, B, labels]`: `share` of them hidden, or "both" ways."""
    if share == "both":
        return torch.stack([torch.zeros_like(condition), condition])
    return hide(condition, parts, float(share)).unsqueeze(0)


def widened(condition: Tensor, labels: int) -> Tensor:
    """Conditions of a data set's names as those of a model's `labels`, the rest zero."""
    return F.pad(condition[:, :labels], (0, max(0, labels - condition.shape[1])))
