"""Errors of the models by themselves: of R2IR over sizes and scales, of R2ID over time."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.classifier import IMAGE_SIDE, SEED
from reference.data import Images
from reference.evaluation.digits import Size, conditions, digit_of, labels_of, shown
from reference.evaluation.drawing import TorchDrawing, batches, shape
from reference.evaluation.judging import Judge
from reference.evaluation.measures import psnr, reduced, ssim
from reference.families.r2.model import R2Models
from reference.families.r2.training import canvas
from runtime.bundle.interface import size_name
from runtime.progress import Bar
from runtime.sampling.schedule import read as read_schedule

SCRAPE_POINTS = 20
SCRAPE_IMAGES = 500  # at most
SCALED_SIDE = 28  # of the pictures that larger ones are reduced to: MNIST's own

Curve = dict[str, list[float]]


def reconstruction(models: R2Models, test: Images, size: Size, limit: int) -> float:
    """MSE of images through latents of a size and back, at the latent's aspect ratio."""
    shape = canvas(size, IMAGE_SIDE)
    total = 0.0
    desc = f"reconstruction {size_name(size)}"
    for part in Bar(batches(limit, (8, 8)), desc=desc, unit="batch"):
        images = shown(test, part, shape)
        found = models.r2ir.decode(models.r2ir.encode(images, size), shape)
        total += F.mse_loss(found, images).item() * len(images)
    return total / limit


def eps_over_t(draw: TorchDrawing, test: Images, size: Size, limit: int) -> Curve:
    """eps MSE over t at latent `size`, under the null and under the true condition."""
    generator = torch.Generator().manual_seed(SEED)
    latent = draw.encode(test, slice(limit), size)
    own = conditions(labels_of(test, slice(limit)), draw.models.config.labels)
    both, schedule = torch.stack([torch.zeros_like(own), own]), read_schedule(draw.schedule, size)
    times = [(i + 0.5) / SCRAPE_POINTS for i in range(SCRAPE_POINTS)]
    found: Curve = {"t": times, "null": [], "label": []}
    for t in Bar(times, desc=f"eps over t {size_name(size)}", unit="time"):
        alpha_bar = schedule.alpha_bar(np.array([t]))
        a = float(alpha_bar[0])
        eps = torch.randn(latent.shape, generator=generator)
        noisy = a**0.5 * latent + (1 - a) ** 0.5 * eps
        errors = torch.zeros(2)
        for part in batches(limit, size):
            predicted = draw.models.denoiser(both[:, part], alpha_bar)(noisy[part], 0)
            errors += (predicted - eps[part]).square().mean((2, 3, 4)).sum(1) / limit
        found["null"].append(errors[0].item())
        found["label"].append(errors[1].item())
    return found


def scale_consistency(
    decode: Callable[[Tensor, Size], Tensor], latents: Tensor, factors: Sequence[int]
) -> Curve:
    """How much a decode at k times a size, reduced by area, is like the decode at that size.

    `latents` `[B, C, H, W]`; per `factor` k the SSIM and the PSNR in dB over all pictures, whose
    shorter side is `SCALED_SIDE`.
    """
    height, width = canvas((latents.shape[2], latents.shape[3]), SCALED_SIDE)
    plain = decode(latents, (height, width))
    found: Curve = {"factor": [], "ssim": [], "psnr": []}
    for k in Bar(factors, desc="scale consistency", unit="size"):
        large = [reduced(decode(own, (k * height, k * width)), k) for own in latents.split(1)]
        found["factor"].append(k)
        found["ssim"].append(ssim(torch.cat(large), plain))
        found["psnr"].append(psnr(torch.cat(large), plain))
    return found


def early_stop(draw: TorchDrawing, judge: Judge, size: Size, digits: int) -> Curve:
    """The share of digits read right in the estimate of x0 of each evaluation, decoded."""
    labels = draw.labels(digits)
    right = torch.zeros(draw.sampling.count)

    def on_estimate(step: int, part: slice, x0: Tensor) -> None:
        images = draw.decode(x0, shape(draw, size))
        right[step] += (judge.read(images) == digit_of(labels[part])).sum()

    draw(labels, size, on_estimate=on_estimate)
    shares = (right / digits).tolist()
    return {"evaluation": list(range(1, len(shares) + 1)), "read_right": shares}
