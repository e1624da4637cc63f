"""Images of any size in constant memory: tiles, and the sums over all of them.

All that a pixel of R2IR needs to know of its image are sums over pixels: the summary of an image
is one, and the GRN ratios of a decode come from another. So tiles are drawn one by one, each as
exactly as in the whole, once the ratios are known: from a sample of the pixels, or from all.

Letters: c colours, d width, L decoder blocks, h × w pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.manifest import Array
from runtime.coordinates import Grid
from runtime.engines import Engine
from runtime.errors import ResourceError, UsageError
from runtime.memory import resident

Size = tuple[int, int]
Pixels = NDArray[np.float32]
# top, left, height, width -> float32 values of that window, `[B, channels, height, width]`.
Read = Callable[[int, int, int, int], Array]

# What a resampler may add to the process where no limit is given: at the published width, the
# sample and a tile.
DEFAULT_ROOM = 350_000_000
# Ratios come from one pixel in each of 128 × 128 cells of the image. benchmarks.decode measures
# what that costs: 93 dB PSNR on the shipped model at 512x512 and 1024x1024.
SAMPLE = 128
SAMPLE_SEED = 0
# A tile of more pixels leaves the processor's cache and is slower; powers of two down to the
# smallest, so that the same request gives the same tiles.
LARGEST_TILE, LEAST_BESIDE, SMALLEST_TILE = 4096, 1024, 64
# float32 arrays of the model's width that a graph holds per pixel at its peak, measured by
# benchmarks.decode on ONNX Runtime and rounded up.
ARRAYS_PER_PIXEL = {
    "r2ir_image_summary": 14,
    "r2ir_latent_summary": 14,
    "r2ir_encode": 24,
    "r2ir_decode": 24,
    "r2ir_render": 24,
    "r2ir_response": 31,
}
GRN_EPSILON = 1e-6  # of ConvNeXt V2's GRN, as in the graphs


class Window(NamedTuple):
    """A rectangle of pixels of an image."""

    top: int
    left: int
    height: int
    width: int


def window_of(crop: tuple[int, int, int, int] | None, size: Size) -> Window:
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


def graphs_for(size: Size, whole: bool = False) -> tuple[str, ...]:
    """What drawing an image of `size` needs of a bundle; `whole` as in `Resampler`."""
    least = ("r2ir_latent_summary", "r2ir_decode")
    sampled = size[0] * size[1] > SAMPLE * SAMPLE and not whole
    return (*least, "r2ir_render", "r2ir_response") if sampled else least


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


def bytes_needed(graph: str, width: int, pixels: int) -> int:
    """What a graph of `width` channels takes for so many pixels."""
    return 4 * width * ARRAYS_PER_PIXEL[graph] * pixels


def check_memory(
    memory: int, width: int, graphs: Iterable[str], cells: int = SMALLEST_TILE
) -> None:
    """Raise ResourceError where the process may not hold `memory` bytes and run `graphs`."""
    here = resident()
    needed = here + max(bytes_needed(graph, width, cells) for graph in graphs)
    if needed > memory:
        raise ResourceError(
            f"memory of {megabytes(memory)} is too small: this process holds {megabytes(here)} "
            f"and needs {megabytes(needed)} in all. Pass --memory {megabytes(needed)} or more"
        )


@dataclass(frozen=True)
class Resampler:
    """R2IR's graphs run over tiles: `engine` opens a graph, `width` is d.

    `room`: bytes that the graphs may take. What fits is counted, not measured, so that an image
    is drawn in the same tiles whatever was drawn before it. `whole`: no tiles, where engines run
    the sizes of whole images alone.
    """

    engine: Callable[[str], Engine]
    width: int
    room: int = DEFAULT_ROOM
    whole: bool = False

    def tile(self, *graphs: str, taken: int = 0) -> int:
        """Pixels per tile for graphs beside each other: the quickest number, or what fits."""
        pixels = LARGEST_TILE
        while pixels > SMALLEST_TILE:
            needed = sum(bytes_needed(graph, self.width, pixels) for graph in graphs)
            if needed + taken <= self.room:
                break
            pixels //= 2
        return pixels

    def at_once(self, pixels: int) -> int:
        """Bytes that `r2ir_decode` takes for a sample; 0 where a tile would not fit beside it."""
        needed = bytes_needed("r2ir_decode", self.width, pixels)
        beside = bytes_needed("r2ir_render", self.width, LEAST_BESIDE)
        return needed if needed + beside <= self.room else 0

    def summarise(
        self, graph: str, name: str, read: Read, size: Size, batch: int = 1
    ) -> dict[str, Array]:
        """kv `[B, L, d, d]` and k `[B, L, d]` of all tokens of `size`, which `read` gives by tile.

        Exact: these are sums over tokens. They are added up in float64.
        """
        engine, place = self.engine(graph), Grid(*size)
        totals: dict[str, Array] = {}
        tile = size[0] * size[1] if self.whole else max(1, self.tile(graph) // batch)
        for band in bands(window_of(None, size), tile):
            for window in band:
                values = {name: read(*window), "coordinates": place.window(*window)}
                for key, part in engine.run(values).items():
                    totals[key] = totals.get(key, 0.0) + part.astype(np.float64)
        return {key: total.astype(np.float32) for key, total in totals.items()}

    def draw(
        self, sums: Mapping[str, Array], size: Size, window: Window, exact: bool = False
    ) -> Iterator[Pixels]:
        """A window of one image of `size` in bands `[c, rows, window.width]`, from the top.

        `sums` as `r2ir_latent_summary` gives them, of one latent. `exact` takes the ratios from
        every pixel, in 2L passes, where they else come from a sample.
        """
        place = Grid(*size)
        sample = sample_places(size)[0].size
        if self.whole or (sample == size[0] * size[1] and self.at_once(sample)):
            inputs = {"coordinates": place.window(0, 0, *size), **sums}
            pixels = self.engine("r2ir_decode").run(inputs)["pixels"][0]
            top, left, height, width = window
            yield pixels[:, top : top + height, left : left + width]
            return
        response = self.response(sums, size, exact)
        engine, taken = self.engine("r2ir_render"), self.at_once(sample)
        if exact or not taken:  # the graph of the passes keeps its memory
            pixels = self.tile("r2ir_render", "r2ir_response")
        else:
            pixels = self.tile("r2ir_render", taken=taken)
        for band in bands(window, pixels):
            tiles = [
                engine.run({"coordinates": place.window(*tile), "response": response, **sums})
                for tile in band
            ]
            yield np.concatenate([tile["pixels"][0] for tile in tiles], 2)

    def response(self, sums: Mapping[str, Array], size: Size, exact: bool = False) -> Array:
        """The GRN ratios `[1, L, 2, d]` of one image of `size`, from a sample or from all of it."""
        place = Grid(*size)
        rows, columns = sample_places(size)
        if exact and rows.size < size[0] * size[1]:
            return self._counted(
                sums,
                lambda pixels: (
                    place.window(*tile)
                    for band in bands(window_of(None, size), pixels)
                    for tile in band
                ),
            )
        at = place.at(rows, columns)
        if self.at_once(rows.size):
            inputs = {"coordinates": at, **sums}
            return self.engine("r2ir_decode").run(inputs, ["response"])["response"]
        flat = at.reshape(1, -1, 4)
        return self._counted(
            sums, lambda pixels: (flat[:, i : i + pixels] for i in range(0, flat.shape[1], pixels))
        )

    def _counted(self, sums: Mapping[str, Array], parts: Callable[[int], Iterable[Array]]) -> Array:
        """The ratios over all `parts` of coordinates, one GRN after the other.

        A GRN's sum of squares needs the ratios of those before it, so each takes a pass.
        """
        blocks, width = sums["k"].shape[1:]
        response = np.ones((1, blocks, 2, width), np.float32)
        engine = self.engine("r2ir_response")
        pixels = self.tile("r2ir_render", "r2ir_response")
        for site in range(2 * blocks):
            name, total, count = f"squares_{site}", np.zeros((1, width)), 0
            for at in parts(pixels):
                inputs = {"coordinates": at, "response": response, **sums}
                tokens = at.shape[0] * at.shape[1]
                total += tokens * engine.run(inputs, [name])[name].astype(np.float64)
                count += tokens
            root = np.sqrt(total / count)
            response[:, site // 2, site % 2] = root / (root.mean() + GRN_EPSILON)
        return response


def megabytes(count: int) -> str:
    """Bytes as the command line takes them, rounded up."""
    return f"{-(-count // 1_000_000)}MB"
