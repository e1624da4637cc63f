"""The graphs of SIID and S2ID: the reference's mathematics with nothing computed twice.

All exact but for rounding:

- A grid's positions are those of its rows and of its columns, and so are their Fourier features,
  of which sin² + cos² leaves the mean square ½: the norm over the grid needs the mean alone.
- A norm's affine and what the film makes of it are one gain and one shift per schedule point.
- Rows and columns share one projection to queries, keys and values; a key's bias adds the same to
  all scores of a query, which softmax ignores; 1/√e and the residual scales are in the weights.
- The mask -½·(x_i - x_j)²/σ² is x_i/σ · x_j/σ - ½·(x_j/σ)², constants of a query left out: two
  more channels of queries and keys.
- Keys of the text meet the queries' weights, and its values the output's, once per prompt. One
  token is read whole whatever the query: the cross-attention is then a vector of the prompt's.

Letters: B batch, K conditions, S schedule points, H × W pixels, h × w tokens, N = h · w, d width,
A heads of size e, T text tokens, D decoder blocks, F film values per point.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from export.families.parts.layers import Projection, ScaledFFN, SplitInput, token_mean
from reference.families.parts.attention import Attention, AxialAttention
from reference.families.parts.axial import AxialDenoiser, DecoderBlock, EncoderBlock, FilmNorm
from reference.families.parts.text import LabelCondition

NORM_EPSILON = 1e-5


class Position(nn.Module):
    """`NAME_position`: coordinates `[H, W, 4]` -> shares of rows `[h, d]` and columns `[w, d]`.

    A token's position is their sum, which at 1024×1024 pixels is half a gigabyte. Where there are
    masks also the tokens' places in the square system, x `[w]` and y `[h]`.
    """

    frequencies: Tensor

    def __init__(self, model: AxialDenoiser):
        super().__init__()
        self.fold, self.masked = model.fold, is_masked(model)
        self.register_buffer("frequencies", model.position.frequencies, persistent=False)
        weight = SplitInput(model.color_in, model.config.channels * model.fold**2)
        count, affine = len(self.frequencies), model.position.norm
        by_system = weight.position_weight.unflatten(0, (2, 4, count))
        gains = affine.weight.unflatten(0, (4, count)).unsqueeze(-1)
        scaled = by_system * gains  # [system, sin x · sin y · cos x · cos y, F, d]
        self.along_x = nn.Parameter(scaled[:, 0::2].flatten(1, 2).contiguous())  # [2, 2F, d]
        self.along_y = nn.Parameter(scaled[:, 1::2].flatten(1, 2).contiguous())
        self.total = nn.Parameter(scaled.sum((1, 2)))  # [2, d], what a mean of 1 takes away
        shifts = affine.bias.unflatten(0, (4, count)).unsqueeze(-1)
        self.bias = nn.Parameter(weight.bias + (by_system * shifts).sum((0, 1, 2)))

    def places(self, ends: Tensor) -> Tensor:
        """Places `[n · fold, 2]` of pixels along an axis -> those of n tokens between its ends."""
        if self.fold == 1:
            return ends
        index = torch.arange(ends.shape[0] // self.fold, dtype=ends.dtype)
        share = (index / index.amax(0, True).clamp(min=1)).unsqueeze(1)
        first, last = ends.amin(0, True), ends.amax(0, True)  # a slice of the end fixes the size
        return first + share * (last - first)

    def waves(self, places: Tensor) -> Tensor:
        """`[n, 2]` -> sines and cosines `[2, n, 2F]` in both systems."""
        angles = places.T.unsqueeze(2) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 2)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, ...]:
        rows = self.places(coordinates[:, 0, 1::2])  # [h, 2]: square y, edge y
        columns = self.places(coordinates[0, :, 0::2])
        wave_y, wave_x = self.waves(rows), self.waves(columns)
        mean = (wave_y.mean((1, 2)) + wave_x.mean((1, 2))) / 2  # [2]
        scale = (0.5 - mean * mean + NORM_EPSILON).rsqrt().reshape(2, 1, 1)
        along_y = (wave_y @ self.along_y * scale).sum(0)  # [h, d]
        along_x = (wave_x @ self.along_x * scale).sum(0)
        constant = self.bias - (self.total * (mean.unsqueeze(1) * scale.squeeze(2))).sum(0)
        shares = along_y + constant, along_x
        return (*shares, columns[:, 0], rows[:, 0]) if self.masked else shares


def is_masked(model: AxialDenoiser) -> bool:
    """Does attention fade with the distance in some block?"""
    return any(hasattr(block, "mask_width") for block in model.encoder)


class SiteFilm(nn.Module):
    """A norm's share of the film: gain and shift of what is normalised."""

    def __init__(self, norm: FilmNorm):
        super().__init__()
        self.film, self.norm = norm.film, norm.norm

    def forward(self, film: Tensor) -> Tensor:
        """film features `[S, f]` -> `[S, 2·d]`."""
        gamma, beta = self.film(film).chunk(2, 1)
        gain = 1 + gamma
        return torch.cat([gain * self.norm.weight, gain * self.norm.bias + beta], 1)


class Film(nn.Module):
    """`NAME_film`: alpha_bar `[S]` -> film `[S, F]`, the shares of every norm in turn."""

    def __init__(self, model: AxialDenoiser, tokens: int):
        super().__init__()
        self.time, self.film = model.time, model.film
        blocks: Iterable[EncoderBlock] = (*model.encoder, *model.decoder)
        self.sites = nn.ModuleList(SiteFilm(n) for b in blocks for n in norms_of(b, tokens))
        self.width = 2 * model.config.width * len(self.sites)

    def forward(self, alpha_bar: Tensor) -> Tensor:
        film = self.film(self.time(alpha_bar))
        return torch.cat([site(film) for site in self.sites], 1)


def norms_of(block: EncoderBlock, tokens: int) -> list[FilmNorm]:
    """A block's norms in the order of their use; one text token is read without a norm."""
    cross = [block.cross_norm] if isinstance(block, DecoderBlock) and tokens > 1 else []
    return [block.attention_norm, *cross, block.ffn_norm]


class TextBlock(nn.Module):
    """A decoder block's reading of the text, as far as the prompt alone decides it."""

    def __init__(self, cross: Attention, scale: Tensor):
        super().__init__()
        self.heads, width = cross.heads, len(scale)
        self.key, self.value = Projection(cross.key), Projection(cross.value)
        out = Projection(cross.out, scale)
        e = width // cross.heads
        self.out_weight = nn.Parameter(out.weight.unflatten(0, (cross.heads, e)))  # [A, e, d]
        self.out_bias = nn.Parameter(out.bias / cross.heads)
        query = Projection(cross.query, 1 / math.sqrt(e))
        by_head = query.weight.T.unflatten(0, (cross.heads, e)).contiguous()
        self.query_weight = nn.Parameter(by_head)  # [A, e, d]
        self.query_bias = nn.Parameter(query.bias.unflatten(0, (cross.heads, e)).unsqueeze(2))

    def split(self, x: Tensor) -> Tensor:
        """`[K, T, d]` -> `[K, A, T, e]`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def values(self, tokens: Tensor) -> Tensor:
        """What each head and token adds: `[K, T, d]` -> `[K, A, T, d]`."""
        return self.split(self.value(tokens)) @ self.out_weight + self.out_bias

    def keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`[K, T, d]` -> what queries' inputs meet `[K, A, T, d]` and a constant `[K, A, T]`."""
        keys = self.split(self.key(tokens))
        return keys @ self.query_weight, (keys @ self.query_bias).squeeze(3)


class Text(nn.Module):
    """`NAME_condition` with several tokens.

    condition `[K, labels]` -> text_k `[K, D, d, A·T]`, text_bias `[K, D, A·T]` and text_v
    `[K, D, A·T, d]`.
    """

    def __init__(self, model: AxialDenoiser, condition: LabelCondition):
        super().__init__()
        self.label = condition
        blocks: Iterable[DecoderBlock] = model.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(TextBlock(b.cross, b.cross_scale) for b in blocks)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        tokens, ks, biases, vs = self.label(condition), [], [], []
        for block in self.blocks:
            k, bias = block.keys(tokens)
            ks.append(k.flatten(1, 2).transpose(1, 2))
            biases.append(bias.flatten(1, 2))
            vs.append(block.values(tokens).flatten(1, 2))
        return torch.stack(ks, 1), torch.stack(biases, 1), torch.stack(vs, 1)


class OneToken(Text):
    """`NAME_condition` with one token: condition `[K, labels]` -> text `[K, D, d]`."""

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        tokens = self.label(condition)
        return (torch.stack([b.values(tokens).sum((1, 2)) for b in self.blocks], 1),)


class GroupNorm(nn.Module):
    """Tokens less their groups' means over their groups' deviations, then a gain and a shift."""

    groups: Tensor

    def __init__(self, norm: FilmNorm):
        super().__init__()
        count, width = norm.norm.num_groups, norm.norm.num_channels
        size = width // count
        mean = torch.block_diag(*[torch.full((size, size), 1 / size)] * count)
        self.register_buffer("groups", mean, persistent=False)

    def forward(self, x: Tensor, film: Sequence[Tensor]) -> Tensor:
        """x `[B, N, d]`, gain and shift `[d]` each -> `[B, N, d]`."""
        mean, scale = self.parts(x, film[0])
        return (x - mean) * scale + film[1]

    def parts(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """x `[B, N, d]` -> means, and what scales the difference from them, `[B, 1, d]` each."""
        mean = token_mean(x) @ self.groups
        far = x - mean
        variance = token_mean(far * far) @ self.groups
        return mean, (variance + NORM_EPSILON).rsqrt() * gain


class Lines(nn.Module):
    """Attention of each line of tokens to itself; with `mask` its logit of σ."""

    def __init__(self, attention: Attention, scale: Tensor, mask: Tensor | None = None):
        super().__init__()
        self.heads = attention.heads
        query = Projection(attention.query, (len(scale) // attention.heads) ** -0.5)
        key, value = Projection(attention.key), Projection(attention.value)
        out = Projection(attention.out, scale)
        self.weight = nn.Parameter(torch.cat([query.weight, key.weight, value.weight], 1))
        nothing = torch.zeros_like(key.bias)
        self.bias = nn.Parameter(torch.cat([query.bias, nothing], 0))
        # A mean of values with a bias is that of the values and the bias.
        self.out_weight, self.out_bias = (
            out.weight,
            nn.Parameter(out.bias + value.bias @ out.weight),
        )
        self.sharpness = None if mask is None else nn.Parameter(1 / mask.sigmoid())

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Lines `[B, L, N, d]` of tokens at places `[N]`, if masked -> `[B, L, N, d]`."""
        width = x.shape[3]
        projected = x @ self.weight
        queries_keys = projected[..., : 2 * width] + self.bias
        qk = queries_keys.unflatten(3, (2, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k = qk[0], qk[1]  # [B, L, A, N, e]
        v = projected[..., 2 * width :].unflatten(3, (self.heads, -1)).transpose(2, 3)
        if self.sharpness is not None and places is not None:
            at = places * self.sharpness
            far, one = -0.5 * at * at, torch.ones_like(at)
            q = torch.cat([q, channels(at, one, q)], 4)
            k = torch.cat([k, channels(at, far, k)], 4)
        read = (q @ k.transpose(3, 4)).softmax(4) @ v
        return read.transpose(2, 3).flatten(3) @ self.out_weight + self.out_bias


def channels(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Two channels `[N]` each for every line and head of `[B, L, A, N, e]`: `[B, L, A, N, 2]`."""
    return torch.stack([first, second], 1) + torch.zeros_like(like[..., :1])


Size = tuple[int, int]
Places = tuple[Tensor | None, Tensor | None]  # of columns [w] and of rows [h]


class StepBlock(nn.Module):
    """An encoder or decoder block; what depends on the film or the prompt comes from outside."""

    def __init__(self, block: EncoderBlock, tokens: int):
        super().__init__()
        attention: AxialAttention = block.attention
        scale, mask = block.attention_scale, getattr(block, "mask_width", None)
        self.norm, self.ffn_norm = GroupNorm(block.attention_norm), GroupNorm(block.ffn_norm)
        self.rows = Lines(attention.row, scale, mask)
        self.columns = Lines(attention.column or attention.row, scale, mask)
        self.ffn = ScaledFFN(block.ffn, block.ffn_scale)
        self.outer = nn.Parameter(block.block_scale.clone())
        if isinstance(block, DecoderBlock) and tokens > 1:
            self.cross_norm, self.tokens = GroupNorm(block.cross_norm), tokens

    def attend(self, x: Tensor, film: Sequence[Tensor], size: Size, at: Places) -> Tensor:
        """x `[B, N, d]` on a grid of `size`, whose places are `at` where it has masks."""
        grid = self.norm(x, film).unflatten(1, size)
        read = self.rows(grid, at[0])
        read = read + self.columns(grid.transpose(1, 2), at[1]).transpose(1, 2)
        return x + read.flatten(1, 2)

    def read_text(
        self, w: Tensor, film: Sequence[Tensor], k: Tensor, bias: Tensor, v: Tensor
    ) -> Tensor:
        """w `[B', N, d]`, k `[.., B', d, A·T]`, bias `[.., B', A·T]`, v `[.., B', A·T, d]`."""
        # The norm acts on the few keys, not on all tokens.
        mean, scale = self.cross_norm.parts(w, film[0])
        constant = (film[1] - mean * scale) @ k + bias.unsqueeze(-2)
        scores = w @ (scale.transpose(1, 2) * k) + constant
        shares = scores.unflatten(-1, (-1, self.tokens)).softmax(-1).flatten(-2)
        return w + shares @ v

    def finish(self, x: Tensor, w: Tensor, film: Sequence[Tensor]) -> Tensor:
        """The block's output of its input and of what its attentions made of it."""
        return x + self.outer * (w + self.ffn(self.ffn_norm(w, film)))


class Denoise(nn.Module):
    """`NAME`: one step's eps under every condition.

    latent `[B, C, H, W]`, positions of rows `[h, d]` and columns `[w, d]`, film `[F]` and what the
    prompt's graph gives, its axes beginning with `[K, B]` -> eps `[K, B, C, H, W]`. Encoder blocks
    and the first decoder block's self-attention run once for all conditions.
    """

    def __init__(self, model: AxialDenoiser, tokens: int):
        super().__init__()
        self.fold, self.width = model.fold, model.config.width
        self.project = SplitInput(model.color_in, model.config.channels * model.fold**2)
        self.encoder = nn.ModuleList(StepBlock(block, tokens) for block in model.encoder)
        self.decoder = nn.ModuleList(StepBlock(block, tokens) for block in model.decoder)
        self.out, self.one_token = Projection(model.eps_out), tokens == 1

    def forward(
        self,
        latent: Tensor,
        rows: Tensor,
        columns: Tensor,
        film: Tensor,
        text: Tensor,
        bias: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        return self.run(latent, (rows, columns), (None, None), film, text, bias, values)

    def run(
        self,
        latent: Tensor,
        position: tuple[Tensor, Tensor],
        at: Places,
        film: Tensor,
        *given: Tensor | None,
    ) -> Tensor:
        """As `forward`; `at` as in `StepBlock`."""
        text = [part for part in given if part is not None]
        rows, columns = position
        size = rows.shape[0], columns.shape[0]
        where = (rows.unsqueeze(1) + columns.unsqueeze(0)).flatten(0, 1)
        tokens = self.project.values(self.folded(latent)) + where
        vectors = film.split(self.width)
        sites = iter([vectors[i : i + 2] for i in range(0, len(vectors), 2)])
        for block in self.encoder:
            w = block.attend(tokens, next(sites), size, at)
            tokens = block.finish(tokens, w, next(sites))
        for index, block in enumerate(self.decoder):
            w = block.attend(tokens, next(sites), size, at)
            own = [part[:, :, index] for part in text]
            if index:
                own = [part.flatten(0, 1) for part in own]
            w = (
                w + own[0].unsqueeze(-2)
                if self.one_token
                else block.read_text(w, next(sites), *own)
            )
            if not index:  # every condition starts from the same tokens
                tokens = (tokens + w.new_zeros((w.shape[0], w.shape[1], 1, 1))).flatten(0, 1)
                w = w.flatten(0, 1)
            tokens = block.finish(tokens, w, next(sites))
        eps = self.out(tokens).unflatten(1, size)
        return self.unfolded(eps).unflatten(0, (text[0].shape[0], -1))

    def folded(self, latent: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, N, C·r²]`, the colours outermost."""
        if self.fold == 1:
            return latent.flatten(2).transpose(1, 2)
        cut = latent.unflatten(3, (-1, self.fold)).unflatten(2, (-1, self.fold))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unfolded(self, eps: Tensor) -> Tensor:
        """`[K·B, h, w, C·r²]` -> `[K·B, C, H, W]`."""
        if self.fold == 1:
            return eps.permute(0, 3, 1, 2)
        cut = eps.unflatten(3, (-1, self.fold, self.fold))
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class MaskedDenoise(Denoise):
    """`Denoise` with masks: takes the tokens' places x `[w]` and y `[h]` before the film."""

    def forward(  # type: ignore[override]
        self,
        latent: Tensor,
        rows: Tensor,
        columns: Tensor,
        x: Tensor,
        y: Tensor,
        film: Tensor,
        text: Tensor,
        bias: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        return self.run(latent, (rows, columns), (x, y), film, text, bias, values)
