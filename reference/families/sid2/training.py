"""How SiD2 learns: v under the sigmoid loss, t spread evenly over a batch."""

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference.data import Images
from reference.families.parts.config import read
from reference.families.parts.training import Stage, Step, Task, branches, take_over, times, widened
from reference.families.sid2.config import SiD2Model
from reference.families.sid2.model import SiD2, SiD2Models
from reference.families.sid2.schedule import schedule_of, sigmoid, slope

IN_BLOCK = re.compile(r"(enc\.\d+|mid|dec\.\d+)\.\d+\.(qkv|proj|ffn1|ffn2)\.weight")
KEYS = frozenset({"betas", "condition_dropout", "loss_bias"})


def weight_v(
    logsnr: NDArray[np.float64], slope: NDArray[np.float64], bias: float
) -> NDArray[np.float64]:
    """What mean (v - v̂)² counts: -½·dλ/dt · sigmoid(b - λ) · sigmoid(λ).

    The same loss counts mean (eps - ε̂)² by this over sigmoid(λ). Source: Kingma and Gao,
    "Understanding Diffusion Objectives as the ELBO", and Hoogeboom et al., arXiv 2410.19324.
    """
    return -slope / 2 * sigmoid(bias - logsnr) * sigmoid(logsnr)


class SiD2Task(Task):
    """-½·dλ/dt · sigmoid(b - λ)·sigmoid(λ) · mean (v - v̂)² with b = `loss_bias`.

    `condition_dropout` hides that share of the labels.
    """

    def __init__(self, config: dict[str, Any], models: SiD2Models, images: Images):
        self.config, self.settings = config, models.config
        self.model = models.sid2
        self.schedule = schedule_of(models.config.schedule, models.config.default_size)
        self.pad, self.parts = images.pad, images.parts

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Noisy image, λ, labels, v and what its error counts."""
        settings, batch, device = self.settings, len(step.images), step.images.device
        image = step.picture(
            settings.default_size[0], settings.default_size[1], self.pad, "bicubic"
        )
        condition = widened(step.condition, settings.labels)
        label = branches(condition, self.parts, self.config["condition_dropout"])[0]
        t = times(batch).numpy()
        levels = self.schedule.log_snr(t)
        weight = weight_v(levels, slope(self.schedule, t), self.config["loss_bias"])
        logsnr, counts = (torch.from_numpy(x).float().to(device) for x in (levels, weight))
        alpha, sigma = (torch.sigmoid(x).sqrt()[:, None, None, None] for x in (logsnr, -logsnr))
        eps = torch.randn_like(image)
        return alpha * image + sigma * eps, logsnr, label, alpha * eps - sigma * image, counts

    @staticmethod
    def loss(model: SiD2, *inputs: Tensor) -> Tensor:
        noisy, logsnr, label, v, weight = inputs
        error = (model(noisy, logsnr, label) - v).square().mean((1, 2, 3))
        return (error * weight).mean()

    def is_block_matrix(self, name: str) -> bool:
        return bool(IN_BLOCK.match(name))


STAGES = (Stage("sid2", SiD2Task, KEYS, ("sid2", "schedule")),)


def build(config: dict[str, Any], source: str) -> SiD2Models:
    """Fresh models; the network starts at v = 0."""
    return SiD2Models(read(SiD2Model, config["model"], source))


def start_from(models: SiD2Models, other: SiD2Models) -> list[str]:
    """Take over the weights that fit; returns the names of those that do not."""
    return take_over(models.state_dict(), other.state_dict())
