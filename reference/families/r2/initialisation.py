"""Initialisation that lets linear attention be local from the first step.

With default weights phi(q)·phi(k) is nearly the same for all pixels, every query reads one global
mean, and thousands of steps pass before positions tell apart. Here each channel of a spatial
attention starts as a place cell: its logit is g · (cos π(x - x_c) + cos π(y - y_c)), a bump around
a centre of its own, which is linear in the positional sines and cosines at f = π. Queries and keys
share the cells, so that a query first reads the mean of what lies near it. None of this changes
what a checkpoint means.

Shapes: d width, F frequencies, H heads, e = d / H cells per head.
"""

import math

import torch
from torch import Tensor, nn

from reference.families.parts.layers import LinearAttention
from reference.families.parts.training import take_over
from reference.families.r2.model import R2Models
from reference.families.r2.r2id import R2ID
from reference.families.r2.r2ir import R2IR

R2IR_CELL_GAIN = 6.0  # sharpness of the bumps: gain of the query and key LayerNorm
R2ID_CELL_GAIN = 4.0
CELL_THRESHOLD = 1.5  # in units of the gain, how far a cell is closed away from its centre
FREQUENCY_DECAY = 1.7  # per octave away from π, in the positional columns
POSITION_RMS = 0.5  # of the tokens' positional part; values have 1
VALUE_SCALE = 2.0  # of R2IR's value and output projections, times PyTorch's default
BLOCK_SCALE = 0.2  # of R2ID's blocks
OUTPUT_STD = 0.01  # of the last projections: a large one saturates R2IR's tanh


@torch.no_grad()
def initialise_r2ir(model: R2IR) -> None:
    """Set the starting weights of `model` in place, drawing from torch's global generator.

    Values get columns of their own direction at random: a pixel's colour opens and closes cells.
    """
    config = model.config
    count = config.high_frequencies + config.low_frequencies
    position, _ = position_columns(config.width, count, config.low_frequencies)
    for linear in (model.query_in, model.color_in, model.latent_in):
        values = linear.in_features - 8 * count
        set_columns(linear, torch.randn(config.width, values), position)
    for linear in (model.latent_out, model.color_out):
        start_small(linear)
    for block in (*model.encoder, *model.decoder):
        nn.init.ones_(block.block_scale)
        place_cells(block.attention, position, config.low_frequencies, R2IR_CELL_GAIN)
        block.attention.value.weight.mul_(VALUE_SCALE)
        block.attention.out.weight.mul_(VALUE_SCALE)


@torch.no_grad()
def initialise_r2id(model: R2ID) -> None:
    """As for R2IR, but the noisy values keep out of the cells' directions where there is room."""
    config = model.config
    count = config.high_frequencies + config.low_frequencies
    position, free = position_columns(config.width, count, config.low_frequencies)
    values = torch.randn(config.width, config.latent_channels)
    if free.shape[1] >= config.latent_channels:
        values = free[:, : config.latent_channels] * math.sqrt(config.width)
    set_columns(model.latent_in, values, position)
    start_small(model.eps_out)
    for block in (*model.encoder, *model.decoder):
        nn.init.constant_(block.block_scale, BLOCK_SCALE)
        place_cells(block.attention, position, config.low_frequencies, R2ID_CELL_GAIN)


def position_columns(width: int, count: int, pi_index: int) -> tuple[Tensor, Tensor]:
    """Orthogonal columns `[d, 8F]` that shrink away from the frequency π, and the rest."""
    octaves = (torch.arange(count) - pi_index).abs()
    weight = (FREQUENCY_DECAY**-octaves).repeat(8)
    side = max(width, 8 * count)
    basis = torch.linalg.qr(torch.randn(side, side)).Q[:width]
    columns = basis[:, : 8 * count] * weight
    rms = columns.square().sum(1).mean().sqrt()
    return columns * POSITION_RMS / rms, basis[:, 8 * count :]


def set_columns(linear: nn.Linear, values: Tensor, position: Tensor) -> None:
    """Input columns: values `[d, C]` of unit variance together, then the positional ones."""
    linear.weight.copy_(torch.cat([values / math.sqrt(max(values.shape[1], 1)), position], 1))
    nn.init.zeros_(linear.bias)


def start_small(linear: nn.Linear) -> None:
    """Outputs near zero with a gradient that is not."""
    nn.init.normal_(linear.weight, std=OUTPUT_STD)
    nn.init.zeros_(linear.bias)


def place_cells(attention: LinearAttention, position: Tensor, pi_index: int, gain: float) -> None:
    """Make the query and key channels bumps over both coordinate systems.

    `position [d, 8F]` are the input's positional columns. Without a frequency of π nothing is set.
    """
    width, count = len(position), position.shape[1] // 8
    if pi_index >= count:
        return
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
        nn.init.constant_(norm.weight, gain)
        nn.init.constant_(norm.bias, -gain * CELL_THRESHOLD)


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


@torch.no_grad()
def start_from(models: R2Models, other: R2Models) -> list[str]:
    """Take over the weights of `other` in place; returns the names of those that do not fit.

    Another number of colours gets the others' mean, so that grey weights see a colour's lightness
    and draw grey; of another number of labels those that both have are taken.
    """
    wanted, found = models.state_dict(), other.state_dict()
    colours, before = (m.config.r2ir.color_channels for m in (models, other))
    if colours != before:
        weight = found["r2ir.color_in.weight"]
        value, position = weight[:, :before], weight[:, before:]
        value = value.sum(1, keepdim=True).expand(-1, colours) / colours
        found["r2ir.color_in.weight"] = torch.cat([value, position], 1)
        for name in ("r2ir.color_out.weight", "r2ir.color_out.bias"):
            found[name] = found[name].mean(0, keepdim=True).expand_as(wanted[name])
    name = "condition.project.weight"
    labels = min(found[name].shape[1], wanted[name].shape[1])
    if len(found[name]) == len(wanted[name]):
        found[name] = torch.cat([found[name][:, :labels], wanted[name][:, labels:]], 1)
    return take_over(wanted, found)
