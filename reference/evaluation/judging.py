"""How good drawn digits are: whether they are read right, and how they lie among real ones."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.classifier import IMAGE_SIDE, SEED, Classifier, features, logits_of
from reference.data import Images, fit
from reference.evaluation.drawing import Drawing, Size
from reference.evaluation.measures import frechet_distance, precision_and_recall
from reference.families.r2.training import canvas

Judgement = dict[str, float]


def balanced_indices(images: Images) -> Tensor:
    """Indices of digits 0 to 9 in turn, chosen by `SEED`: as many as can be had of each."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    columns = [order[images.labels[order] == label] for label in range(10)]
    each = min(map(len, columns))
    return torch.stack([column[:each] for column in columns], 1).flatten()


def balanced(images: Images, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[N, 1, 32, 32]` in [-1, 1] and labels `[N]` of `balanced_indices`, or the first."""
    chosen = balanced_indices(images)[:count]
    pixels = fit(images.pixels[chosen], IMAGE_SIDE, IMAGE_SIDE, images.pad)
    return pixels, images.labels[chosen]


@dataclass(frozen=True)
class Judge:
    """Judges digits by a classifier and the features `[M, D]` of real ones, 0 to 9 in turn."""

    classifier: Classifier
    real: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, classifier: Classifier, images: Images) -> "Judge":
        """A judge to whom `images` are the real digits."""
        return cls(classifier, features(classifier, balanced(images)[0]))

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> Judgement:
        """Of images `[B, 1, h, w]`: `read_right`, `frechet`, `precision` and `recall`.

        The middle square is judged. Precision and recall compare with as many real digits, the
        Fréchet distance with all of them.
        """
        found = features(self.classifier, images)
        right = (logits_of(self.classifier, found).argmax(1) == labels).float().mean().item()
        precision, recall = precision_and_recall(self.real[: len(found)], found)
        return {
            "read_right": right,
            "frechet": frechet_distance(self.real, found),
            "precision": precision,
            "recall": recall,
        }


def judged(
    draw: Drawing,
    judge: Judge,
    latent: Size,
    digits: int,
    guidance_scale: float | None = None,
    image: Size | None = None,
) -> Judgement:
    """What `judge` finds of `digits` drawn digits, 0 to 9 in turn.

    R2IR stretches what a latent holds to an `image` of another aspect, so that is brought back to
    the latent's aspect first.
    """
    labels = torch.arange(digits) % 10
    images = draw(labels, latent, image, guidance_scale).images
    if image is not None:
        shape = canvas(latent, IMAGE_SIDE)
        images = F.interpolate(images, shape, mode="bilinear", antialias=True)
    return judge(images, labels)


def trained_on(size: Size, provenance: dict[str, Any]) -> bool | None:
    """Whether latents of `size` were in a checkpoint's training; None where it does not say.

    `latent` in `[r2id]` is the range of sides, or a list of stages that each end at a share of
    the steps: `[4, 16]` or `[[0.7, 4, 8], [1.0, 4, 16]]`; `aspect` bounds longer over shorter.
    """
    own = provenance.get("config", {}).get("r2id", {})
    if "latent" not in own:
        return None
    latent = own["latent"]
    ranges = [stage[-2:] for stage in latent] if isinstance(latent[0], list) else [latent]
    shorter, longer = sorted(size)
    within = any(low <= shorter and longer <= high for low, high in ranges)
    return within and longer <= own.get("aspect", 1) * shorter
