"""How good drawn digits are: whether they are read right, and how they lie among real ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.classifier import IMAGE_SIDE, SEED, Classifier, features, logits_of
from reference.data import Images, fit
from reference.evaluation.drawing import Size
from reference.evaluation.measures import frechet_distance, precision_and_recall

Draw = Callable[[Tensor, Size, float], tuple[Tensor, Tensor]]


def balanced(images: Images, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[N, 1, 32, 32]` in [-1, 1] and labels `[N]`: 0 to 9 in turn, chosen by `SEED`.

    `count` digits; all that can be had of each label by default.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    columns = [order[images.labels[order] == label] for label in range(10)]
    each = min(map(len, columns))
    chosen = torch.stack([column[:each] for column in columns], 1).flatten()[:count]
    pixels = fit(images.pixels[chosen], IMAGE_SIDE, IMAGE_SIDE, images.pad)
    return pixels, images.labels[chosen]


@dataclass(frozen=True)
class Judge:
    """Judges digits by a classifier and the features `[M, D]` of real ones, 0 to 9 in turn."""

    classifier: Classifier
    real: Tensor

    @classmethod
    def of(cls, classifier: Classifier, images: Images) -> "Judge":
        return cls(classifier, features(classifier, balanced(images)[0]))

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
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


def judgement_line(found: dict[str, float]) -> str:
    return (
        f"{found['read_right']:6.1%} read right, Fréchet distance {found['frechet']:6.2f}, "
        f"precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    )


@torch.inference_mode()
def quick_judgement(
    draw: Draw, judge: Judge, sizes: Sequence[Size], digits: int, guidance: Sequence[float]
) -> dict[tuple[Size, float], dict[str, float]]:
    """What `judge` finds of `digits` digits per latent size and guidance."""
    labels = torch.arange(digits) % 10
    return {
        (size, scale): judge(draw(labels, size, scale)[0], labels)
        for size in sizes
        for scale in guidance
    }
