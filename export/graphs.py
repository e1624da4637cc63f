"""The modules that are exported: the reference's mathematics with nothing computed twice.

What lives as long as a size, a schedule, a prompt or an image has a graph of its own, so that the
step graph holds only what changes with every step. Rewrites, all exact but for rounding:

- phi = relu(x) + exp(min(x, 0)): engines run it several times faster than Elu.
- Sums over tokens that are only used as ratios are means, so that they stay small at any size;
  sums that leave a graph stay sums, so that those of tiles add up, and are scaled where read.
- GRN and AdaLN scale and shift channels: x·gain + shift. The gain goes into the rows of the next
  weights and the shift into their bias, so that no pass over the tokens is left of them.
- Self-attention reads S = phi(k)ᵀ·x of the plain tokens; value and output projections act on S,
  which has as many rows as channels instead of as many as tokens.
- Cross-attention to T text tokens has rank T per head: keys and values meet once per prompt.
- Residual scales go into the weights before them.

Letters: B batch, K conditions, L blocks, M AdaLN sites, N query and P memory tokens, d width,
a heads of size e, T text tokens, C latent channels, c colours, S schedule points.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.checkpoint import Models
from reference.layers import ATTENTION_EPSILON, FFN, GRN, GRN_EPSILON, AdaLN, LinearAttention
from reference.r2id import DecoderBlock, EncoderBlock
from reference.r2ir import Block


def positive(x: Tensor) -> Tensor:
    """phi = elu + 1."""
    return x.relu() + x.clamp(max=0).exp()


def tokens_of(x: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, H · W, C]`."""
    return x.flatten(2).transpose(1, 2)


def response_of(x: Tensor) -> Tensor:
    """GRN's ratios of tokens `[B, N, d]` -> `[B, 1, d]`: root mean squares over their mean."""
    root = (x * x).mean(1, keepdim=True).sqrt()
    return root / (root.mean(2, keepdim=True) + GRN_EPSILON)


def scaled(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x·gain + shift)·weight + bias with the gain in the weight's rows.

    x `[B, N, d]`, gain and shift `[B, 1, d]` or `[1, 1, d]`, weight `[d, out]` -> `[B, N, out]`.
    """
    return x @ (gain.transpose(1, 2) * weight) + (shift @ weight + bias)


class Projection(nn.Module):
    """A linear layer as a matrix on the right, its output scaled per channel."""

    def __init__(self, linear: nn.Linear, scale: Tensor | float = 1.0):
        super().__init__()
        self.weight = nn.Parameter((linear.weight.T * scale).contiguous())  # [in, out]
        self.bias = nn.Parameter(linear.bias * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def scaled(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return scaled(x, gain, shift, self.weight, self.bias)


class Heads(nn.Module):
    """Which channel belongs to which head: `mask [d, a]` of zeros and ones."""

    mask: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        mask = torch.eye(heads).repeat_interleave(width // heads, 0)
        self.register_buffer("mask", mask, persistent=False)

    def normalise(self, q: Tensor, k: Tensor, epsilon: Tensor | float) -> Tensor:
        """phi(q) `[B or 1, N, d]` over phi(q)·k + epsilon per head, k `[B, d]` -> `[B, N, d]`."""
        total = q @ (k.unsqueeze(2) * self.mask) + epsilon  # [B, N, a]
        # Spreading a head's number over its channels by a product needs no reshape of q.
        return q * (total.reciprocal() @ self.mask.T)


class Attention(nn.Module):
    """Linear attention through a summary of its memory: kv `[B, d, d]` and k `[B, d]`.

    Head h owns e rows of kv, Σ phi(k_h)ᵀ·v_h·Wo_h: the output projection is inside.
    """

    def __init__(self, attention: LinearAttention, scale: Tensor):
        super().__init__()
        width = len(attention.query.weight)
        self.heads = Heads(width, attention.heads)
        self.query, self.key = Projection(attention.query), Projection(attention.key)
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        value, out = Projection(attention.value), Projection(attention.out, scale)
        split = (attention.heads, -1)
        by_head = value.weight.unflatten(1, split).transpose(0, 1)  # [a, d, e]
        self.value_weight = nn.Parameter(by_head.contiguous())
        self.value_bias = nn.Parameter(value.bias.unflatten(0, split).unsqueeze(1))  # [a, 1, e]
        self.out_weight = nn.Parameter(out.weight.unflatten(0, split))  # [a, e, d]
        self.out_bias = nn.Parameter(out.bias)

    def queries(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """phi(q) of x·gain + shift: `[B, N, d]`."""
        return positive(self.query_norm(self.query.scaled(x, gain, shift)))

    def fold(self, sums: Tensor, k: Tensor) -> Tensor:
        """Σ phi(k)ᵀ·y `[B, d, d]` and k = Σ phi(k) `[B, d]` -> kv `[B, d, d]`."""
        heads = self.heads.heads
        by_head = sums.unflatten(1, (heads, -1)) @ self.value_weight  # [B, a, e, e]
        by_head = by_head + k.unflatten(1, (heads, -1)).unsqueeze(3) * self.value_bias
        return (by_head @ self.out_weight).flatten(1, 2)

    def summarise(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """kv and k of memory tokens `[B, P, d]`: sums, so that those of tiles add up."""
        keys = positive(self.key_norm(self.key(memory)))
        k = keys.sum(1)
        return self.fold(keys.transpose(1, 2) @ memory, k), k

    def read(self, queries: Tensor, kv: Tensor, k: Tensor) -> Tensor:
        """What the queries find in a summary, projected and scaled: `[B, N, d]`.

        kv and k only count relative to each other, so both are brought to the size of a mean.
        """
        unit = k.mean(1, keepdim=True)  # [B, 1]
        normal = self.heads.normalise(queries, k / unit, (ATTENTION_EPSILON / unit).unsqueeze(2))
        return normal @ (kv / unit.unsqueeze(2)) + self.out_bias

    def attend_self(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Self-attention of y = x·gain + shift, in means over the plain x `[B, N, d]`."""
        keys = positive(self.key_norm(self.key.scaled(x, gain, shift)))
        count = x.shape[1]
        k = keys.mean(1)
        means = keys.transpose(1, 2) @ x / count * gain + k.unsqueeze(2) * shift
        queries = self.queries(x, gain, shift)
        normal = self.heads.normalise(queries, k, ATTENTION_EPSILON / count)
        return normal @ self.fold(means, k) + self.out_bias


class ScaledFFN(nn.Module):
    """FFN of x·gain + shift, its output times `scale`."""

    def __init__(self, ffn: FFN, scale: Tensor):
        super().__init__()
        self.up, self.down = Projection(ffn.up), Projection(ffn.down, scale)

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return self.down(F.silu(self.up.scaled(x, gain, shift)))


class Response(nn.Module):
    """GRN as a gain and a shift per channel, given its ratios."""

    def __init__(self, norm: GRN):
        super().__init__()
        self.gamma, self.beta = norm.gamma, norm.beta

    def forward(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """ratio `[B, 1, d]` -> gain `[B, 1, d]`, shift `[1, 1, d]`."""
        return 1 + (1 + self.gamma) * ratio, self.beta.view(1, 1, -1)


class ResamplerBlock(nn.Module):
    """A block of R2IR over a summary; takes the GRN ratios from outside or from its tokens."""

    def __init__(self, block: Block):
        super().__init__()
        outer = block.block_scale
        self.attention = Attention(block.attention, block.attention_scale)
        self.ffn = ScaledFFN(block.ffn, outer * block.ffn_scale)
        self.norms = nn.ModuleList([Response(block.attention_norm), Response(block.ffn_norm)])
        self.outer = nn.Parameter(outer.clone())

    def forward(
        self, x: Tensor, kv: Tensor, k: Tensor, ratios: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B or 1, N, d]` -> the block's output and both of its ratios `[B or 1, 1, d]`."""
        first = response_of(x) if ratios is None else ratios[0]
        w = x + self.attention.read(self.attention.queries(x, *self.norms[0](first)), kv, k)
        second = response_of(w) if ratios is None else ratios[1]
        out = x + w * self.outer + self.ffn(w, *self.norms[1](second))
        return out, first, second


class SplitInput(nn.Module):
    """A projection of values ‖ positional features, each half on its own."""

    def __init__(self, linear: nn.Linear, values: int):
        super().__init__()
        self.value_weight = nn.Parameter(linear.weight[:, :values].T.contiguous())
        self.position_weight = nn.Parameter(linear.weight[:, values:].T.contiguous())
        self.bias = nn.Parameter(linear.bias)

    def values(self, x: Tensor) -> Tensor:
        return x @ self.value_weight

    def position(self, features: Tensor) -> Tensor:
        return features @ self.position_weight + self.bias


class ResamplerSummary(nn.Module):
    """`r2ir_image_summary` and `r2ir_latent_summary`.

    values `[B, c, h, w]`, coordinates `[h, w, 4]` -> kv `[B, L, d, d]`, k `[B, L, d]`: sums
    over the tokens, so that those of tiles add up.
    """

    def __init__(self, models: Models, side: str):
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
    """`r2ir_encode`, `r2ir_decode` and `r2ir_render`.

    coordinates `[h, w, 4]`, kv `[B, L, d, d]`, k `[B, L, d]` -> values `[B, c, h, w]` and the
    ratios `response [B, L, 2, d]`; where these are given, no sum runs over the tokens.
    """

    def __init__(self, models: Models, side: str):
        super().__init__()
        r2ir = models.r2ir
        latent = side == "latent"
        self.features = r2ir.position
        self.query_in = Projection(r2ir.query_in)
        self.out = Projection(r2ir.latent_out if latent else r2ir.color_out)
        blocks: Iterable[Block] = r2ir.encoder if latent else r2ir.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(ResamplerBlock(block) for block in blocks)

    def run(
        self, coordinates: Tensor, kv: Tensor, k: Tensor, response: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.query_in(self.features(coordinates)).flatten(0, 1).unsqueeze(0)  # [1, N, d]
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


def adaptive_norms(models: Models) -> list[AdaLN]:
    """Every AdaLN of R2ID in the order in which the step graph meets them."""
    norms: list[AdaLN] = []
    for block in (*models.r2id.encoder, *models.r2id.decoder):
        middle = [block.cross_norm] if isinstance(block, DecoderBlock) else []
        norms += [block.attention_norm, *middle, block.ffn_norm]
    return norms


class Position(nn.Module):
    """`r2id_position`: coordinates `[H, W, 4]` -> position `[H, W, d]`, the bias included."""

    def __init__(self, models: Models):
        super().__init__()
        r2id = models.r2id
        self.features = r2id.position
        self.project = SplitInput(r2id.latent_in, r2id.config.latent_channels)

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.project.position(self.features(coordinates))


class Film(nn.Module):
    """`r2id_film`: alpha_bar `[S]` -> film `[S, M, 2, d]`, the gain and shift of every AdaLN.

    AdaLN(x) = (x·(1 + (1 + gamma)·n) + beta)·gain + shift'; beta·gain + shift' is stored.
    """

    def __init__(self, models: Models):
        super().__init__()
        self.time, self.film = models.r2id.time, models.r2id.film
        self.sites = nn.ModuleList(norm.film for norm in adaptive_norms(models))
        betas = torch.stack([norm.norm.beta for norm in adaptive_norms(models)])
        self.beta = nn.Parameter(betas)  # [M, d]

    def forward(self, alpha_bar: Tensor) -> Tensor:
        film = self.film(self.time(alpha_bar))  # [S, f]
        gamma, shift = torch.stack([site(film) for site in self.sites], 1).chunk(2, 2)
        gain = 1 + gamma  # [S, M, d]
        return torch.stack([gain, shift + self.beta * gain], 2)


class Condition(nn.Module):
    """`r2id_condition`: the prompt's half of every cross-attention.

    condition `[K, labels]` -> text_k `[K, L, d, a·T]`, phi(k) of each token in its head's rows,
    and text_v `[K, L, a·T, d]`, v·Wo of each token and head.
    """

    def __init__(self, models: Models):
        super().__init__()
        self.label = models.condition
        blocks: Iterable[DecoderBlock] = models.r2id.decoder  # type: ignore[assignment]
        self.blocks = nn.ModuleList(Attention(b.cross, b.cross_scale) for b in blocks)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.label(condition)  # [K, T, d]
        ks, vs = [], []
        for block in self.blocks:
            keys = positive(block.key_norm(block.key(tokens)))
            spread = keys.transpose(1, 2).unsqueeze(2) * block.heads.mask.unsqueeze(2)
            ks.append(spread.flatten(2))  # [K, d, a·T]
            by_head = tokens.unsqueeze(1) @ block.value_weight + block.value_bias
            vs.append((by_head @ block.out_weight).flatten(1, 2))  # [K, a·T, d]
        return torch.stack(ks, 1), torch.stack(vs, 1)


class CrossAttention(nn.Module):
    """Reads text in rank-T form: scores `[.., N, a·T]`, normalised per head, times v·Wo."""

    def __init__(self, attention: LinearAttention, scale: Tensor):
        super().__init__()
        self.heads = attention.heads
        self.query, self.query_norm = Projection(attention.query), attention.query_norm
        self.out_bias = nn.Parameter(attention.out.bias * scale)

    def forward(
        self, x: Tensor, gain: Tensor, shift: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        """x `[B', N, d]`, text_k `[.., B', d, a·T]`, text_v `[.., B', a·T, d]`."""
        queries = positive(self.query_norm(self.query.scaled(x, gain, shift)))
        scores = (queries @ text_k).unflatten(-1, (self.heads, -1))  # [.., N, a, T]
        scores = scores / (scores.sum(-1, keepdim=True) + ATTENTION_EPSILON)
        return scores.flatten(-2) @ text_v + self.out_bias


class StepBlock(nn.Module):
    """An encoder or decoder block of R2ID with gains and shifts from outside."""

    def __init__(self, block: EncoderBlock):
        super().__init__()
        outer = block.block_scale
        self.attention = Attention(block.attention, block.attention_scale)
        self.ffn = ScaledFFN(block.ffn, outer * block.ffn_scale)
        self.outer = nn.Parameter(outer.clone())
        norms = [block.attention_norm.norm, block.ffn_norm.norm]
        if isinstance(block, DecoderBlock):
            self.cross = CrossAttention(block.cross, block.cross_scale)
            norms.insert(1, block.cross_norm.norm)
        self.gammas = nn.ParameterList(1 + norm.gamma for norm in norms)

    def adapt(self, x: Tensor, film: Tensor, site: int) -> tuple[Tensor, Tensor]:
        """AdaLN of x as gain `[B, 1, d]` and shift `[1, 1, d]`; film `[sites, 2, d]`."""
        gain = (1 + self.gammas[site] * response_of(x)) * film[site, 0]
        return gain, film[site, 1].view(1, 1, -1)

    def attend_self(self, x: Tensor, film: Tensor) -> Tensor:
        return x + self.attention.attend_self(x, *self.adapt(x, film, 0))

    def attend_text(self, w: Tensor, film: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        return w + self.cross(w, *self.adapt(w, film, 1), text_k, text_v)

    def finish(self, x: Tensor, w: Tensor, film: Tensor) -> Tensor:
        return x + w * self.outer + self.ffn(w, *self.adapt(w, film, len(self.gammas) - 1))


class Denoise(nn.Module):
    """`r2id`: one step's eps under every condition.

    latent `[B, C, H, W]`, position `[H, W, d]`, film `[M, 2, d]`, text_k `[K, B, L, d, a·T]`,
    text_v `[K, B, L, a·T, d]` -> eps `[K, B, C, H, W]`. Encoder blocks and the first decoder
    block's self-attention run once for all conditions.
    """

    def __init__(self, models: Models):
        super().__init__()
        r2id = models.r2id
        self.project = SplitInput(r2id.latent_in, r2id.config.latent_channels)
        self.encoder = nn.ModuleList(StepBlock(block) for block in r2id.encoder)
        self.decoder = nn.ModuleList(StepBlock(block) for block in r2id.decoder)
        self.out = Projection(r2id.eps_out)

    def forward(
        self, latent: Tensor, position: Tensor, film: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        x = self.project.values(tokens_of(latent)) + position.flatten(0, 1)  # [B, N, d]
        films = list(film.split([len(b.gammas) for b in (*self.encoder, *self.decoder)]))
        for block in self.encoder:
            own = films.pop(0)
            x = block.finish(x, block.attend_self(x, own), own)
        for index, block in enumerate(self.decoder):
            own = films.pop(0)
            w = block.attend_self(x, own)
            text = text_k[:, :, index], text_v[:, :, index]  # [K, B, ..]
            if index:
                w = block.attend_text(w, own, *(t.flatten(0, 1) for t in text))
                x = block.finish(x, w, own)
            else:  # every condition starts from the same tokens
                w = block.attend_text(w, own, *text)  # [K, B, N, d]
                x = (x + torch.zeros_like(w)).flatten(0, 1)  # [K·B, N, d]
                x = block.finish(x, w.flatten(0, 1), own)
        eps = self.out(x).transpose(1, 2)  # [K·B, C, N]
        height, width = latent.shape[2:]
        return eps.unflatten(2, (height, width)).unflatten(0, (text_k.shape[0], -1))
