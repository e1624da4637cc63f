"""How good drawn digits are: whether they are read right, and how they lie among real ones."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.classifier import IMAGE_SIDE, Classifier, features, logits_of
from reference.data import Images
from reference.evaluation.colours import hues_right
from reference.evaluation.digits import (
    Size,
    balanced_indices,
    digit_of,
    first_hues,
    labels_of,
    shown,
)
from reference.evaluation.drawing import Drawing
from reference.evaluation.measures import frechet_distance, precision_and_recall
from reference.families.r2.training import canvas
from reference.provenance import latent_stages

Judgement = dict[str, float]


def balanced(images: Images, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[N, c, s, s]` in [-1, 1] and labels of digits 0 to 9 in turn; all by default."""
    chosen = balanced_indices(images)[:count]
    return shown(images, chosen, (images.side, images.side)), labels_of(images, chosen)


@dataclass(frozen=True)
class Judge:
    """Judges digits by a classifier and the features `[M, D]` of real ones, 0 to 9 in turn.

    `side`: of the classifier's `IMAGE_SIDE` pixels a side those that a digit's picture has.
    """

    classifier: Classifier
    real: Tensor
    parts: tuple[int, ...] = (10,)  # as `Images.parts`
    side: int = IMAGE_SIDE

    @classmethod
    @torch.inference_mode()
    def of(cls, classifier: Classifier, images: Images) -> "Judge":
        """A judge to whom `images` are the real digits."""
        real = features(classifier, balanced(images)[0], images.side)
        return cls(classifier, real, images.parts, images.side)

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """The digits `[B]` that the classifier reads in the middle of each image."""
        return logits_of(self.classifier, self.features(images)).argmax(1)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees in the middle of each image, `[B, D]`."""
        return features(self.classifier, images, self.side)

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> Judgement:
        """Of images `[B, 1 or 3, h, w]`: `read_right`, `frechet`, `precision` and `recall`.

        The middle square is judged. Precision and recall compare with as many real digits, the
        Fréchet distance with all of them. Of painted digits also `hues_right`: both as asked.
        """
        found = self.features(images)
        right = logits_of(self.classifier, found).argmax(1) == digit_of(labels)
        precision, recall = precision_and_recall(self.real[: len(found)], found)
        judgement = {
            "read_right": right.float().mean().item(),
            "frechet": frechet_distance(self.real, found),
            "precision": precision,
            "recall": recall,
        }
        if labels.dim() == 2:
            judgement["hues_right"] = hues_right(images, labels[:, 1:] - first_hues(self.parts))
        return judgement


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
    labels = draw.labels(digits)
    images = draw(labels, latent, image, guidance_scale).images
    if image is not None:
        shape = canvas(latent, IMAGE_SIDE)
        images = F.interpolate(images, shape, mode="bilinear", antialias=True)
    return judge(images, labels)


def trained_on(size: Size, provenance: dict[str, Any]) -> bool | None:
    """Whether latents of `size` were in a checkpoint's training; None where it does not say."""
    if (found := latent_stages(provenance)) is None:
        return None
    ranges, aspect = found
    shorter, longer = sorted(size)
    within = any(low <= shorter and longer <= high for low, high in ranges)
    return within and longer <= aspect * shorter
