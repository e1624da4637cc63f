"""How SIID and S2ID learn: eps under the null and the true label, at one image size."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reference.data import Images
from reference.families.parts.axial import AxialDenoiser, Dropouts, coordinates
from reference.families.parts.text import LabelCondition
from reference.families.parts.training import (
    IN_BLOCK,
    Step,
    Task,
    branches,
    jitter,
    loss_weight,
    times,
    widened,
)
from runtime.errors import UsageError
from runtime.sampling.schedule import COSINE

KEYS = frozenset(
    {"betas", "attention_dropout", "ffn_dropout", "size", "jitter", "loss_weight"}
    | {"condition_dropout", "train_condition"}
)


class Trained(nn.Module):
    """A denoiser and its label condition, which learns only where the configuration says so."""

    def __init__(self, denoiser: AxialDenoiser, condition: LabelCondition):
        super().__init__()
        self.denoiser, self.condition = denoiser, condition


class AxialTask(Task):
    """Weighted MSE of eps at t drawn uniformly, one in each B-th of [0, 1].

    `size` says until which share of the steps images are of which height and width; `jitter` is
    the share of the specified jitter of coordinates. `condition_dropout` hides that share of the
    labels; "both" averages the loss under the null and under the true condition.
    """

    family: ClassVar[str]

    def __init__(self, config: dict[str, Any], models: Any, images: Images):
        denoiser: AxialDenoiser = getattr(models, self.family)
        models.condition.requires_grad_(config["train_condition"])
        self.config, self.model = config, Trained(denoiser, models.condition)
        self.fold = denoiser.fold
        for _, *size in config["size"]:
            if len(size) != 2 or any(side < 1 or side % self.fold for side in size):
                raise UsageError(
                    f"[{self.family}] size has {size}; expected rows of a share of the steps, a "
                    f"height and a width, both multiples of {self.fold}"
                )
        self.labels, self.pad, self.parts = models.config.labels, images.pad, images.parts

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Noisy image, its tokens' coordinates, alpha_bar, labels, the noise, what it counts."""
        c, device, batch = self.config, step.images.device, len(step.images)
        size = step.stage(c["size"])[1:]
        image = step.picture(size[0], size[1], self.pad, "bicubic")
        label = branches(widened(step.condition, self.labels), self.parts, c["condition_dropout"])
        alpha_bar = torch.from_numpy(COSINE.alpha_bar(times(batch).numpy())).float().to(device)
        a = alpha_bar.view(-1, 1, 1, 1)
        eps = torch.randn_like(image)
        noisy = a.sqrt() * image + (1 - a).sqrt() * eps
        height, width = (side // self.fold for side in size)
        at = coordinates(height, width, device)
        if c["jitter"]:
            at = at + jitter(batch, height, width, c["jitter"], device)
        kind, parameter = c["loss_weight"]
        return noisy, at, alpha_bar, label, eps, loss_weight(kind, parameter, alpha_bar)

    @staticmethod
    def loss(model: Trained, *inputs: Tensor) -> Tensor:
        noisy, at, alpha_bar, label, eps, weight = inputs
        predicted = model.denoiser(noisy, alpha_bar, model.condition(label), at)
        return ((predicted - eps).square().mean((-3, -2, -1)) * weight).mean()

    def is_block_matrix(self, name: str) -> bool:
        return bool(IN_BLOCK.search(name))


def dropouts(config: dict[str, Any]) -> Dropouts:
    """Those of a stage's section."""
    return Dropouts(attention=config["attention_dropout"], ffn=config["ffn_dropout"])
