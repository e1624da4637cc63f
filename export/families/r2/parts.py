"""What the exported modules are made of, and the rewrites that make them fast.

All exact but for rounding:

- phi = relu(x) + exp(x - relu(x)): engines run it several times faster than Elu.
- Sums over tokens that are only used as ratios are means, so that they stay small at any size;
  sums that leave a graph stay sums, so that those of tiles add up, and are scaled where read.
- AdaLN is x·gain + shift, its gain and shift as vectors of channels. R2IR's shifts are constants
  and go through the next weights into their biases; R2ID's change with every step and are added to
  the tokens, so that all weights and biases are constants, which engines pack, quantise and fuse.
- Self-attention reads S = phi(k)ᵀ·x of the plain tokens; value and output projections act on S,
  which has as many rows as channels instead of as many as tokens.
- What a head reads is a weighted mean, and the mean of a constant is the constant: the biases of
  value and output projections become a row of the output weights, which k multiplies.
- Cross-attention to T text tokens has rank T per head: keys and values meet once per prompt.
- Residual scales go into the weights before them.

Letters as in `graphs.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.parts.layers import Projection, token_mean
from reference.families.parts.layers import ATTENTION_EPSILON, GRN_EPSILON, LinearAttention


def positive(x: Tensor) -> Tensor:
    """phi = elu + 1."""
    above = x.relu()
    return above + (x - above).exp()


def response_of(x: Tensor) -> Tensor:
    """GRN's ratios of tokens `[B, N, d]` -> `[B, 1, d]`: root mean squares over their mean."""
    root = token_mean(x * x).sqrt()
    return root / (root.mean(2, keepdim=True) + GRN_EPSILON)


class Heads(nn.Module):
    """Which channel belongs to which head: `mask [d, a]` of zeros and ones."""

    mask: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.count = heads
        mask = torch.eye(heads).repeat_interleave(width // heads, 0)
        self.register_buffer("mask", mask, persistent=False)

    def spread(self, k: Tensor) -> Tensor:
        """`[B, d, 1]` -> `[B, d, a]`: each channel in its head's column."""
        return k * self.mask

    def normalise(self, q: Tensor, spread: Tensor, epsilon: Tensor | float) -> Tensor:
        """phi(q) `[B or 1, N, d]` over phi(q)·k + epsilon per head -> `[B, N, d]`."""
        # Spreading a head's number over its channels by a product needs no reshape of q.
        return q / ((q @ spread + epsilon) @ self.mask.T)


class Attention(nn.Module):
    """Linear attention through a summary of its memory: kv `[B, d, d]` and k `[B, d]`.

    Head h owns e rows of kv, Σ phi(k_h)ᵀ·(v_h·Wo_h + bo/a): the output projection is inside.
    `shift` is what the queries' input lacks (see Projection).
    """

    def __init__(self, attention: LinearAttention, scale: Tensor, shift: Tensor | None = None):
        super().__init__()
        width = len(attention.query.weight)
        self.heads = Heads(width, attention.heads)
        self.query, self.key = Projection(attention.query, 1.0, shift), Projection(attention.key)
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        value, out = Projection(attention.value), Projection(attention.out, scale)
        split = (attention.heads, -1)
        by_head = value.weight.unflatten(1, split).transpose(0, 1)  # [a, d, e]
        self.value_weight = nn.Parameter(by_head.contiguous())
        out_weight = out.weight.unflatten(0, split)  # [a, e, d]
        # What every head's summary gains per unit of k: bv_h·Wo_h + bo/a.
        constant = value.bias.unflatten(0, split).unsqueeze(1) @ out_weight
        constant = constant + out.bias / attention.heads  # [a, 1, d]
        self.out_weight = nn.Parameter(torch.cat([out_weight, constant], 1))  # [a, e + 1, d]

    def values(self, x: Tensor) -> Tensor:
        """v·Wo + bo/a of each head: x `[.., 1, n, d]` -> `[.., a, n, d]`."""
        return F.pad(x @ self.value_weight, (0, 1), value=1.0) @ self.out_weight

    def queries(self, x: Tensor) -> Tensor:
        """phi(q): `[B, N, d]`."""
        return positive(self.query_norm(self.query(x)))

    def keys(self, x: Tensor) -> Tensor:
        """phi(k): `[B, P, d]`."""
        return positive(self.key_norm(self.key(x)))

    def fold(self, sums: Tensor, k: Tensor, count: int = 1) -> Tensor:
        """kv `[B, d, d]` of Σ phi(k)ᵀ·x `[B, d, d]` over `count` and k `[B, d, 1]`."""
        split = (self.heads.count, -1)
        by_head = sums.unflatten(1, split) @ self.value_weight / count  # [B, a, e, e]
        return (torch.cat([by_head, k.unflatten(1, split)], 3) @ self.out_weight).flatten(1, 2)

    def summarise(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """kv and k of memory tokens `[B, P, d]`: sums, so that those of tiles add up."""
        keys = self.keys(memory)
        k = keys.sum(1)
        return self.fold(keys.transpose(1, 2) @ memory, k.unsqueeze(2)), k

    def read(self, queries: Tensor, kv: Tensor, k: Tensor) -> Tensor:
        """What the queries find in a summary, projected and scaled: `[B, N, d]`.

        kv and k only count relative to each other, so both are brought to the size of a mean.
        """
        k = k.unsqueeze(2)
        unit = k.mean(1, keepdim=True)  # [B, 1, 1]
        spread = self.heads.spread(k / unit)
        return self.heads.normalise(queries, spread, ATTENTION_EPSILON / unit) @ (kv / unit)

    def attend_self(self, x: Tensor) -> Tensor:
        """Self-attention of x `[B, N, d]`, its sums over tokens as means."""
        keys, count = self.keys(x), x.shape[1]
        k = token_mean(keys).transpose(1, 2)
        kv = self.fold(keys.transpose(1, 2) @ x, k, count)
        spread = self.heads.spread(k)
        return self.heads.normalise(self.queries(x), spread, ATTENTION_EPSILON / count) @ kv


class CrossAttention(nn.Module):
    """Reads text in rank-T form: scores `[.., N, a·T]`, normalised per head, times v·Wo."""

    same_head: Tensor

    def __init__(self, attention: LinearAttention, tokens: int):
        super().__init__()
        self.query, self.query_norm = Projection(attention.query), attention.query_norm
        blocks = torch.block_diag(*[torch.ones(tokens, tokens)] * attention.heads)
        self.register_buffer("same_head", blocks, persistent=False)

    def forward(self, x: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        """x `[B', N, d]`, text_k `[.., B', d, a·T]`, text_v `[.., B', a·T, d]`."""
        scores = positive(self.query_norm(self.query(x))) @ text_k
        return scores / (scores @ self.same_head + ATTENTION_EPSILON) @ text_v
