"""The blocks of SiD2's residual U-ViT.

Shapes: B batch, W width of a level, h × w its grid, N = h · w tokens, a heads of e channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.families.parts.rotary import grid_angles, turn

EPSILON = 1e-6
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [N, e/2]


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))·(1 + scale) + shift)), convolutions 3×3."""

    def __init__(self, width: int, cond: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, EPSILON)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(cond, 2 * width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """`[B, W, h, w]`, condition `[B, cond]` -> `[B, W, h, w]`."""
        scale, shift = self.film(c)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class RMSGain(nn.Module):
    """u · rsqrt(mean(u²) + 1e-6) · gain over the channels of a head, in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, u: Tensor) -> Tensor:
        mean = u.float().square().mean(-1, keepdim=True)
        return (u * (mean + EPSILON).rsqrt() * self.gain).to(u.dtype)


class TransformerBlock(nn.Module):
    """Attention, then the FFN, each behind LayerNorm(x)·(1 + s) + b; no gates."""

    def __init__(self, width: int, cond: int, head_dim: int, dropout: float):
        super().__init__()
        self.heads = width // head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = RMSGain(head_dim)
        self.norm_k = RMSGain(head_dim)
        self.proj = nn.Linear(width, width, bias=False)
        self.ffn1 = nn.Linear(width, 4 * width, bias=False)
        self.ffn2 = nn.Linear(4 * width, width, bias=False)
        self.film = nn.Linear(cond, 4 * width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.ffn2.weight)

    def forward(self, x: Tensor, c: Tensor, rotation: Rotation) -> Tensor:
        """Tokens `[B, N, W]` in row-major order, condition `[B, cond]` -> `[B, N, W]`."""
        s1, b1, s2, b2 = self.film(c).unsqueeze(1).chunk(4, -1)
        x = x + self.proj(self.attend(normed(x) * (1 + s1) + b1, rotation))
        return x + self.ffn2(self.dropout(F.silu(self.ffn1(normed(x) * (1 + s2) + b2))))

    def attend(self, x: Tensor, rotation: Rotation) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # [B, a, 3, N, e]
        q, k, v = qkv.unbind(2)
        q, k = turn(self.norm_q(q), *rotation), turn(self.norm_k(k), *rotation)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def normed(x: Tensor) -> Tensor:
    """LayerNorm over the channels without affine."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def rotation_of(height: int, width: int, head_dim: int, device: torch.device) -> Rotation:
    """Cosines and sines `[N, e/2]` of y · f, then x · f; f_k = π·10^(k/(K - 1)), K = e/4."""
    count = head_dim // 4
    f = math.pi * 10 ** (torch.arange(count, dtype=torch.float64) / (count - 1))
    angles = grid_angles(height, width, f).flatten(0, 1)
    return angles.cos().to(device), angles.sin().to(device)
