"""The parts that R2IR and R2ID share. Tokens are channels-last: `[B, N, d]`.

Shapes: B batch, N query tokens, M memory tokens, d width, H heads, e = d / H, f film width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRN_EPSILON = 1e-6
ATTENTION_EPSILON = 1e-8


class GRN(nn.Module):
    """Global response normalisation over the tokens (ConvNeXt V2, eq. 1 to 3).

    g_c = L2 norm of channel c over all tokens, n_c = g_c / (mean_c g + 1e-6);
    out = (1 + gamma) · x · n + beta + x.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x.float(), dim=-2, keepdim=True)  # [B, 1, d]
        ratio = response / (response.mean(-1, keepdim=True) + GRN_EPSILON)
        return x * (1 + (1 + self.gamma) * ratio) + self.beta


class AdaLN(nn.Module):
    """GRN(x) · (1 + gamma') + beta', with [gamma', beta'] = Linear(film)."""

    def __init__(self, width: int, film_dim: int):
        super().__init__()
        self.norm = GRN(width)
        self.film = nn.Linear(film_dim, 2 * width)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        gamma, beta = self.film(film).unsqueeze(-2).chunk(2, -1)  # [B, 1, d] each
        return self.norm(x) * (1 + gamma) + beta


def positive(x: Tensor) -> Tensor:
    """phi = elu + 1, the positive feature map of linear attention."""
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """out = Wo · phi(q)·S / (phi(q)·s + 1e-8), S = Σ phi(k) vᵀ and s = Σ phi(k) per head.

    q and k are normalised over all channels before the head split.
    Source: Katharopoulos et al., "Transformers are RNNs", eq. 5.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads = {heads} do not divide width = {width}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        """`[B, N, d]` -> `[B, H, N, e]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def summarise(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over memory tokens `[B, M, d]`: S `[B, H, e, e]` and s `[B, H, e]`."""
        key = self.split(positive(self.key_norm(self.key(memory))))  # [B, H, M, e]
        value = self.split(self.value(memory))
        return key.transpose(-2, -1) @ value, key.sum(-2)

    def attend(self, query: Tensor, kv: Tensor, k: Tensor) -> Tensor:
        """Read the sums with queries `[B, N, d]` -> `[B, N, d]`."""
        q = self.split(positive(self.query_norm(self.query(query))))  # [B, H, N, e]
        read = (q @ kv) / (q @ k.unsqueeze(-1) + ATTENTION_EPSILON)
        return self.dropout(self.out(read.transpose(-3, -2).flatten(-2)))

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.attend(query, *self.summarise(memory))


class FFN(nn.Module):
    """Linear d -> 4d, SiLU, Linear 4d -> d, for each token."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.up(x))))


def scale(width: int, value: float) -> nn.Parameter:
    """A learnt scale per channel, `[d]`."""
    return nn.Parameter(torch.full((width,), value))
