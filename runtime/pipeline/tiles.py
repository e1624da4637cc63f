"""Windows, bands and tiles of an image, a sample of its pixels, and how much memory they take."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array
from runtime.errors import ResourceError, UsageError
from runtime.memory import resident

Crop = tuple[int, int, int, int]  # top, left, height, width
# top, left, height, width -> float32 values of that window, `[B, channels, height, width]`.
Read = Callable[[int, int, int, int], Array]

# Ratios come from one pixel in each of 128 × 128 cells of the image. benchmarks.decode measures
# what that costs: 93 dB PSNR on the shipped model at 512x512 and 1024x1024.
SAMPLE = 128
SAMPLE_SEED = 0
SMALLEST_TILE = 64  # pixels
# A picture of fewer pixels per latent cell than the model was trained with is averaged: each pixel
# is the mean of 3 × 3 of a larger decode at least (37 dB from a decode at 16 times the size, where
# 2 × 2 are 33 and a sample is 25), and of at most as many as the smallest tile has.
FEWEST_AVERAGED, MOST_AVERAGED = 3, 8  # along a side
DENSITY = 1.5  # times the trained one: pixels per cell of what is averaged, along a side


class Window(NamedTuple):
    """A rectangle of pixels of an image."""

    top: int
    left: int
    height: int
    width: int


def window_of(crop: Crop | None, size: Size) -> Window:
    """`crop` (top, left, height, width) of an image, all of it by default; raises UsageError."""
    window = Window(*(crop or (0, 0, *size)))
    inside = min(window) >= 0 and min(window[2:]) >= 1
    if not inside or window.top + window.height > size[0] or window.left + window.width > size[1]:
        raise UsageError(
            f"crop {','.join(map(str, window))} is not inside the image of {size[0]}x{size[1]}; "
            "expected top,left,height,width of pixels in it"
        )
    return window


def windows_of(values: Array) -> Read:
    """A reader of windows of an array `[.., h, w]`, which may be mapped from a file."""

    def read(top: int, left: int, height: int, width: int) -> Array:
        return np.ascontiguousarray(values[..., top : top + height, left : left + width])

    return read


def bands(window: Window, pixels: int) -> Iterator[list[Window]]:
    """Tiles of at most `pixels` pixels that cover a window: bands from the top, left to right.

    Full rows if one fits a tile, else parts of single rows. Sides differ by one at most.
    """
    rows = max(1, pixels // window.width)
    for top, height in _parts(window.height, rows):
        columns = _parts(window.width, max(1, pixels // height))
        yield [
            Window(window.top + top, window.left + left, height, width) for left, width in columns
        ]


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """Starts and lengths of equal parts of at most `most` that cover `count`."""
    parts = -(-count // most)
    edges = [count * i // parts for i in range(parts + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def sample_places(size: Size, side: int = SAMPLE) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of at most side² pixels, one drawn from each cell of a grid of cells.

    An image of no more pixels is its own sample, in order. Drawn anew in every cell and not once
    per row and column: regular grids alias with the top frequency, and as many pixels with rows
    and columns of their own are several times nearer to the whole.
    """
    height, width = size
    down = min(height, side)
    across = min(width, side * side // down)
    down = min(height, side * side // across)
    generator = np.random.Generator(np.random.PCG64(SAMPLE_SEED))
    y, x = ((np.arange(n + 1) * count) // n for n, count in ((down, height), (across, width)))
    cells = (down, across)
    rows = generator.integers(y[:-1, None], y[1:, None], cells)
    columns = generator.integers(x[:-1], x[1:], cells)
    return rows, columns


def averaged(latent: Size, size: Size, pixels_per_latent: int) -> int:
    """How many times as high and wide as an image of `size` its decode is, to be reduced by area.

    1 from the trained ratio of pixels to latent cells on.
    """
    cells, pixels = latent[0] * latent[1], size[0] * size[1]
    short = pixels_per_latent * math.sqrt(cells / pixels)  # 1 at the trained ratio
    if short <= 1:
        return 1
    return min(max(math.ceil(DENSITY * short), FEWEST_AVERAGED), MOST_AVERAGED)


def times(window: Window, factor: int) -> Window:
    """What a window covers of an image `factor` times as high and wide."""
    return Window(*(factor * side for side in window))


def reduced(pixels: Array, factor: int) -> Array:
    """`[.., k·h, k·w]` -> `[.., h, w]`: each the mean of the k × k that it covers."""
    if factor == 1:
        return pixels
    height, width = (side // factor for side in pixels.shape[-2:])
    parts = pixels.reshape(*pixels.shape[:-2], height, factor, width, factor)
    return np.asarray(parts.mean((-3, -1), dtype=np.float32))


def fill(image: Array, bands: Iterable[Array]) -> None:
    """Put bands `[c, n, w]` from the top down into `image` `[c, h, w]`."""
    top = 0
    for band in bands:
        image[:, top : top + band.shape[1]] = band
        top += band.shape[1]


def check_memory(memory: int, bytes_per_pixel: int, pixels: int = SMALLEST_TILE) -> None:
    """Raise ResourceError where the process may not hold `memory` bytes and run so many pixels."""
    here = resident()
    needed = here + bytes_per_pixel * pixels
    if needed > memory:
        raise ResourceError(
            f"memory of {megabytes(memory)} is too small: this process holds {megabytes(here)} "
            f"and needs {megabytes(needed)} in all. Pass --memory {megabytes(needed)} or more"
        )


def megabytes(count: int) -> str:
    """Bytes as the command line takes them, rounded up."""
    return f"{-(-count // 1_000_000)}MB"
