"""The layers of HDiT; names are those of k-diffusion's checkpoints. No layer has a bias.

Shapes: B batch, h × w tokens, d width of a level, n heads, e channels per head, m mapping width.
Tokens are `[B, h, w, d]`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.families.hdit.attention import everywhere, neighbourhood, shifted_window
from reference.families.hdit.config import HDiTConfig, Level
from reference.families.parts.rotary import grid_angles, turn

EPSILON = 1e-6
ATTENTION_SCALE = 10.0  # initial scale of cosines
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [h, w, n, e/4]


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x · gain / √(mean x² + 1e-6) over the channels, the mean in float32."""
    mean = x.float().square().mean(-1, keepdim=True)
    return x * (gain * (mean + EPSILON).rsqrt().to(x.dtype))


class RMSNorm(nn.Module):
    """RMS normalisation with a learnt gain per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class AdaRMSNorm(nn.Module):
    """RMS normalisation with gain 1 + A·cond, one per sample."""

    def __init__(self, width: int, mapping_width: int):
        super().__init__()
        self.linear = zeroed(nn.Linear(mapping_width, width, bias=False))

    def gain(self, cond: Tensor) -> Tensor:
        """cond `[B, m]` -> `[B, 1, 1, d]`."""
        return (1 + self.linear(cond))[:, None, None]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return rms_norm(x, self.gain(cond))


class GEGLU(nn.Module):
    """V·(a · gelu(b)) with [a, b] = U·x, the gelu exact."""

    def __init__(self, width: int, d_ff: int, dropout: float):
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * d_ff, bias=False)
        self.down_proj = zeroed(nn.Linear(d_ff, width, bias=False))
        self.dropout = nn.Dropout(dropout)

    def feed(self, x: Tensor) -> Tensor:
        value, gate = self.up_proj(x).chunk(2, -1)
        return self.down_proj(self.dropout(value * F.gelu(gate)))


class MappingBlock(GEGLU):
    """e + GEGLU(RMSNorm(e))."""

    def __init__(self, width: int, d_ff: int, dropout: float):
        super().__init__(width, d_ff, dropout)
        self.norm = RMSNorm(width)

    def forward(self, e: Tensor) -> Tensor:
        return e + self.feed(self.norm(e))


class FeedForward(GEGLU):
    """x + GEGLU(AdaRMSNorm(x))."""

    def __init__(self, level: Level, mapping_width: int):
        super().__init__(level.width, level.d_ff, level.dropout)
        self.norm = AdaRMSNorm(level.width, mapping_width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return x + self.feed(self.norm(x, cond))


class SelfAttention(nn.Module):
    """x + O·attention of AdaRMSNorm(x), scores scale_j · cos(q, k) after rotation."""

    def __init__(self, level: Level, mapping_width: int, index: int):
        super().__init__()
        self.level, self.heads = level, level.width // level.head_dim
        self.shift = index % 2 * (level.window // 2)  # of a shifted window, by the layer's number
        self.norm = AdaRMSNorm(level.width, mapping_width)
        self.qkv_proj = nn.Linear(level.width, 3 * level.width, bias=False)
        self.scale = nn.Parameter(torch.full((self.heads,), ATTENTION_SCALE))
        self.out_proj = zeroed(nn.Linear(level.width, level.width, bias=False))
        self.dropout = nn.Dropout(level.dropout)

    def forward(self, x: Tensor, cond: Tensor, rotation: Rotation) -> Tensor:
        qkv = self.qkv_proj(self.norm(x, cond)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(-3)  # [B, h, w, n, e] each
        root = self.scale.sqrt().unsqueeze(-1)
        q, k = (rotate(unit(part) * root.to(part.dtype), rotation) for part in (q, k))
        read = self.look(q, k, v).flatten(-2)
        return x + self.out_proj(self.dropout(read))

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.level.attention == "neighborhood":
            return neighbourhood(q, k, v, self.level.window)
        if self.level.attention == "shifted-window":
            return shifted_window(q, k, v, self.level.window, self.shift)
        return everywhere(q, k, v)


class Layer(nn.Module):
    """Self-attention, where the level has it, and the FFN."""

    def __init__(self, level: Level, mapping_width: int, index: int):
        super().__init__()
        if level.attention != "none":
            self.self_attn = SelfAttention(level, mapping_width, index)
        self.ff = FeedForward(level, mapping_width)

    def forward(self, x: Tensor, cond: Tensor, rotation: Rotation | None) -> Tensor:
        if rotation is not None:
            x = self.self_attn(x, cond, rotation)
        return self.ff(x, cond)


class Merge(nn.Module):
    """The tokens of a patch side by side (row, column, channel), then a linear map."""

    def __init__(self, width: int, out: int, patch: tuple[int, int]):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(width * patch[0] * patch[1], out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, h · p, w · q, d]` -> `[B, h, w, out]`."""
        cut = x.unflatten(2, (-1, self.patch[1])).unflatten(1, (-1, self.patch[0]))
        return self.proj(cut.transpose(2, 3).flatten(3))


class Split(nn.Module):
    """A linear map to (row, column, channel) of a patch, which is then laid out."""

    def __init__(self, width: int, out: int, patch: tuple[int, int]):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(width, out * patch[0] * patch[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, h, w, d]` -> `[B, h · p, w · q, out]`."""
        cut = self.proj(x).unflatten(-1, (*self.patch, -1))
        return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SplitSkip(nn.Module):
    """Between the skip and what comes back from below: skip + fac · (split - skip)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 4 * out, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`[B, h, w, d]` and skip `[B, 2h, 2w, out]` -> `[B, 2h, 2w, out]`."""
        cut = self.proj(x).unflatten(-1, (2, 2, -1))
        split = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return skip + self.fac * (split - skip)


class FourierFeatures(nn.Module):
    """[cos(2π·G·u), sin(2π·G·u)] with G drawn once from N(0, 1) and kept; in float32."""

    weight: Tensor

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, inputs))

    def forward(self, u: Tensor) -> Tensor:
        """`[B, inputs]` -> `[B, m]`."""
        with torch.autocast(u.device.type, enabled=False):
            angles = 2 * math.pi * u.float() @ self.weight.float().T
            return torch.cat([angles.cos(), angles.sin()], -1)


class Mapping(nn.Module):
    """RMSNorm, blocks, RMSNorm: the network that makes cond."""

    def __init__(self, config: HDiTConfig):
        super().__init__()
        width = config.mapping_width
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(
            MappingBlock(width, config.mapping_d_ff, config.mapping_dropout)
            for _ in range(config.mapping_depth)
        )
        self.out_norm = RMSNorm(width)

    def forward(self, e: Tensor) -> Tensor:
        e = self.in_norm(e)
        for block in self.blocks:
            e = block(e)
        return self.out_norm(e)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """A linear map that starts at zero."""
    nn.init.zeros_(linear.weight)
    return linear


def unit(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the channels of a head, the sum in float32."""
    total = x.float().square().sum(-1, keepdim=True)
    return x * (total + EPSILON).rsqrt().to(x.dtype)


def rotation_frequencies(heads: int, head_dim: int) -> Tensor:
    """f[j, i] = π · 10^((i·n + j) / (n·P)) `[n, P]` float64, P = e/8.

    Log-spaced from π up to 10π and dealt out to the heads in turn.
    """
    count = head_dim // 8
    powers = torch.arange(heads * count, dtype=torch.float64) / (heads * count)
    return (math.pi * 10**powers).unflatten(0, (count, heads)).T


def rotation_angles(height: int, width: int, heads: int, head_dim: int) -> Tensor:
    """Angles `[h, w, n, 2P]` float32, P = e/8: y · f, then x · f."""
    return grid_angles(height, width, rotation_frequencies(heads, head_dim))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first half of each head's channels, e paired with e + 2P."""
    turned, kept = x.chunk(2, -1)
    return torch.cat([turn(turned, *rotation), kept], -1)
