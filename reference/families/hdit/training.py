"""How HDiT is trained: x0 at noise levels spread over what every resolution sees."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.data import Images
from reference.families.hdit.augmentation import augmented
from reference.families.hdit.config import HDiTModel
from reference.families.hdit.model import AUGMENTATIONS, HDiT, HDiTModels, scalings
from reference.families.parts.config import read
from reference.families.parts.training import (
    Group,
    Stage,
    Step,
    Task,
    branches,
    take_over,
    times,
    widened,
)

NOISE_LOW = 32  # side of the smallest resolution whose noise levels are covered
SIGMA_RANGE = (1e-3, 1e3)  # at least, of the density's ends
MAPPING_SHARE = 1 / 3  # of the learning rate
DECAYED = ("_proj.weight", "proj.weight", "norm.linear.weight")
EMBEDDINGS = ("time_in_proj.", "aug_in_proj.", "mapping_cond_in_proj.", "class_emb.")
KEYS = frozenset({"betas", "augmentation", "condition_dropout", "average_power"})


def density(u: Tensor, config: HDiTModel) -> Tensor:
    """σ of u in [0, 1], float64: `cosine-interpolated` of the paper, u = 0 being the most noise.

    Log SNRs of the cosine schedules of a picture of side 32 and of the training size, the share u
    of the latter.
    """
    d, side = config.hdit.sigma_data, max(config.default_size)
    low = min(config.sigma_min, SIGMA_RANGE[0])
    high = max(config.sigma_max, SIGMA_RANGE[1])
    least, most = -2 * math.log(high / d), -2 * math.log(low / d)

    def log_snr(resolution: float) -> Tensor:
        shift = 2 * math.log(resolution / side)
        start, end = (math.atan(math.exp(-(limit - shift) / 2)) for limit in (least, most))
        return -2 * torch.log(torch.tan(start * (1 - u) + end * u)) + shift

    mixed = (1 - u) * log_snr(NOISE_LOW) + u * log_snr(side)
    return d * torch.exp(-mixed / 2)


class HDiTTask(Task):
    """mean (D - x0)² / (σ² + d²): the soft min-SNR weight.

    `augmentation` is the probability of each change of the image but mirroring, which at
    probabilities above 0 half of the images undergo; `condition_dropout` hides that share of the
    labels; `average_power` rules how fast the average of weights forgets.
    """

    def __init__(self, config: dict[str, Any], models: HDiTModels, images: Images):
        self.config, self.settings = config, models.config
        self.model = models.hdit
        self.pad, self.parts = images.pad, images.parts

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """Images, σ, noise, labels and what the network is told of the augmentation."""
        c, settings, batch = self.config, self.settings, len(step.images)
        image = step.picture(
            settings.default_size[0], settings.default_size[1], self.pad, "bicubic"
        )
        told = image.new_zeros(batch, AUGMENTATIONS)
        if c["augmentation"]:
            image, told = augmented(image, c["augmentation"])
        condition = widened(step.condition, settings.labels)
        label = branches(condition, self.parts, c["condition_dropout"])[0]
        sigma = density(times(batch), settings).float().to(image.device)
        return image, sigma, torch.randn_like(image), label, told

    @staticmethod
    def loss(model: HDiT, *inputs: Tensor) -> Tensor:
        image, sigma, noise, label, told = inputs
        return losses(model, image, sigma, noise, label, told).mean()

    def groups(self) -> list[Group]:
        """The mapping network and the gains learn at a third; linear maps alone decay."""
        parts: dict[tuple[bool, float], list[str]] = {}
        for name, _ in self.model.named_parameters():
            slow = name.startswith("mapping.") or ".norm.linear." in name
            decayed = name.endswith(DECAYED) and not name.startswith(EMBEDDINGS)
            parts.setdefault((decayed, MAPPING_SHARE if slow else 1.0), []).append(name)
        return [Group(names, *kind) for kind, names in parts.items()]

    def is_block_matrix(self, name: str) -> bool:
        return "_level" in name and name.endswith("_proj.weight")

    @staticmethod
    def average_decay(config: dict[str, Any], step: int) -> float:
        return min(float(config["ema"]), 1 - float((1 + step) ** -config["average_power"]))


def losses(
    model: HDiT, image: Tensor, sigma: Tensor, noise: Tensor, label: Tensor, told: Tensor | None
) -> Tensor:
    """Each sample's loss, `[B]`; the network's error F - (x0 - c_skip·x)/c_out, weighted."""
    d = model.config.sigma_data
    cond = model.condition(sigma.log() / 4, label, told)
    skip, out, scale, _ = scalings(sigma, d)[..., None, None, None]
    x = image + sigma[:, None, None, None] * noise
    error = model(scale * x, cond) - (image - skip * x) / out
    weight = (sigma * d / (sigma**2 + d**2)).square()
    return error.square().mean((1, 2, 3)) * weight


STAGES = (Stage("hdit", HDiTTask, KEYS, ("hdit",)),)


def build(config: dict[str, Any], source: str) -> HDiTModels:
    """Fresh models; the network starts at F = 0."""
    return HDiTModels(read(HDiTModel, config["model"], source))


def start_from(models: HDiTModels, other: HDiTModels) -> list[str]:
    """Take over the weights that fit; returns the names of those that do not."""
    return take_over(models.state_dict(), other.state_dict())
