"""SiD2: predicts v in pixels by a residual U-ViT that is told the log SNR.

Hoogeboom et al., "Simpler Diffusion (SiD2)", arXiv 2410.19324.
Shapes: B batch, C colours, H × W pixels, W_i width of level i, whose grid is H/(p·2^i) × W/(p·2^i).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.families.parts.models import Denoiser, Models
from reference.families.parts.text import with_null
from reference.families.sid2.config import SiD2Config, SiD2Model
from reference.families.sid2.layers import EPSILON, ResBlock, TransformerBlock, rotation_of
from runtime.sampling.schedule import log_snr

PRECONDITION = 8  # λ is divided by it before its sines
HIGHEST = 64  # ratio of the highest to the lowest frequency of λ


class LogSNRFeatures(nn.Module):
    """λ `[B]` -> sin(λ/8 · f) ‖ cos(λ/8 · f) `[B, 2F]`, f_i = π/2 · 64^(i/(F - 1)); float32."""

    frequencies: Tensor

    def __init__(self, count: int):
        super().__init__()
        powers = torch.arange(count, dtype=torch.float64) / (count - 1)
        f = math.pi / 2 * HIGHEST**powers
        self.register_buffer("frequencies", f, persistent=False)

    def forward(self, logsnr: Tensor) -> Tensor:
        angles = logsnr.double().unsqueeze(-1) / PRECONDITION * self.frequencies.double()
        return torch.cat([angles.sin(), angles.cos()], -1).float()


class SiD2(nn.Module):
    """The network: v of z at the log SNR λ under a label."""

    def __init__(self, config: SiD2Config):
        super().__init__()
        self.config = config
        widths, cond = config.widths, config.cond
        self.embed = nn.Conv2d(config.channels, widths[0], config.patch, config.patch)
        self.features = LogSNRFeatures(config.time_features)
        self.time = nn.Sequential(
            nn.Linear(2 * config.time_features, cond), nn.SiLU(), nn.Linear(cond, cond)
        )
        self.classes = nn.Embedding(config.classes + 1, cond)
        outer = range(len(config.blocks))
        self.enc = nn.ModuleList(self._level(i, config.blocks[i]) for i in outer)
        self.mid = self._level(len(widths) - 1, config.mid_blocks)
        self.dec = nn.ModuleList(self._level(i, config.blocks[i]) for i in outer)
        self.down = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 1, bias=False) for i in outer)
        self.up = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 1, bias=False) for i in outer)
        self.norm = nn.GroupNorm(config.groups, widths[0], EPSILON)
        self.head = nn.Conv2d(widths[0], config.channels * config.patch**2, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _level(self, index: int, count: int) -> nn.ModuleList:
        """`count` blocks of a level's type."""
        c, width, dropout = self.config, self.config.widths[index], self.config.dropouts[index]
        if c.types[index] == "res":
            return nn.ModuleList(ResBlock(width, c.cond, c.groups, dropout) for _ in range(count))
        return nn.ModuleList(
            TransformerBlock(width, c.cond, c.head_dim, dropout) for _ in range(count)
        )

    def condition(self, logsnr: Tensor, labels: Tensor) -> Tensor:
        """λ `[B]`, labels `[B, classes]` (the zero label is null) -> `[B, cond]`."""
        embedded = with_null(labels) @ self.classes.weight
        return F.silu(self.time(self.features(logsnr)) + embedded)

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        """v `[B, C, H, W]` float32 of noisy z `[B, C, H, W]`, λ `[B]`, labels `[B, classes]`."""
        c = self.condition(logsnr, labels)
        h, kept = self.embed(z), []
        for blocks, down in zip(self.enc, self.down, strict=True):
            high = self.run(blocks, h, c)
            h = down(F.avg_pool2d(high, 2))
            kept.append((high, h))
        h = self.run(self.mid, h, c)
        for index in reversed(range(len(kept))):
            high, low = kept[index]
            h = high + F.interpolate(self.up[index](h - low), scale_factor=2.0, mode="nearest")
            h = self.run(self.dec[index], h, c)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config.patch).float()

    def run(self, blocks: nn.Module, h: Tensor, c: Tensor) -> Tensor:
        """All blocks of a level, one way, on its map `[B, W_i, h, w]`."""
        listed = list(blocks.children())
        if isinstance(listed[0], ResBlock):
            for block in listed:
                h = block(h, c)
            return h
        height, width = h.shape[-2:]
        rotation = rotation_of(height, width, self.config.head_dim, h.device)
        tokens = h.flatten(2).transpose(1, 2)
        for block in listed:
            tokens = block(tokens, c, rotation)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class SiD2Models(Models):
    """SiD2 as what a loop over alpha_bar calls."""

    def __init__(self, config: SiD2Model):
        super().__init__()
        self.config = config
        self.sid2 = SiD2(config.sid2)

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label being null.

        eps = √(1 - a)·z + √a·v.
        """
        branches, batch = labels.shape[:2]
        levels = log_snr(alpha_bar)

        def denoise(z: Tensor, step: int) -> Tensor:
            a = float(alpha_bar[step])
            level = torch.full((branches * batch,), float(levels[step]), device=z.device)
            v = self.sid2(z.repeat(branches, 1, 1, 1), level, labels.flatten(0, 1))
            return z * (1 - a) ** 0.5 + v.unflatten(0, (branches, batch)) * a**0.5

        return denoise
