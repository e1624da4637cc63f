"""HDiT: denoises pixels by transformer levels, each of half the grid of the one before.

Crowson et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
Transformers", arXiv 2401.11605; module names are those of k-diffusion's checkpoints.
Shapes: B batch, C colours, h × w tokens, d width of a level, n heads, e channels per head,
m mapping width. Tokens are `[B, h, w, d]`. No layer has a bias.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.families.hdit.config import HDiTConfig, HDiTModel, Level
from reference.families.hdit.layers import (
    FourierFeatures,
    Layer,
    Mapping,
    Merge,
    RMSNorm,
    Rotation,
    Split,
    SplitSkip,
    rotation_angles,
    zeroed,
)
from reference.families.parts.models import Denoiser, Models
from reference.families.parts.text import with_null

AUGMENTATIONS = 9  # numbers that say how an image was augmented


class HDiT(nn.Module):
    """The network F; `denoise` is the preconditioned estimate D of x0 of the paper."""

    def __init__(self, config: HDiTConfig):
        super().__init__()
        m, levels = config.mapping_width, config.levels
        self.config = config
        self.patch_in = Merge(config.channels, levels[0].width, config.patch)
        self.time_emb = FourierFeatures(1, m)
        self.time_in_proj = nn.Linear(m, m, bias=False)
        self.aug_emb = FourierFeatures(AUGMENTATIONS, m)
        self.aug_in_proj = nn.Linear(m, m, bias=False)
        if config.classes:
            self.class_emb = nn.Embedding(config.classes + 1, m)
        if config.mapping_cond_dim:
            self.mapping_cond_in_proj = nn.Linear(config.mapping_cond_dim, m, bias=False)
        self.mapping = Mapping(config)

        def layers(level: Level, first: int = 0) -> nn.ModuleList:
            return nn.ModuleList(Layer(level, m, first + i) for i in range(level.depth))

        self.down_levels = nn.ModuleList(layers(level) for level in levels[:-1])
        self.up_levels = nn.ModuleList(layers(level, level.depth) for level in levels[:-1])
        self.mid_level = layers(levels[-1])
        pairs = list(pairwise(levels))
        self.merges = nn.ModuleList(Merge(a.width, b.width, (2, 2)) for a, b in pairs)
        self.splits = nn.ModuleList(SplitSkip(b.width, a.width) for a, b in pairs)
        self.out_norm = RMSNorm(levels[0].width)
        self.patch_out = Split(levels[0].width, config.channels, config.patch)
        zeroed(self.patch_out.proj)

    def condition(
        self,
        c_noise: Tensor,
        labels: Tensor,
        augmentation: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """cond `[B, m]` of c_noise = ¼·ln σ `[B]` and labels `[B, classes]`, zero being null.

        augmentation `[B, 9]` (default 0), extra `[B, mapping_cond_dim]` where the model has it.
        """
        if augmentation is None:
            augmentation = c_noise.new_zeros(len(c_noise), AUGMENTATIONS)
        e = self.time_in_proj(self.time_emb(c_noise.unsqueeze(-1)))
        e = e + self.aug_in_proj(self.aug_emb(augmentation))
        if self.config.classes:
            e = e + with_null(labels) @ self.class_emb.weight
        if self.config.mapping_cond_dim:
            given = (len(c_noise), self.config.mapping_cond_dim)
            e = e + self.mapping_cond_in_proj(c_noise.new_zeros(given) if extra is None else extra)
        return self.mapping(e)

    def rotations(self, height: int, width: int, device: torch.device) -> list[Rotation | None]:
        """The rotation of each level for an image of `height` × `width`; None without attention."""
        found: list[Rotation | None] = []
        height, width = height // self.config.patch[0], width // self.config.patch[1]
        for level in self.config.levels:
            heads = level.width // level.head_dim
            angles = rotation_angles(height, width, heads, level.head_dim).to(device)
            found.append(None if level.attention == "none" else (angles.cos(), angles.sin()))
            height, width = height // 2, width // 2
        return found

    def forward(self, image: Tensor, cond: Tensor) -> Tensor:
        """F of c_in·x `[B, C, H, W]` and cond `[B, m]`, as `[B, C, H, W]` float32."""
        rotations = self.rotations(image.shape[-2], image.shape[-1], image.device)
        x, skips = self.patch_in(image.movedim(1, -1)), []
        for layers, rotation, merge in zip(
            self.down_levels, rotations[:-1], self.merges, strict=True
        ):
            x = run(layers, x, cond, rotation)
            skips.append(x)
            x = merge(x)
        x = run(self.mid_level, x, cond, rotations[-1])
        for index in reversed(range(len(skips))):
            x = self.splits[index](x, skips[index])
            x = run(self.up_levels[index], x, cond, rotations[index])
        return self.patch_out(self.out_norm(x)).movedim(-1, 1).float()

    def denoise(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """D(x, σ): the estimate of x0 from x = x0 + σ·n `[B, C, H, W]`, σ `[B]`."""
        skip, out, scale, _ = scalings(sigma, self.config.sigma_data)[..., None, None, None]
        return skip * x + out * self(scale * x, cond)


def scalings(sigma: Tensor, sigma_data: float) -> Tensor:
    """c_skip, c_out, c_in, c_noise of σ `[B]`, `[4, B]`: Karras et al., arXiv 2206.00364, table 1.

    c_noise = ¼·ln σ.
    """
    s2 = sigma**2 + sigma_data**2
    root = s2.sqrt()
    return torch.stack([sigma_data**2 / s2, sigma * sigma_data / root, 1 / root, sigma.log() / 4])


def run(layers: nn.Module, x: Tensor, cond: Tensor, rotation: Rotation | None) -> Tensor:
    """All layers of a level, one way."""
    for layer in layers.children():
        x = layer(x, cond, rotation)
    return x


class HDiTModels(Models):
    """HDiT as what a loop over alpha_bar calls."""

    def __init__(self, config: HDiTModel):
        super().__init__()
        self.config = config
        self.hdit = HDiT(config.hdit)

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label being null.

        With σ² = (1 - a)/a and x = z/√a, and free of divisions by √a: R² = 1 - a + a·d²,
        eps = (√(1 - a)/R²)·z - (d·√a/R)·F(z/R).
        """
        d = self.config.hdit.sigma_data
        branches, batch = labels.shape[:2]

        def denoise(z: Tensor, step: int) -> Tensor:
            a = float(alpha_bar[step])
            r2 = 1 - a + a * d**2
            c_noise = math.log((1 - a) / a) / 8
            cond = self.hdit.condition(
                torch.full((branches * batch,), c_noise, device=z.device), labels.flatten(0, 1)
            )
            f = self.hdit((z / r2**0.5).repeat(branches, 1, 1, 1), cond)
            z = z.unsqueeze(0)
            return z * ((1 - a) ** 0.5 / r2) - f.unflatten(0, (branches, batch)) * (
                d * (a / r2) ** 0.5
            )

        return denoise
