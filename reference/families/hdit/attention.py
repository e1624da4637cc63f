"""Where a token of HDiT may look: everywhere, into its neighbourhood, or into its window.

Queries, keys and values are `[B, h, w, n, e]`: n heads of e channels, normalised and rotated, and
scores have no further scale. The neighbourhood is that of NATTEN (Hassani et al., 2023): exactly
K × K keys, the window moved inside at borders. It is computed in tiles with a halo, exactly, in
time and memory that grow with the number of tokens; nothing but gathers and products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 8  # queries of a tile along an axis; 4 gathers twice the keys, 16 computes twice the scores


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ)·v per head: `[..., N, n, e]`, `[..., M, n, e]`; mask `[..., 1, N, M]` bool."""
    lead = q.shape[:-3]
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q, k, v))  # [·, n, N, e]
    mask = None if mask is None else mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    read = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    return read.transpose(1, 2).unflatten(0, lead)


def everywhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All keys for every query."""
    size = q.shape[1:3]
    return attend(*(x.flatten(1, 2) for x in (q, k, v))).unflatten(1, size)


def tiles(length: int, kernel: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """An axis of tokens cut into t tiles of T queries that read blocks of X = T + K - 1 keys.

    Returns queries `[t, T]` and keys `[t, X]` as indices, and which of a block's keys a query
    sees, `[t, T, X]` bool. A ragged last tile repeats the last token.
    """
    last = length - 1
    first = torch.arange(0, length, TILE, device=device).unsqueeze(1)
    query = (first + torch.arange(TILE, device=device)).clamp(max=last)
    block = TILE + kernel - 1
    start = (first - kernel // 2).clamp(min=0).clamp(max=max(length - block, 0))
    place = start + torch.arange(block, device=device)  # [t, X], beyond the end where X > length
    window = (query - kernel // 2).clamp(0, length - kernel).unsqueeze(-1)  # [t, T, 1]
    allowed = (place.unsqueeze(1) >= window) & (place.unsqueeze(1) < window + kernel)
    return query, place.clamp(max=last), allowed


def gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[B, h, w, ...]` at rows `[t, R]` and columns `[s, C]` -> `[B, t, s, R · C, ...]`."""
    x = x.index_select(1, rows.flatten()).unflatten(1, rows.shape)
    x = x.index_select(3, columns.flatten()).unflatten(3, columns.shape)  # [B, t, R, s, C, ...]
    return x.transpose(2, 3).flatten(3, 4)


def neighbourhood(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """K × K keys for every query; needs a grid of at least K × K tokens."""
    height, width = q.shape[1:3]
    query_rows, key_rows, row_allowed = tiles(height, kernel, q.device)
    query_columns, key_columns, column_allowed = tiles(width, kernel, q.device)
    # [t, 1, T, 1, X, 1] & [1, s, 1, T, 1, X]: a key is seen where its row and its column are.
    mask = row_allowed[:, None, :, None, :, None] & column_allowed[None, :, None, :, None, :]
    mask = mask.flatten(4, 5).flatten(2, 3).unsqueeze(2)  # [t, s, 1, T·T, X·X]
    queries = gather(q, query_rows, query_columns)  # [B, t, s, T·T, n, e]
    keys, values = gather(torch.cat([k, v], -1), key_rows, key_columns).chunk(2, -1)
    read = attend(queries, keys, values, mask).unflatten(3, (TILE, TILE))
    return read.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def shifted_window(q: Tensor, k: Tensor, v: Tensor, size: int, shift: int) -> Tensor:
    """The keys of a token's window of the grid rolled by `shift`; sides are multiples of `size`.

    In the first row of windows what came around the border and what did not are apart, in the
    first column likewise.
    """
    height, width = q.shape[1:3]
    cut = (height // size, size, width // size, size)

    def windows(x: Tensor) -> Tensor:
        rolled = x.roll((shift, shift), (1, 2)).unflatten(2, cut[2:]).unflatten(1, cut[:2])
        return rolled.transpose(2, 3).flatten(3, 4)  # [B, t, s, S · S, n, e]

    def groups(count: int) -> Tensor:
        """Which tokens of an axis' windows see each other, `[t, S, S]`."""
        around = torch.zeros(count, size, dtype=torch.bool, device=q.device)
        around[0, :shift] = True
        return around.unsqueeze(1) == around.unsqueeze(2)

    rows, columns = groups(cut[0]), groups(cut[2])
    mask = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    mask = mask.flatten(4, 5).flatten(2, 3).unsqueeze(2)
    read = attend(windows(q), windows(k), windows(v), mask).unflatten(3, (size, size))
    return read.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((-shift, -shift), (1, 2))
