"""Attention of HDiT's levels in products of matrices: each token reads a block of tokens.

A grid of tokens is cut into tiles; all queries of a tile read the same block of keys, and a mask
says which of them each may see. Indices gather queries and keys in the order of the products, and
bring what was read back into the grid's: three gathers and no custom operator, exact at borders,
in time and memory that grow with the number of tokens. They depend on the size alone and are
computed once per level and step; of all that a step computes they are next to nothing.

Letters: B batch, h × w tokens, N = h · w, n heads of e channels, t × s tiles of T × T queries and
X × X keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.families.hdit.attention import TILE

MASKED = -1e4  # of a key that is not seen; scores are cosines times a scale and stay far above it


@dataclass(frozen=True)
class Axis:
    """An axis cut into tiles: queries `[t, T]`, keys `[t, X]`, seen `[t, T, X]`, place `[h]`.

    `place` is where a token's query is in the order of the tiles.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    place: Tensor


@dataclass(frozen=True)
class Tiling:
    """Queries `[t·s·T²]`, keys `[t·s·X²]` and places `[N]` in flat grids; mask `[t·s, T², X²]`."""

    queries: Tensor
    keys: Tensor
    places: Tensor
    mask: Tensor


def neighbourhood(length: int, kernel: int) -> Axis:
    """Tiles with a halo: see `reference.families.hdit.attention.tiles`."""
    index = torch.arange(length)
    last, block = index.amax(0, True), TILE + kernel - 1  # a slice of the end fixes the size
    first = (torch.arange((length + TILE - 1) // TILE) * TILE).unsqueeze(1)
    queries = torch.minimum(first + torch.arange(TILE), last)
    ends = (last + 1 - block).clamp(min=0)
    place = torch.minimum((first - kernel // 2).clamp(min=0), ends) + torch.arange(block)
    window = torch.minimum((queries - kernel // 2).clamp(min=0), last + 1 - kernel).unsqueeze(2)
    seen = (place.unsqueeze(1) >= window) & (place.unsqueeze(1) < window + kernel)
    return Axis(queries, torch.minimum(place, last), seen, index)


def windows(length: int, size: int, shift: int) -> Axis:
    """The windows of an axis rolled by `shift`; see `reference.families.hdit.attention`."""
    index = torch.arange(length)
    first = (torch.arange(length // size) * size).unsqueeze(1)
    inside = torch.arange(size)
    count = index.amax(0, True) + 1
    tokens = (first + inside - shift) % count
    around = (first == 0) & (inside < shift)
    seen = around.unsqueeze(1) == around.unsqueeze(2)
    return Axis(tokens, tokens, seen, (index + shift) % count)


def tiling(rows: Axis, columns: Axis) -> Tiling:
    """Both axes together."""
    width, side = columns.place.shape[0], rows.queries.shape[1]

    def flat(own: Tensor, other: Tensor) -> Tensor:
        """`[t, R]` and `[s, C]` -> `[t·s·R·C]`."""
        return (own[:, None, :, None] * width + other[None, :, None, :]).flatten()

    both = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None, :]
    mask = torch.where(both, 0.0, MASKED).flatten(4, 5).flatten(2, 3).flatten(0, 1)
    across = columns.queries.shape[0]
    tile = (rows.place // side).unsqueeze(1) * across + columns.place // side
    inside = (rows.place % side).unsqueeze(1) * side + columns.place % side
    places = (tile * side**2 + inside).flatten()
    return Tiling(flat(rows.queries, columns.queries), flat(rows.keys, columns.keys), places, mask)


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tiling | None) -> Tensor:
    """softmax(q·kᵀ)·v of tokens `[B, n, N, e]`, all keys being seen where there are no tiles."""
    if tiles is None:
        return (q @ k.transpose(2, 3)).softmax(3) @ v
    split = (tiles.mask.shape[0], -1)
    q = q.index_select(2, tiles.queries).unflatten(2, split)  # [B, n, t·s, T², e]
    k, v = (x.index_select(2, tiles.keys).unflatten(2, split) for x in (k, v))
    read = (q @ k.transpose(3, 4) + tiles.mask).softmax(4) @ v
    return read.flatten(2, 3).index_select(2, tiles.places)
