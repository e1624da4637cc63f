"""The augmentation whose parameters HDiT is told, so that it does not leak into samples.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2,
as in k-diffusion: mirrored with probability 1/2, everything else with probability `share` each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 2**0.2  # one standard deviation of scaling, and of stretching along an axis
SHIFT = 1 / 8  # one standard deviation of shifting, of the image's side


def draw_parameters(batch: int, share: float) -> tuple[Tensor, Tensor]:
    """What the network is told, `[batch, 9]`, and the maps from output to input, `[batch, 2, 3]`.

    Told are: x-flip, y-flip, log-scale step, cos(rotation) - 1, sin(rotation), stretch·cos(axis),
    stretch·sin(axis), x shift, y shift. A map takes coordinates in which the image spans ±1.
    """
    done = torch.rand(5, batch) < share  # y-flip, scale, rotation, stretch, shift
    flip_x = torch.randint(2, (batch,)).float()
    flip_y = torch.randint(2, (batch,)).float() * done[0]
    scale = torch.randn(batch) * done[1]
    rotation = (torch.rand(batch) * 2 - 1) * math.pi * done[2]
    axis = (torch.rand(batch) * 2 - 1) * math.pi * done[3]
    stretch = torch.randn(batch) * done[3]
    shift = torch.randn(2, batch) * done[4]
    told = [flip_x, flip_y, scale, rotation.cos() - 1, rotation.sin()]
    told += [stretch * axis.cos(), stretch * axis.sin(), *shift]
    # From input to output: shifted, then stretched, rotated, scaled and mirrored.
    matrix = scaling(1 - 2 * flip_x, 1 - 2 * flip_y) @ scaling(SCALE**scale, SCALE**scale)
    matrix = matrix @ rotating(-rotation) @ rotating(axis)
    matrix = matrix @ scaling(SCALE**stretch, SCALE**-stretch) @ rotating(-axis)
    offset = 2 * SHIFT * shift.T.unsqueeze(-1)  # the image spans 2
    return torch.stack(told, 1), torch.cat([torch.linalg.inv(matrix), -offset], 2)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """`[B]` each -> `[B, 2, 2]`."""
    return torch.diag_embed(torch.stack([x, y], 1))


def rotating(angle: Tensor) -> Tensor:
    """`[B]` radians -> `[B, 2, 2]`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def augmented(image: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Images `[B, C, s, s]` in [-1, 1], augmented, and what the network is told, `[B, 9]`.

    Resampled bicubically; what lies outside is mirrored in.
    """
    told, maps = draw_parameters(len(image), share)
    return resampled(image, maps.to(image.device)), told.to(image.device)


def resampled(image: Tensor, maps: Tensor) -> Tensor:
    """Images `[B, C, s, s]` taken at where `maps` `[B, 2, 3]` lead from each pixel."""
    places = F.affine_grid(maps, list(image.shape), align_corners=False)
    return F.grid_sample(image, places, "bicubic", "reflection", align_corners=False)
