"""The graphs of SiD2: the reference's mathematics with nothing computed twice.

All exact but for rounding: what noise level and class decide leaves the step, the affine of a
block's second group norm with it; so do rotations. A head's 1/√e is in the gain of its queries.
Until the first block's film all conditions share one run. v becomes eps.

Letters: B batch, K conditions, S schedule points, W width of a level, h × w its grid, N = h · w
tokens, a heads of e channels, G numbers of all films.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.parts.layers import signal_share
from export.families.parts.rotary import grid_angles
from reference.families.parts.rotary import turn
from reference.families.sid2.config import SiD2Config
from reference.families.sid2.layers import EPSILON, ResBlock, TransformerBlock, normed
from reference.families.sid2.model import PRECONDITION, SiD2

TABLES = 2  # cosines and sines


def attending(config: SiD2Config) -> list[int]:
    """The levels of transformer blocks."""
    return [level for level, kind in enumerate(config.types) if kind == "transformer"]


class Rotations(nn.Module):
    """`sid2_position`: coordinates `[H, W, 4]` -> two tables of each level of transformers.

    `[h, w, e/2]` each, cosines and sines of the angles of `rotation_of` in the reference.
    """

    frequencies: Tensor

    def __init__(self, config: SiD2Config):
        super().__init__()
        self.divisors = [config.patch << level for level in attending(config)]
        count = config.head_dim // 4
        powers = torch.arange(count, dtype=torch.float64) / (count - 1)
        self.register_buffer("frequencies", (math.pi * 10**powers).float(), persistent=False)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, ...]:
        height, width, found = coordinates.shape[0], coordinates.shape[1], list[Tensor]()
        for side in self.divisors:
            angles = grid_angles(height // side, width // side, self.frequencies)
            found += [angles.cos(), angles.sin()]
        return tuple(found)


class Scalings(nn.Module):
    """`sid2_scalings`: log_snr `[S]` -> √(1 - a) and √a with a = alpha_bar, `[S, 2]`."""

    def forward(self, log_snr: Tensor) -> Tensor:
        return torch.stack([signal_share(-log_snr).sqrt(), signal_share(log_snr).sqrt()], 1)


class SiteFilm(nn.Module):
    """A block's share of the film: gains and shifts, 2·W of a ResBlock, 4·W of a transformer's."""

    def __init__(self, block: ResBlock | TransformerBlock):
        super().__init__()
        self.film, self.norm = block.film, getattr(block, "norm2", None)

    def forward(self, c: Tensor) -> Tensor:
        """Conditions `[S, K, cond]` -> `[S, K, ..]`."""
        film = self.film(c)
        if self.norm is None:
            first, shift, second, shift_2 = film.chunk(4, 2)
            return torch.cat([1 + first, shift, 1 + second, shift_2], 2)
        scale, shift = film.chunk(2, 2)
        gain = 1 + scale
        return torch.cat([gain * self.norm.weight, gain * self.norm.bias + shift], 2)


class Film(nn.Module):
    """`sid2_film`: log_snr `[S]`, condition `[K, classes]` -> film `[S, K, G]`, block by block."""

    frequencies: Tensor

    def __init__(self, model: SiD2):
        super().__init__()
        f = model.features.frequencies / PRECONDITION
        self.register_buffer("frequencies", f.float(), persistent=False)
        self.time = model.time
        classes = model.classes.weight
        self.null = nn.Parameter(classes[-1].clone())
        self.classes = nn.Parameter(classes[:-1] - classes[-1])
        self.sites = nn.ModuleList(SiteFilm(block) for block in blocks_of(model))
        self.width = sum(block.film.out_features for block in blocks_of(model))

    def forward(self, log_snr: Tensor, condition: Tensor) -> Tensor:
        angles = log_snr.unsqueeze(1) * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.null
        c = F.silu(time.unsqueeze(1) + condition @ self.classes)
        return torch.cat([site(c) for site in self.sites], 2)


def blocks_of(model: SiD2) -> Iterator[ResBlock | TransformerBlock]:
    """All blocks in the order of their use."""
    for level in (*model.enc, model.mid, *reversed(model.dec)):
        yield from level.children()


def spread(x: Tensor, branches: int) -> Tensor:
    """`[B, ..]` as the same of each condition, `[K·B, ..]`."""
    same = (-1,) * x.dim()
    return x.unsqueeze(0).expand(branches, *same).flatten(0, 1)


class StepRes(nn.Module):
    """A ResBlock whose film comes from outside."""

    def __init__(self, block: ResBlock):
        super().__init__()
        self.norm, self.conv1, self.conv2 = block.norm1, block.conv1, block.conv2
        self.groups = block.norm2.num_groups

    def prepare(self, x: Tensor) -> Tensor:
        """What needs no film: `[B, W, h, w]` -> the second norm's output without its affine."""
        h = self.conv1(F.silu(self.norm(x)))
        return F.group_norm(h, self.groups, eps=EPSILON)

    def finish(self, x: Tensor, h: Tensor, film: Tensor) -> Tensor:
        """x, prepared h `[B, W, h, w]` and film `[B, 2·W]` -> `[B, W, h, w]`."""
        gain, shift = film.unsqueeze(2).unsqueeze(3).chunk(2, 1)
        return x + self.conv2(F.silu(h * gain + shift))


class StepTransformer(nn.Module):
    """A transformer block whose film comes from outside."""

    gains: Tensor

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.heads, self.proj = block.heads, block.proj
        self.qkv, self.ffn1, self.ffn2 = block.qkv, block.ffn1, block.ffn2
        query, key = block.norm_q.gain, block.norm_k.gain
        gains = torch.stack([query / math.sqrt(len(query)), key]).unsqueeze(1)
        self.register_buffer("gains", gains, persistent=False)  # [2, 1, e]

    def forward(self, x: Tensor, film: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens `[B, N, W]`, film `[B, 4·W]`, tables `[N, e/2]` -> `[B, N, W]`."""
        gain_1, shift_1, gain_2, shift_2 = film.unsqueeze(1).chunk(4, 2)
        x = x + self.proj(self.attend(normed(x) * gain_1 + shift_1, cos, sin))
        return x + self.ffn2(F.silu(self.ffn1(normed(x) * gain_2 + shift_2)))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, a, e]
        qk = qkv[:, :, :2]
        qk = qk * ((qk * qk).mean(4, keepdim=True) + EPSILON).rsqrt() * self.gains
        qk = turn(qk, *(table.unsqueeze(1).unsqueeze(2) for table in (cos, sin)))
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        read = (q @ k.transpose(2, 3)).softmax(3) @ v
        return read.transpose(1, 2).flatten(2)


class StepLevel(nn.Module):
    """All blocks of a level, one way."""

    def __init__(self, blocks: nn.Module):
        super().__init__()
        listed = [*blocks.children()]
        self.convolves = isinstance(listed[0], ResBlock)
        kind = StepRes if self.convolves else StepTransformer
        self.blocks = nn.ModuleList(kind(block) for block in listed)

    def forward(
        self,
        x: Tensor,
        films: Iterator[Tensor],
        tables: tuple[Tensor, ...],
        branches: int | None = None,
    ) -> Tensor:
        """`[B, W, h, w]` -> the same, or of that many conditions each its own, `[K·B, W, h, w]`."""
        if self.convolves:
            for block in self.blocks:
                h = block.prepare(x)
                if branches is not None:
                    x, h, branches = spread(x, branches), spread(h, branches), None
                x = block.finish(x, h, next(films))
            return x
        if branches is not None:
            x = spread(x, branches)
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        flat = [table.flatten(0, 1) for table in tables]
        for block in self.blocks:
            tokens = block(tokens, next(films), *flat)
        return tokens.transpose(1, 2).unflatten(2, size)


class Denoise(nn.Module):
    """`sid2`: one step's eps under every condition, eps = scalings[0]·z + scalings[1]·v.

    latent z `[B, C, H, W]`, scalings `[2]`, film `[K, B, G]`, then of each level of transformers
    cosines and sines `[h, w, e/2]` -> eps `[K, B, C, H, W]`.
    """

    def __init__(self, model: SiD2):
        super().__init__()
        config = model.config
        self.embed, self.norm, self.head = model.embed, model.norm, model.head
        self.down, self.up, self.patch = model.down, model.up, config.patch
        self.enc = nn.ModuleList(StepLevel(level) for level in model.enc)
        self.mid = StepLevel(model.mid)
        self.dec = nn.ModuleList(StepLevel(level) for level in model.dec)
        self.widths = [block.film.out_features for block in blocks_of(model)]
        self.levels = attending(config)

    def forward(self, latent: Tensor, scalings: Tensor, film: Tensor, *tables: Tensor) -> Tensor:
        own = {level: tables[TABLES * i : TABLES * (i + 1)] for i, level in enumerate(self.levels)}
        films = iter(film.flatten(0, 1).split(self.widths, 1))
        h, kept = self.embed(latent), []
        for level, (blocks, down) in enumerate(zip(self.enc, self.down, strict=True)):
            first = None if level else film.shape[0]
            high = blocks(h, films, own.get(level, ()), first)
            h = down(F.avg_pool2d(high, 2))
            kept.append((high, h))
        h = self.mid(h, films, own.get(len(kept), ()), None if kept else film.shape[0])
        for level in reversed(range(len(kept))):
            high, low = kept[level]
            h = high + F.interpolate(self.up[level](h - low), scale_factor=2.0, mode="nearest")
            h = self.dec[level](h, films, own.get(level, ()))
        v = F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)
        return latent * scalings[0] + v.unflatten(0, (film.shape[0], -1)) * scalings[1]
