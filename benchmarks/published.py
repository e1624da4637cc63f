"""R2ID in the layout of the published code, as what a user would export without this toolkit.

Channels first: `[B, C, H, W]` maps, 1×1 convolutions, a transpose into and out of each attention,
whose products are einsums over split heads. Weights are those of our reference model, so that the
outputs agree.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import ALPHA_BAR
from reference.families.parts.layers import (
    ATTENTION_EPSILON,
    GRN_EPSILON,
    AdaLN,
    LinearAttention,
    positive,
)
from reference.families.r2.model import R2Models
from reference.families.r2.r2id import EncoderBlock


def conv(x: Tensor, linear: nn.Linear) -> Tensor:
    """A 1×1 convolution of `[B, C, H, W]`."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def adapt(norm: AdaLN, x: Tensor, film: Tensor) -> Tensor:
    """AdaLN of a map: GRN over its pixels, then scale and shift from film `[B, f]`."""
    response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    ratio = response / (response.mean(1, keepdim=True) + GRN_EPSILON)
    gamma, beta = norm.norm.gamma.view(1, -1, 1, 1), norm.norm.beta.view(1, -1, 1, 1)
    normed = (1 + gamma) * (x * ratio) + beta + x
    scale, shift = norm.film(film)[:, :, None, None].chunk(2, 1)
    return normed * (1 + scale) + shift


def attend(attention: LinearAttention, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """Attention of a map to itself, or to text tokens `[B, T, d]`: heads split, four einsums."""
    tokens = x.flatten(2).transpose(1, 2)
    memory = tokens if memory is None else memory
    q = split(attention, attention.query_norm(attention.query(tokens)))
    k = split(attention, attention.key_norm(attention.key(memory)))
    v = split(attention, attention.value(memory))
    q, k = positive(q), positive(k)
    kv = torch.einsum("bhnd,bhne->bhde", k, v)
    numerator = torch.einsum("bhqd,bhde->bhqe", q, kv)
    denominator = torch.einsum("bhqd,bhd->bhq", q, k.sum(2)).unsqueeze(-1) + ATTENTION_EPSILON
    read = attention.out((numerator / denominator).transpose(1, 2).flatten(2))
    return read.transpose(1, 2).unflatten(2, x.shape[2:])


def split(attention: LinearAttention, x: Tensor) -> Tensor:
    """`[B, N, d]` -> `[B, heads, N, d / heads]`."""
    return x.unflatten(2, (attention.heads, -1)).transpose(1, 2)


def channels(scale: Tensor) -> Tensor:
    return scale.view(1, -1, 1, 1)


def run_block(block: EncoderBlock, x: Tensor, film: Tensor, text: Tensor | None = None) -> Tensor:
    """An encoder block, or with `text` a decoder block."""
    w = x + channels(block.attention_scale) * attend(
        block.attention, adapt(block.attention_norm, x, film)
    )
    if text is not None:
        crossed = attend(block.cross, adapt(block.cross_norm, w, film), text)
        w = w + channels(block.cross_scale) * crossed
    hidden = F.silu(conv(adapt(block.ffn_norm, w, film), block.ffn.up))
    w = w + channels(block.ffn_scale) * conv(hidden, block.ffn.down)
    return x + channels(block.block_scale) * w


class PublishedR2ID(nn.Module):
    """One guided step, everything computed in it but the coordinates."""

    def __init__(self, models: R2Models):
        super().__init__()
        self.models = models

    def forward(
        self, latent: Tensor, coordinates: Tensor, alpha_bar: Tensor, labels: Tensor
    ) -> Tensor:
        """latent `[1, C, H, W]`, coordinates `[H, W, 4]`, labels `[K, 1, labels]` -> eps
        `[K, C, H, W]`: encoder blocks once, decoder blocks for each condition in turn."""
        r2id = self.models.r2id
        position = r2id.position(coordinates).permute(2, 0, 1).unsqueeze(0)
        film = r2id.film(r2id.time(alpha_bar))
        x = conv(torch.cat([latent, position], 1), r2id.latent_in)
        for block in r2id.encoder:
            x = run_block(block, x, film)
        branches = []
        for label in labels.unbind(0):
            y, text = x, self.models.condition(label)
            for block in r2id.decoder:
                y = run_block(block, y, film, text)
            branches.append(conv(y, r2id.eps_out))
        return torch.cat(branches)


class ReferenceStep(nn.Module):
    """The reference of a family that diffuses pixels: latent, labels `[K, B, labels]` -> eps."""

    def __init__(self, models: Any):
        super().__init__()
        self.models = models

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        eps: Tensor = self.models.denoiser(labels, np.array([ALPHA_BAR]))(latent, 0)
        return eps


def step_of(models: Any) -> nn.Module:
    """A step as its paper writes it."""
    return PublishedR2ID(models) if isinstance(models, R2Models) else ReferenceStep(models)
