"""The graphs of HDiT: the reference's mathematics with nothing computed twice.

All exact but for rounding: the mapping network and the gains that it makes of noise and class
leave the step, and so do rotations and the numbers of the preconditioning; a head's scale acts on
the queries alone; patches are embedded once for all conditions; F becomes eps.

Letters: B batch, K conditions, S schedule points, C colours, h × w tokens, d width of a level,
n heads of e channels, m mapping width, G gains of all norms.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from export.families.hdit.attention import Tiling, attend, neighbourhood, tiling, windows
from export.families.parts.layers import signal_share
from export.families.parts.rotary import grid_angles
from reference.families.hdit.config import HDiTConfig, Level
from reference.families.hdit.layers import (
    EPSILON,
    AdaRMSNorm,
    FeedForward,
    Layer,
    SelfAttention,
    rotate,
    rotation_frequencies,
)
from reference.families.hdit.model import AUGMENTATIONS, HDiT


class Rotations(nn.Module):
    """`hdit_position`: coordinates `[H, W, 4]` -> of each level with attention cosines and sines.

    `[h, w, n, e/4]` each, of the angles of `reference.families.parts.rotary.grid_angles`.
    """

    def __init__(self, config: HDiTConfig):
        super().__init__()
        self.divisors = []
        for depth, level in attending(config):
            self.divisors.append(tuple(side << depth for side in config.patch))
            f = rotation_frequencies(level.width // level.head_dim, level.head_dim).float()
            self.register_buffer(f"frequencies_{depth}", f, persistent=False)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, ...]:
        height, width, found = coordinates.shape[0], coordinates.shape[1], list[Tensor]()
        for (tall, wide), f in zip(self.divisors, self.buffers(), strict=True):
            angles = grid_angles(height // tall, width // wide, f)
            found += [angles.cos(), angles.sin()]
        return tuple(found)


def attending(config: HDiTConfig) -> list[tuple[int, Level]]:
    """The levels with attention and their depth."""
    return [(i, level) for i, level in enumerate(config.levels) if level.attention != "none"]


class Scalings(nn.Module):
    """`hdit_scalings`: log_snr `[S]` -> scalings `[S, 3]`, see `Denoise`; F's factor is negative.

    With a = alpha_bar and R² = 1 - a + a·d²: 1/R, √(1 - a)/R² and -d·√a/R.
    """

    def __init__(self, config: HDiTConfig):
        super().__init__()
        self.sigma_data = config.sigma_data

    def forward(self, log_snr: Tensor) -> Tensor:
        a, rest = signal_share(log_snr), signal_share(-log_snr)
        r = (rest + a * self.sigma_data**2).rsqrt()
        return torch.stack([r, rest.sqrt() * r * r, a.sqrt() * r * -self.sigma_data], 1)


class Film(nn.Module):
    """`hdit_film`: the gains of every norm; log_snr `[S]`, condition `[K, labels]` -> `[S, K, G]`.

    Without classes log_snr alone -> `[S, G]`. The gains are in the order of `layers_of`.
    """

    null: Tensor

    def __init__(self, model: HDiT):
        super().__init__()
        self.noise, self.noise_in = model.time_emb, model.time_in_proj
        plain = model.aug_in_proj(model.aug_emb(torch.zeros(1, AUGMENTATIONS)))
        if model.config.classes:
            classes = model.class_emb.weight
            self.classes = nn.Parameter(classes[:-1] - classes[-1])
            plain = plain + classes[-1]
        self.register_buffer("null", plain, persistent=False)  # [1, m]
        self.mapping = model.mapping
        weights = [norm.linear.weight.T for layer in layers_of(model) for norm in norms_of(layer)]
        self.gains = nn.Parameter(torch.cat(weights, 1))  # [m, G]
        self.width = self.gains.shape[1]

    def forward(self, log_snr: Tensor, condition: Tensor | None = None) -> Tensor:
        e = self.noise_in(self.noise(log_snr.unsqueeze(1) / -8)) + self.null  # [S, m]
        if condition is not None:
            e = e.unsqueeze(1) + condition @ self.classes
        return self.mapping(e) @ self.gains + 1


def layers_of(model: HDiT) -> Iterator[Layer]:
    """All layers in the order of their use."""
    for level in (*model.down_levels, model.mid_level, *reversed(model.up_levels)):
        yield from level.children()


def norms_of(layer: Layer) -> list[AdaRMSNorm]:
    """A layer's norms in the order of their use."""
    own = [layer.self_attn.norm] if hasattr(layer, "self_attn") else []
    return [*own, layer.ff.norm]


def normed(x: Tensor, gain: Tensor) -> Tensor:
    """x `[B, h, w, d]` over its root mean square, times gains `[B, 1, 1, d]`."""
    return x * ((x * x).mean(3, keepdim=True) + EPSILON).rsqrt() * gain


class Attention(nn.Module):
    """x + O·attention of the normed x."""

    scale: Tensor

    def __init__(self, attention: SelfAttention):
        super().__init__()
        self.level, self.shift, self.heads = attention.level, attention.shift, attention.heads
        weight = attention.qkv_proj.weight.T
        self.qkv, self.out = nn.Parameter(weight.contiguous()), attention.out_proj
        scale = torch.stack([attention.scale, torch.ones_like(attention.scale)])
        self.register_buffer("scale", scale.unsqueeze(2), persistent=False)  # [2, n, 1]

    def tiles(self, size: tuple[int, int]) -> Tiling | None:
        """The tiles of a grid, None where every token sees every other."""
        if self.level.attention == "global":
            return None
        if self.level.attention == "neighborhood":
            return tiling(*(neighbourhood(side, self.level.window) for side in size))
        return tiling(*(windows(side, self.level.window, self.shift) for side in size))

    def forward(
        self, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tiles: Tiling | None
    ) -> Tensor:
        """Tokens `[B, h, w, d]` -> `[B, h, w, d]`."""
        qkv = (normed(x, gain) @ self.qkv).unflatten(3, (3, self.heads, -1))
        qk = qkv[:, :, :, :2]
        qk = qk * (((qk * qk).sum(5, keepdim=True) + EPSILON).rsqrt() * self.scale)
        qk = rotate(qk, (cos.unsqueeze(2), sin.unsqueeze(2)))
        q, k, v = (
            part.flatten(1, 2).transpose(1, 2)  # [B, n, N, e]
            for part in (qk[:, :, :, 0], qk[:, :, :, 1], qkv[:, :, :, 2])
        )
        read = attend(q, k, v, tiles).transpose(1, 2).flatten(2)
        return x + self.out(read).unflatten(1, (x.shape[1], x.shape[2]))


class StepLayer(nn.Module):
    """A layer whose gains come from outside."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.attention = Attention(layer.self_attn) if hasattr(layer, "self_attn") else None
        self.feed: FeedForward = layer.ff

    def forward(
        self, x: Tensor, gains: Iterator[Tensor], rotation: tuple[Tensor, ...], tiles: Tiling | None
    ) -> Tensor:
        if self.attention is not None:
            x = self.attention(x, next(gains), *rotation, tiles)
        return x + self.feed.feed(normed(x, next(gains)))


class StepLevel(nn.Module):
    """All layers of a level, one way; layers that look alike share their tiles."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        listed = [StepLayer(layer) for layer in layers.children()]
        self.layers, self.attentions = nn.ModuleList(listed), [own.attention for own in listed]

    def forward(self, x: Tensor, gains: Iterator[Tensor], rotation: tuple[Tensor, ...]) -> Tensor:
        size = x.shape[1], x.shape[2]
        alike = {own.shift: own for own in self.attentions if own is not None}
        known = {shift: own.tiles(size) for shift, own in alike.items()}
        for layer, own in zip(self.layers, self.attentions, strict=True):
            x = layer(x, gains, rotation, known[own.shift] if own is not None else None)
        return x


class Denoise(nn.Module):
    """`hdit`: one step's eps under every condition, eps = scalings[1]·z + scalings[2]·F.

    latent z `[B, C, H, W]`, scalings `[3]` of which the first acts on F's input, film `[K, B, G]`
    (or `[G]` without classes), then of each level with attention cosines and sines
    `[h, w, n, e/4]` -> eps `[K, B, C, H, W]`.
    """

    def __init__(self, model: HDiT):
        super().__init__()
        self.patch_in, self.patch_out = model.patch_in, model.patch_out
        self.merges, self.splits = model.merges, model.splits
        self.down = nn.ModuleList(StepLevel(level) for level in model.down_levels)
        self.middle = StepLevel(model.mid_level)
        self.up = nn.ModuleList(StepLevel(level) for level in model.up_levels)
        self.out_gain = nn.Parameter(model.out_norm.scale.clone())
        self.widths = [len(n.linear.weight) for layer in layers_of(model) for n in norms_of(layer)]
        self.depths = [depth for depth, _ in attending(model.config)]

    def forward(self, latent: Tensor, scalings: Tensor, film: Tensor, *rotations: Tensor) -> Tensor:
        film = film if film.dim() == 3 else film.reshape(1, 1, -1)
        turns = {depth: rotations[2 * i : 2 * i + 2] for i, depth in enumerate(self.depths)}
        gains = iter(film.flatten(0, 1)[:, None, None].split(self.widths, 3))
        x = self.patch_in((latent * scalings[0]).movedim(1, -1))
        branches = film.shape[0]
        x = x.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1)  # [K·B, h, w, d]
        skips = []
        for depth, (level, merge) in enumerate(zip(self.down, self.merges, strict=True)):
            x = level(x, gains, turns.get(depth, ()))
            skips.append(x)
            x = merge(x)
        x = self.middle(x, gains, turns.get(len(skips), ()))
        for depth in reversed(range(len(skips))):
            x = self.splits[depth](x, skips[depth])
            x = self.up[depth](x, gains, turns.get(depth, ()))
        f = self.patch_out(normed(x, self.out_gain)).movedim(-1, 1)
        return latent * scalings[1] + f.unflatten(0, (branches, -1)) * scalings[2]
