"""The modules that are exported: the reference's mathematics with nothing computed twice.

What lives as long as a size, a schedule, a prompt or an image has a graph of its own, so that the
step graph holds only what changes with every step. The rewrites are in `parts.py` beside it.

Letters: B batch, K conditions, L blocks, N query and P memory tokens, d width, a heads of size e,
T text tokens, C latent channels, c colours, S schedule points, F film values per point.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from export.families.parts.layers import (
    Projection,
    ScaledFFN,
    SplitInput,
    token_mean,
    tokens_of,
)
from export.families.r2.parts import Attention, CrossAttention, response_of
from reference.families.parts.layers import AdaLN
from reference.families.r2.model import R2Models
from reference.families.r2.r2id import DecoderBlock, EncoderBlock
from reference.families.r2.r2ir import Block


class ResamplerBlock(nn.Module):
    """A block of R2IR over a summary; takes the GRN ratios from outside or from its tokens."""

    def __init__(self, block: Block):
        super().__init__()
        outer = block.block_scale
        self.attention = Attention(
            block.attention, block.attention_scale, block.attention_norm.beta
        )
        self.ffn = ScaledFFN(block.ffn, outer * block.ffn_scale, block.ffn_norm.beta)
        norms = (block.attention_norm, block.ffn_norm)
        self.slopes = nn.ParameterList(1 + norm.gamma for norm in norms)
        self.outer = nn.Parameter(outer.clone())

    def attend(self, x: Tensor, kv: Tensor, k: Tensor, ratio: Tensor) -> Tensor:
        """x `[B or 1, N, d]` and the first GRN's ratio `[B or 1, 1, d]` -> the second's input."""
        queries = self.attention.queries(x * (1 + self.slopes[0] * ratio))
        return x + self.attention.read(queries, kv, k)

    def finish(self, x: Tensor, w: Tensor, ratio: Tensor) -> Tensor:
        """x, w `[B or 1, N, d]` and the second GRN's ratio -> the block's output."""
        return x + w * self.outer + self.ffn(w * (1 + self.slopes[1] * ratio))

    def forward(
        self, x: Tensor, kv: Tensor, k: Tensor, ratios: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B or 1, N, d]` -> the block's output and both of its ratios `[B or 1, 1, d]`."""
        first = response_of(x) if ratios is None else ratios[0]
        w = self.attend(x, kv, k, first)
        second = response_of(w) if ratios is None else ratios[1]
        return self.finish(x, w, second), first, second


class ResamplerSummary(nn.Module):
    """`r2ir_image_summary` and `r2ir_latent_summary`.

    values `[B, c, h, w]`, coordinates `[h, w, 4]` -> kv `[B, L, d, d]`, k `[B, L, d]`: sums
    over the tokens, so that those of tiles add up.
    """

    def __init__(self, models: R2Models, side: str):
        super().__init__()
        r2ir = models.r2ir
        image = side == "image"
        linear = r2ir.color_in if image else r2ir.latent_in
        channels = r2ir.config.color_channels if image else r2ir.config.latent_channels
        self.features = r2ir.position
        self.project = SplitInput(linear, channels)
        blocks: Iterable[Block] = r2ir.encoder if image else r2ir.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(Attention(b.attention, b.attention_scale) for b in blocks)

    def forward(self, values: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        position = self.project.position(self.features(coordinates)).flatten(0, 1)
        memory = self.project.values(tokens_of(values)) + position
        kv, k = zip(*(block.summarise(memory) for block in self.blocks), strict=True)
        return torch.stack(kv, 1), torch.stack(k, 1)


class ResamplerRead(nn.Module):
    """`r2ir_encode`, `r2ir_decode`, `r2ir_render` and `r2ir_response`.

    coordinates `[h, w, 4]`, kv `[B, L, d, d]`, k `[B, L, d]` -> values `[B, c, h, w]` and the
    ratios `response [B, L, 2, d]`; where these are given, no sum runs over the tokens.
    """

    def __init__(self, models: R2Models, side: str):
        super().__init__()
        r2ir = models.r2ir
        latent = side == "latent"
        self.features = r2ir.position
        self.query_in = Projection(r2ir.query_in)
        self.out = Projection(r2ir.latent_out if latent else r2ir.color_out)
        blocks: Iterable[Block] = r2ir.encoder if latent else r2ir.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(ResamplerBlock(block) for block in blocks)

    def tokens(self, coordinates: Tensor) -> Tensor:
        """coordinates `[h, w, 4]` -> the queries of the first block, `[1, N, d]`."""
        return self.query_in(self.features(coordinates)).flatten(0, 1).unsqueeze(0)

    def run(
        self, coordinates: Tensor, kv: Tensor, k: Tensor, response: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.tokens(coordinates)
        batch = kv[:, 0, :1, :] * 0  # [B, 1, d]: gives the first block's ratios their batch
        found = []
        for index, block in enumerate(self.blocks):
            ratios = None
            if response is not None:
                ratios = (response[:, index, :1], response[:, index, 1:])
            x, first, second = block(x, kv[:, index], k[:, index], ratios)
            found.append(torch.cat([first + batch, second], 1))
        height, width = coordinates.shape[:2]
        values = self.out(x).tanh().transpose(1, 2).unflatten(2, (height, width))
        return values, torch.stack(found, 1)


class Encode(ResamplerRead):
    """`r2ir_encode`: -> latent `[B, C, H, W]`."""

    def forward(self, coordinates: Tensor, kv: Tensor, k: Tensor) -> Tensor:
        return self.run(coordinates, kv, k, None)[0]


class Decode(ResamplerRead):
    """`r2ir_decode`: -> pixels `[B, c, h, w]` and `response [B, L, 2, d]`."""

    def forward(self, coordinates: Tensor, kv: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(coordinates, kv, k, None)


class Render(ResamplerRead):
    """`r2ir_render`: -> pixels `[B, c, h, w]`, each on its own."""

    def forward(self, coordinates: Tensor, kv: Tensor, k: Tensor, response: Tensor) -> Tensor:
        return self.run(coordinates, kv, k, response)[0]


class Response(ResamplerRead):
    """`r2ir_response`: a tile's share of the ratios -> `squares_0`, `squares_1`, … each `[B, d]`.

    squares_i is the mean square over the tile's tokens of what the i-th GRN takes, two in a block.
    It needs the ratios of the GRNs before it alone, so one pass over the tiles finds the next.
    """

    def forward(
        self, coordinates: Tensor, kv: Tensor, k: Tensor, response: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.tokens(coordinates)
        batch = kv[:, 0, 0, :] * 0  # [B, d]: gives the first its batch
        squares = []
        for index, block in enumerate(self.blocks):
            first, second = response[:, index].split(1, 1)
            w = block.attend(x, kv[:, index], k[:, index], first)
            squares += [token_mean(t * t).squeeze(1) + batch for t in (x, w)]
            x = block.finish(x, w, second)
        return tuple(squares)


class Position(nn.Module):
    """`r2id_position`: coordinates `[H, W, 4]` -> position `[H, W, d]`, the bias included."""

    def __init__(self, models: R2Models):
        super().__init__()
        r2id = models.r2id
        self.features = r2id.position
        self.project = SplitInput(r2id.latent_in, r2id.config.latent_channels)

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.project.position(self.features(coordinates))


class SiteFilm(nn.Module):
    """The share of one AdaLN in the film: base, slope and shift of x·(base + slope·ratio) + shift.

    Its modulation of GRN is multiplied out, so that a step is left with one gain and one shift.
    """

    def __init__(self, norm: AdaLN):
        super().__init__()
        self.film = norm.film
        self.gamma, self.beta = norm.norm.gamma, norm.norm.beta

    def forward(self, film: Tensor) -> Tensor:
        """film features `[S, f]` -> base, slope and shift `[S, 3·d]`."""
        gamma, beta = self.film(film).chunk(2, 1)
        base = 1 + gamma
        return torch.cat([base, base * (1 + self.gamma), base * self.beta + beta], 1)


def norms_of(block: EncoderBlock) -> list[AdaLN]:
    """A block's AdaLNs in the order in which it uses them."""
    cross = [block.cross_norm] if isinstance(block, DecoderBlock) else []
    return [block.attention_norm, *cross, block.ffn_norm]


class Film(nn.Module):
    """`r2id_film`: alpha_bar `[S]` -> film `[S, F]`, the shares of every AdaLN in turn."""

    def __init__(self, models: R2Models):
        super().__init__()
        r2id = models.r2id
        self.time, self.film = r2id.time, r2id.film
        blocks = (*r2id.encoder, *r2id.decoder)
        self.sites = nn.ModuleList(SiteFilm(n) for block in blocks for n in norms_of(block))
        self.width = 3 * r2id.config.width * len(self.sites)

    def forward(self, alpha_bar: Tensor) -> Tensor:
        film = self.film(self.time(alpha_bar))  # [S, f]
        return torch.cat([site(film) for site in self.sites], 1)


class Condition(nn.Module):
    """`r2id_condition`: the prompt's half of every cross-attention.

    condition `[K, labels]` -> text_k `[K, L, d, a·T]`, phi(k) of each token in its head's rows,
    and text_v `[K, L, a·T, d]`, v·Wo + bo/a of each token and head.
    """

    def __init__(self, models: R2Models):
        super().__init__()
        self.label = models.condition
        blocks: Iterable[DecoderBlock] = models.r2id.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(Attention(b.cross, b.cross_scale) for b in blocks)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.label(condition)  # [K, T, d]
        ks, vs = [], []
        for block in self.blocks:
            keys = block.keys(tokens).transpose(1, 2)
            spread = keys.unsqueeze(2) * block.heads.mask.unsqueeze(2)
            ks.append(spread.flatten(2))  # [K, d, a·T]
            vs.append(block.values(tokens.unsqueeze(1)).flatten(1, 2))  # [K, a·T, d]
        return torch.stack(ks, 1), torch.stack(vs, 1)


class StepBlock(nn.Module):
    """An encoder or decoder block of R2ID; what depends on the film comes from outside."""

    def __init__(self, block: EncoderBlock, text_tokens: int):
        super().__init__()
        outer = block.block_scale
        self.attention = Attention(block.attention, block.attention_scale)
        self.ffn = ScaledFFN(block.ffn, outer * block.ffn_scale)
        self.outer = nn.Parameter(outer.clone())
        if isinstance(block, DecoderBlock):
            self.cross = CrossAttention(block.cross, text_tokens)

    def attend_self(self, x: Tensor, film: Sequence[Tensor]) -> Tensor:
        return x + self.attention.attend_self(adapt(x, film))

    def attend_text(
        self, w: Tensor, film: Sequence[Tensor], text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        return w + self.cross(adapt(w, film), text_k, text_v)

    def finish(self, x: Tensor, w: Tensor, film: Sequence[Tensor]) -> Tensor:
        return x + w * self.outer + self.ffn(adapt(w, film))


def adapt(x: Tensor, film: Sequence[Tensor]) -> Tensor:
    """AdaLN of tokens `[B, N, d]` by its share of the film: base, slope and shift, each `[d]`."""
    base, slope, shift = film
    return x * (base + slope * response_of(x)) + shift


class Denoise(nn.Module):
    """`r2id`: one step's eps under every condition.

    latent `[B, C, H, W]`, position `[H, W, d]`, film `[F]`, text_k `[K, B, L, d, a·T]`,
    text_v `[K, B, L, a·T, d]` -> eps `[K, B, C, H, W]`. Encoder blocks and the first decoder
    block's self-attention run once for all conditions.
    """

    def __init__(self, models: R2Models):
        super().__init__()
        r2id, tokens = models.r2id, models.config.condition.tokens
        self.project = SplitInput(r2id.latent_in, r2id.config.latent_channels)
        self.encoder = nn.ModuleList(StepBlock(block, tokens) for block in r2id.encoder)
        self.decoder = nn.ModuleList(StepBlock(block, tokens) for block in r2id.decoder)
        self.out = Projection(r2id.eps_out)
        self.width = r2id.config.width

    def forward(
        self, latent: Tensor, position: Tensor, film: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        x = self.project.values(tokens_of(latent)) + position.flatten(0, 1)  # [B, N, d]
        vectors = film.split(self.width)
        sites = iter([vectors[i : i + 3] for i in range(0, len(vectors), 3)])
        for block in self.encoder:
            w = block.attend_self(x, next(sites))
            x = block.finish(x, w, next(sites))
        flat = text_k.flatten(0, 1), text_v.flatten(0, 1)  # [K·B, L, ..]
        for index, block in enumerate(self.decoder):
            w = block.attend_self(x, next(sites))
            if index:
                w = block.attend_text(w, next(sites), *(text[:, index] for text in flat))
            else:  # every condition starts from the same tokens
                first = text_k[:, :, 0], text_v[:, :, 0]
                w = block.attend_text(w, next(sites), *first)  # [K, B, N, d]
                x = (x + torch.zeros_like(w)).flatten(0, 1)  # [K·B, N, d]
                w = w.flatten(0, 1)
            x = block.finish(x, w, next(sites))
        eps = self.out(x).transpose(1, 2)  # [K·B, C, N]
        height, width = latent.shape[2:]
        return eps.unflatten(2, (height, width)).unflatten(0, (text_k.shape[0], -1))
