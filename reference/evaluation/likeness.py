"""How much alike the pictures of one seed are: at other sizes, and of steps at two sizes."""

import time
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reference.classifier import framed
from reference.evaluation.digits import Size, digit_of
from reference.evaluation.drawing import Drawing, GraphDrawing, shape
from reference.evaluation.judging import Judge
from reference.evaluation.measures import psnr
from runtime.bundle.interface import size_name
from runtime.progress import Bar

CONTINUED_FROM = (0, 0.25, 0.5, 0.75, 1)  # shares of the steps at the smaller latent

Found = dict[str, float]


def judged(judge: Judge, images: Tensor, labels: Tensor, others: Tensor) -> Found:
    """The share read as their label; PSNR and correlation of each with the other image's middle.

    Both at the side that the classifier reads. PSNR in dB is of the mean squared error over all
    images; pixels are in [-1, 1]. The correlation is the mean over images, 0 for a blank one.
    """
    a, b = (framed(x).clamp(-1, 1).flatten(1) for x in (images, others))
    alike = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))
    return {
        "read_right": (judge.read(images) == digit_of(labels)).float().mean().item(),
        "psnr": psnr(a, b),
        "correlation": alike.mean().item(),
    }


def same_picture(
    draw: Drawing, judge: Judge, kind: str, sizes: Sequence[Size], digits: int
) -> dict[str, Found]:
    """What `judged` finds of digits of noise `kind` per size, against the first size's."""
    labels = draw.labels(digits)
    drawn = {size_name(size): draw(labels, size, noise=kind).images for size in sizes}
    first = next(iter(drawn.values()))
    return {name: judged(judge, images, labels, first) for name, images in drawn.items()}


def continued(
    draw: GraphDrawing, judge: Judge, sizes: tuple[Size, Size], digits: int
) -> dict[str, Found]:
    """Digits whose first steps run at a smaller latent, by the step at which the larger goes on.

    Beside what `judged` finds (against the larger latent alone) the seconds per digit. By the
    graphs alone, which is where the change of size is made.
    """
    labels = draw.labels(digits)
    (small, large), steps = sizes, draw.sampling.count
    found: dict[str, Found] = {}
    images: list[Tensor] = []
    for stop in Bar(sorted({round(share * steps) for share in CONTINUED_FROM}), desc="continued"):
        goes_on = 0 < stop < steps
        more: dict[str, Any] = {"continue_at": large, "continue_from": stop} if goes_on else {}
        started = time.perf_counter()
        image = shape(draw, large) if goes_on or not stop else shape(draw, small)
        images.append(draw(labels, small if stop else large, image, **more).images)
        seconds = (time.perf_counter() - started) / digits
        alike = judged(judge, images[-1], labels, images[0])
        found[str(stop)] = alike | {"seconds": seconds}
    return found
