"""Softmax attention and its axial form over a grid. Tokens are channels-last.

Shapes: B batch, N query tokens, M memory tokens, H × W grid, d width, A heads.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(q·kᵀ / √(d/A) + mask)·v per head, then a projection; all projections have biases.

    Source: Vaswani et al., "Attention Is All You Need", eq. 1.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads = {heads} do not divide width = {width}")
        self.heads = heads
        self.dropout = dropout  # of the attention weights
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        bound = math.sqrt(1.5 / width)  # as torch.nn.MultiheadAttention, whose q, k, v are one
        for projection in (self.query, self.key, self.value):
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out.bias)

    def split(self, x: Tensor) -> Tensor:
        """`[B, N, d]` -> `[B, A, N, d/A]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries `[B, N, d]`, memory `[B, M, d]`, mask `[N, M]` added to scores -> `[B, N, d]`."""
        q, k, v = self.query(query), self.key(memory), self.value(memory)
        mask = None if mask is None else mask.to(q.dtype)  # the CPU's kernel takes no other
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(
            self.split(q), self.split(k), self.split(v), mask, dropout
        )
        return self.out(read.transpose(-3, -2).flatten(-2))


class AxialAttention(nn.Module):
    """Tokens of a row attend to each other, tokens of a column too; the two are summed.

    Both read the same input with projections of their own, or with one set where `shared`.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, shared: bool = False):
        super().__init__()
        self.row = Attention(width, heads, dropout)
        self.column = None if shared else Attention(width, heads, dropout)

    def forward(
        self, x: Tensor, row_mask: Tensor | None = None, column_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, H, W, d]`, masks `[W, W]` and `[H, H]` added to scores -> `[B, H, W, d]`."""
        rows = along(self.row, x, row_mask)
        columns = along(self.column or self.row, x.transpose(1, 2), column_mask)
        return rows + columns.transpose(1, 2)


def along(attention: Attention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over the last but one axis of `[B, L, N, d]` by itself."""
    lines = x.flatten(0, 1)
    return attention(lines, lines, mask).unflatten(0, x.shape[:2])
