"""Initialisation of R2IR that lets its linear attention be local from the first step.

With default weights phi(q)·phi(k) is nearly the same for all pixels, every query reads one global
mean, and thousands of steps pass before positions tell apart. Here each attention channel starts
as a place cell: its logit is g · (cos f(x - x_c) + cos f(y - y_c)), a bump around a centre of its
own, which is linear in the sines and cosines at f = π. Queries and keys share the cells, so that a
query first reads the mean of what lies near it. None of this changes what a checkpoint means.

Shapes: d width, F frequencies, H heads, e = d / H cells per head.
"""

import math

import torch
from torch import Tensor, nn

from reference.layers import LinearAttention
from reference.r2ir import R2IR

CELL_GAIN = 6.0  # sharpness of the bumps: gain of the query and key LayerNorm
CELL_THRESHOLD = 1.5  # in units of the gain, how far a cell is closed away from its centre
FREQUENCY_DECAY = 1.7  # per octave away from π, in the positional columns
POSITION_RMS = 0.5  # of the tokens' positional part; values have 1
VALUE_SCALE = 2.0  # of the value and output projections, times PyTorch's default
OUTPUT_STD = 0.01  # of the last projections: a large one saturates the tanh


@torch.no_grad()
def initialise_r2ir(model: R2IR) -> None:
    """Set the starting weights of `model` in place, drawing from torch's global generator.

    A model without a frequency of π keeps PyTorch's default attention.
    """
    config = model.config
    count = config.high_frequencies + config.low_frequencies
    position = position_columns(config.width, count, config.low_frequencies)
    for linear in (model.query_in, model.color_in, model.latent_in):
        values = linear.in_features - 8 * count
        columns = torch.randn(config.width, values) / math.sqrt(max(values, 1))
        linear.weight.copy_(torch.cat([columns, position], 1))
        nn.init.zeros_(linear.bias)
    for linear in (model.latent_out, model.color_out):
        nn.init.normal_(linear.weight, std=OUTPUT_STD)
        nn.init.zeros_(linear.bias)
    for block in (*model.encoder, *model.decoder):
        nn.init.ones_(block.block_scale)
        if config.high_frequencies:
            place_cells(block.attention, position, count, config.low_frequencies)


def position_columns(width: int, count: int, pi_index: int) -> Tensor:
    """Orthogonal columns `[d, 8F]` that shrink away from the frequency π (index `pi_index`)."""
    octaves = (torch.arange(count) - pi_index).abs()
    weight = (FREQUENCY_DECAY**-octaves).repeat(8)
    side = max(width, 8 * count)
    columns = torch.linalg.qr(torch.randn(side, side)).Q[:width, : 8 * count] * weight
    return columns * POSITION_RMS / columns.square().sum(1).mean().sqrt()


def place_cells(attention: LinearAttention, position: Tensor, count: int, pi_index: int) -> None:
    """Make the query and key channels bumps over both coordinate systems."""
    width = len(position)
    centres = cell_centres(attention.heads, width // attention.heads)  # [d, 2]
    bumps = torch.zeros(2, 4, count, width)  # system; sin x, sin y, cos x, cos y; frequency
    angle = math.pi * centres.T  # [2, d]
    bumps[:, :, pi_index] = torch.cat([angle.sin(), angle.cos()]) / 2
    # Bumps are wanted of the features, but a projection sees tokens = position · features.
    weight = bumps.flatten(0, 2).T @ torch.linalg.pinv(position)  # [d, d]
    for projection in (attention.query, attention.key):
        projection.weight.copy_(weight)
        nn.init.zeros_(projection.bias)
    for norm in (attention.query_norm, attention.key_norm):
        nn.init.constant_(norm.weight, CELL_GAIN)
        nn.init.constant_(norm.bias, -CELL_GAIN * CELL_THRESHOLD)
    attention.value.weight.mul_(VALUE_SCALE)
    attention.out.weight.mul_(VALUE_SCALE)


def cell_centres(heads: int, cells: int) -> Tensor:
    """One centre per cell in [-0.5, 0.5]², `[H · e, 2]`: per head a grid shifted at random."""
    rows = math.ceil(math.sqrt(cells))
    columns = math.ceil(cells / rows)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = []
    for _ in range(heads):
        shift = torch.rand(2)
        at = torch.stack([(x + shift[0]) / columns, (y + shift[1]) / rows], -1).flatten(0, 1) - 0.5
        centres.append(at[torch.randperm(len(at))[:cells]])
    return torch.cat(centres)
