"""What a painted digit shows: its stroke's and its ground's colour, and the digit in grey."""

import torch
from torch import Tensor

from reference.data import HUES

STROKE = 0.75  # of the largest distance from the ground: pixels that the stroke covers
GROUND = 0.25  # of it: pixels of the ground


def stroke_and_ground(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colours `[B, 3]` of the strokes and of the grounds of `[B, 3, h, w]`.

    The ground is what the picture's edge shows, the stroke what differs most from it.
    """
    edge = torch.cat(
        [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1
    )
    apart = (images - edge.median(-1).values[..., None, None]).norm(dim=1, keepdim=True)
    largest = apart.amax((2, 3), keepdim=True)
    return _mean(images, apart >= STROKE * largest), _mean(images, apart <= GROUND * largest)


def _mean(images: Tensor, chosen: Tensor) -> Tensor:
    return (images * chosen).sum((2, 3)) / chosen.sum((2, 3)).clamp_min(1)


def in_grey(images: Tensor) -> Tensor:
    """Painted digits `[B, 3, h, w]` as grey ones `[B, 1, h, w]`: -1 ground, 1 stroke."""
    stroke, ground = stroke_and_ground(images)
    axis = stroke - ground
    share = torch.einsum("bchw,bc->bhw", images - ground[..., None, None], axis)
    share = share / axis.square().sum(1).clamp_min(1e-6)[:, None, None]
    return share.unsqueeze(1).clamp(0, 1) * 2 - 1


def nearest_hue(colours: Tensor) -> Tensor:
    """The number of the named hue nearest to each colour `[B, 3]` in [-1, 1], by RGB."""
    palette = torch.tensor([*HUES.values()]) / 127.5 - 1
    return torch.cdist(colours, palette).argmin(1)


def hues_right(images: Tensor, hues: Tensor) -> float:
    """The share of images `[B, 3, h, w]` whose stroke and ground are nearest to `hues` `[B, 2]`."""
    found = torch.stack([nearest_hue(colour) for colour in stroke_and_ground(images)], 1)
    return (found == hues).all(1).float().mean().item()
