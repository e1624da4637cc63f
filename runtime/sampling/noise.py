"""Noise: every image has its own, derived from (seed, index), whatever else is drawn with it.

Two kinds, both standard normal and uncorrelated at every latent size:

- independent: numbers of each image and size; another size is another noise.
- coherent: one field of white noise per image, seen through the cells of any latent size, so
  that one seed draws the same picture at every size.

The field lies on the plane, with the latent's shorter side 1 long and its centre at the origin: a
wider latent sees more of it at its sides. A cell's noise is the field's integral over the cell
divided by the square root of its area, so a coarse cell is the sum of its finer ones, scaled.
The integral is a sum over products of Haar functions, one per axis, and each product's normal
number is a function of (seed, index, draw, channel) and of the two functions' names: the few that
a cell's edges cut are computed, and a finer field never exists.

Exact, up to rounding: unit variance and no correlation at every size, and the covariance of the
cells of two sizes, their overlap, where edges coincide, are dyadic or lie 2^-10 of the shorter
side apart: among all square sizes of 31 cells or fewer. The last level of Haar functions is split
where the edge is, not in the middle, which closes the sum; there, two closer edges of two sizes
count as more alike than they are. This alters no covariance by more than 0.015 where the shorter
sides have 64 cells or fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_SEED = (1 << 63) - 1
COHERENT = "coherent"
KINDS = (COHERENT, "independent")

DEPTH = 10  # levels of Haar functions, where the latent's cells are not smaller
HEAP_BITS = 16  # of a Haar function's 32-bit name; the rest numbers the unit of the axis
TILE = 64  # cells a side that are computed at once, which bounds memory and fits a cache
WORD = 0xFFFFFFFF
UInt = NDArray[np.uint64]


class NoiseStreams:
    """Standard normal noise for several images, float32, in numbered draws."""

    def __init__(
        self,
        seed: int | Sequence[int],
        indices: Sequence[int],
        shape: tuple[int, int, int],
        kind: str = COHERENT,
    ):
        """`seed` (one, or one per image) and `indices` in 0 … 2^63 - 1; one image's `shape`.

        `kind` is one of `KINDS`.
        """
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(indices)
        self.keys, self.shape = [*zip(seeds, indices, strict=True)], shape
        self.field = Field(shape) if kind == COHERENT else None

    def draw(self, number: int = 0) -> NDArray[np.float32]:
        """Noise `[B, C, H, W]`; 0 is what a picture starts from, n + 1 what step n may add."""
        return np.stack([self._one(*key, number) for key in self.keys])

    def _one(self, seed: int, index: int, number: int) -> NDArray[np.float32]:
        if self.field is not None:
            a, b = np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(2)
            return self.field.draw((int(a), int(b)), number)
        key = np.random.SeedSequence(seed, spawn_key=(number, *self.shape, index))
        return np.random.Generator(np.random.Philox(key)).standard_normal(self.shape, np.float32)


def refine(coarse: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Noise of the shape of `noise` `[B, C, H, W]` whose coarse part is `coarse` `[B, C, h, w]`.

    What averaging would leave of `noise` at h × w (h ≤ H, w ≤ W, one aspect) is replaced; unit
    variance without correlation in both stays so.
    """
    rows, columns = (spread(coarse.shape[axis], noise.shape[axis]) for axis in (2, 3))
    change = coarse - rows.T @ noise @ columns
    refined: NDArray[np.float32] = (noise + rows @ change @ columns.T).astype(np.float32)
    return refined


def spread(coarse: int, fine: int) -> NDArray[np.float64]:
    """`[fine, coarse]`: coarse cells in fine ones, with orthonormal columns.

    Where one size divides the other these are the cells' overlaps; else the nearest orthonormal
    matrix to them (the polar factor), as unit variance needs.
    """
    ends, starts = (np.arange(count + 1) / count for count in (fine, coarse))
    overlap = np.minimum(ends[1:, None], starts[1:]) - np.maximum(ends[:-1, None], starts[:-1])
    left, _, right = np.linalg.svd(overlap.clip(0), full_matrices=False)
    product: NDArray[np.float64] = left @ right
    return product


@dataclass(frozen=True)
class Axis:
    """Cells of an axis in Haar functions: names `[n]` uint64, orthonormal weights `[cells, n]`."""

    names: UInt
    weights: NDArray[np.float64]


class Field:
    """White noise on the plane through the cells of a latent `[C, H, W]`, a tile at a time."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape
        unit = min(shape[1:])
        self.rows, self.columns = (
            [
                haar_axis(count, unit, start, min(start + TILE, count))
                for start in range(0, count, TILE)
            ]
            for count in shape[1:]
        )

    def draw(self, key: tuple[int, int], number: int) -> NDArray[np.float32]:
        """Draw `number` of the field of `key`, two words of 32 bits: `[C, H, W]`."""
        out = np.empty(self.shape, np.float32)
        for group in range(0, self.shape[0], 4):
            for top, rows in enumerate(self.rows):
                for left, columns in enumerate(self.columns):
                    counter = (columns.names, rows.names[:, None], group // 4, number)
                    normals = normal(philox(counter, key))[: self.shape[0] - group]
                    cells = rows.weights @ normals @ columns.weights.T
                    y, x = (slice(i * TILE, (i + 1) * TILE) for i in (top, left))
                    out[group : group + 4, y, x] = cells
        return out


def haar_axis(count: int, unit: int, start: int, stop: int) -> Axis:
    """Cells `start` … `stop` - 1 of `count` cells in Haar functions.

    Cells are 1 / `unit` long, and the middle of all of them is that of the unit [0, 1].

    Functions are named 2^16 · u + heap, with u the unit of the axis that holds them (modulo
    2^16), heap 0 its constant function and 2^l + p the p-th wavelet of level l. Edges are exact
    fractions. Sides up to 2^15 are exact.
    """
    depth = min(max(DEPTH, (unit - 1).bit_length() + 2), HEAP_BITS - 1)
    edges = np.arange(start, stop + 1) * 2 + unit - count  # of 2 · unit
    whole, rest = np.divmod(edges, 2 * unit)
    fraction = rest / (2 * unit)
    names, places, integrals = [], [], []  # of functions up to edges, beside the constant ones
    for level in range(depth + 1):
        place, inside = np.divmod(rest << level, 2 * unit)
        cut = np.flatnonzero(inside)
        f = inside[cut] / (2 * unit)
        last = np.sqrt(f * (1 - f)) if level == depth else np.minimum(f, 1 - f)
        names.append((whole[cut] << HEAP_BITS) + (1 << level) + place[cut])
        places.append(cut)
        integrals.append(last * 2.0 ** (-level / 2))
    units = np.arange(whole[0], whole[-1] + 1)
    found, column = np.unique(np.concatenate(names), return_inverse=True)
    upto = np.zeros((len(edges), len(units) + len(found)))
    upto[:, : len(units)] = np.clip(whole[:, None] + fraction[:, None] - units, 0, 1)
    upto[np.concatenate(places), len(units) + column] = np.concatenate(integrals)
    every = np.concatenate([units << HEAP_BITS, found]) & WORD
    weights = np.diff(upto, axis=0) * np.sqrt(unit)
    used = np.abs(weights).max(0) > 0
    return Axis(every[used].astype(np.uint64), weights[:, used])


def philox(counter: Sequence[UInt | int], key: tuple[int, int]) -> tuple[UInt, UInt, UInt, UInt]:
    """Philox4x32-10: four random words of 32 bits per counter of four words, as uint64 arrays.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    low, shift = np.uint64(WORD), np.uint64(32)
    for turn in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        key_a = np.uint64((key[0] + turn * 0x9E3779B9) & WORD)
        key_b = np.uint64((key[1] + turn * 0xBB67AE85) & WORD)
        a, c = (second >> shift) ^ b ^ key_a, (first >> shift) ^ d ^ key_b
        b, d = second & low, first & low
    return a, b, c, d


def normal(words: Sequence[UInt]) -> NDArray[np.float64]:
    """Four words of 32 bits -> `[4, ...]` independent standard normal numbers.

    Source: Box and Muller, "A Note on the Generation of Random Normal Deviates".
    """
    uniform = [(word + 0.5) * 2.0**-32 for word in words]
    out = np.empty((4, *uniform[0].shape))
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log(uniform[pair]))
        angle = 2 * np.pi * uniform[pair + 1]
        out[pair], out[pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return out
