"""A resampler's graphs, each found by what it does, run over tiles of an image.

All that a pixel needs to know of its image are sums over pixels: the summary of an image is one,
and the ratios of a decode's global response normalisations (GRN) come from another. So tiles are
drawn one by one, each as exactly as in the whole, once the ratios are known: from a sample of the
pixels, or from all. What a summary gives is handed on by name.

Letters: c colours, d width, L decoder blocks, h × w pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.bundle.manifest import FILE_NAME, REBUILD, Array, GraphSpec, Manifest
from runtime.coordinates import Grid
from runtime.errors import ArtefactError
from runtime.pipeline.opened import Engines
from runtime.pipeline.tiles import (
    SMALLEST_TILE,
    Read,
    Window,
    bands,
    reduced,
    sample_places,
    times,
    window_of,
)

Pixels = NDArray[np.float32]
# What a resampler may add to the process where no limit is given: at the published width, the
# sample and a tile.
DEFAULT_ROOM = 350_000_000
# A tile of more pixels leaves the processor's cache and is slower, that of a render from half of
# that on, as benchmarks.rate measures; powers of two down to the smallest, so that the same request
# gives the same tiles.
LARGEST_TILE, LARGEST_RENDERED, LEAST_BESIDE = 4096, 2048, 1024
GRN_EPSILON = 1e-6  # of ConvNeXt V2's GRN, as in the graphs


@dataclass(frozen=True)
class Roles:
    """The graphs of a resampler: what each does.

    `read_image` and `read_latent` give sums over tokens, `encode` a latent of an image's sums,
    `decode` pixels of a latent's sums and the GRN ratios over them, `render` pixels under given
    ratios, `respond` what the ratios are made of: the mean squares that each GRN takes.
    """

    read_image: str
    encode: str
    read_latent: str
    decode: str
    render: str
    respond: str

    @classmethod
    def of(cls, manifest: Manifest) -> "Roles":
        """Find every role; raises ArtefactError naming what is missing."""
        found = {}
        for name, spec in manifest.graphs.items():
            role = role_of(spec)
            if role is not None:
                found[role] = name
        missing = [own.name for own in fields(cls) if own.name not in found]
        if missing:
            raise ArtefactError(
                f"{manifest.folder / FILE_NAME}: no graph of the resampler has the lifetime and "
                f"tensors of {', '.join(missing)}; found {[*manifest.graphs]}. {REBUILD}"
            )
        return cls(**found)


def role_of(spec: GraphSpec) -> str | None:
    """What a graph does in a resampler; None for a graph of the diffuser."""
    if spec.lifetime == "image":
        return "read_image" if spec.takes("pixels") else "decode"
    if spec.lifetime == "latent":
        return "read_latent" if spec.takes("latent") else "encode"
    if spec.lifetime == "tile":
        return "render" if spec.output("pixels") else "respond"
    return None


@dataclass(frozen=True)
class Tiler:
    """A resampler's graphs run over tiles.

    `room`: bytes that the graphs may take. What fits is counted, not measured, so that an image
    is drawn in the same tiles whatever was drawn before it. `whole`: no tiles, where engines run
    the sizes of whole images alone.
    """

    engines: Engines
    roles: Roles
    room: int = DEFAULT_ROOM
    whole: bool = False

    def bytes_needed(self, graph: str, pixels: int) -> int:
        """What a graph takes for so many pixels."""
        return 4 * self.engines.manifest.graph(graph).floats_per_pixel * pixels

    def tile(self, *graphs: str, taken: int = 0) -> int:
        """Pixels per tile for graphs beside each other: the quickest number, or what fits."""
        pixels = LARGEST_TILE
        while pixels > SMALLEST_TILE:
            needed = sum(self.bytes_needed(graph, pixels) for graph in graphs)
            if needed + taken <= self.room:
                break
            pixels //= 2
        return pixels

    def at_once(self, pixels: int) -> int:
        """Bytes that a decode takes for a sample; 0 where a tile would not fit beside it."""
        needed = self.bytes_needed(self.roles.decode, pixels)
        beside = self.bytes_needed(self.roles.render, LEAST_BESIDE)
        return needed if needed + beside <= self.room else 0

    def summarise(
        self, graph: str, name: str, read: Read, size: Size, batch: int = 1
    ) -> dict[str, Array]:
        """The sums over all tokens of `size`, of which `read` gives the values `name` by tile.

        Exact: these are sums over tokens. They are added up in float64.
        """
        engine, place = self.engines.open(graph), Grid(*size)
        totals: dict[str, Array] = {}
        tile = size[0] * size[1] if self.whole else max(1, self.tile(graph) // batch)
        for band in bands(window_of(None, size), tile):
            for window in band:
                values = {name: read(*window), "coordinates": place.window(*window)}
                for key, part in engine.run(values).items():
                    totals[key] = totals.get(key, 0.0) + part.astype(np.float64)
        return {key: total.astype(np.float32) for key, total in totals.items()}

    def draw(
        self,
        sums: Mapping[str, Array],
        size: Size,
        window: Window,
        exact: bool = False,
        factor: int = 1,
    ) -> Iterator[Pixels]:
        """A window of one image of `size` in bands `[c, rows, window.width]`, from the top.

        `sums` are those of one latent. `exact` takes the ratios from every pixel, in a pass per
        GRN, where they else come from a sample. Each pixel is the mean of `factor`² of a decode
        that is so many times as high and wide.
        """
        fine = factor * size[0], factor * size[1]
        place, roles = Grid(*fine), self.roles
        sample = sample_places(fine)[0].size
        if self.whole or (sample == fine[0] * fine[1] and self.at_once(sample)):
            inputs = {"coordinates": place.window(0, 0, *fine), **sums}
            pixels = reduced(self.engines.open(roles.decode).run(inputs)["pixels"][0], factor)
            top, left, height, width = window
            yield pixels[:, top : top + height, left : left + width]
            return
        given = {self.ratios: self.response(sums, fine, exact), **sums}
        engine, taken = self.engines.open(roles.render), self.at_once(sample)
        if exact or not taken:  # the graph of the passes keeps its memory
            count = self.tile(roles.render, roles.respond)
        else:
            count = self.tile(roles.render, taken=taken)
        for band in bands(window, min(count, LARGEST_RENDERED) // factor**2):
            at = [place.window(*times(tile, factor)) for tile in band]
            tiles = [engine.run({"coordinates": own, **given})["pixels"][0] for own in at]
            yield np.concatenate([reduced(tile, factor) for tile in tiles], 2)

    @property
    def ratios(self) -> str:
        """The name of the GRN ratios: what a decode gives and a render takes."""
        render = self.engines.manifest.graph(self.roles.render)
        decode = self.engines.manifest.graph(self.roles.decode)
        return next(t.name for t in decode.outputs if render.takes(t.name))

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
            return self.engines.open(self.roles.decode).run(inputs, [self.ratios])[self.ratios]
        flat = at.reshape(1, -1, 4)
        return self._counted(
            sums, lambda pixels: (flat[:, i : i + pixels] for i in range(0, flat.shape[1], pixels))
        )

    def _counted(self, sums: Mapping[str, Array], parts: Callable[[int], Iterable[Array]]) -> Array:
        """The ratios over all `parts` of coordinates, one GRN after the other.

        A GRN's sum of squares needs the ratios of those before it, so each takes a pass.
        """
        spec = self.engines.manifest.graph(self.roles.respond)
        tensor = next(tensor for tensor in spec.inputs if tensor.name == self.ratios)
        response = np.ones(tensor.shape({"batch": 1}), np.float32)
        sites = response.reshape(len(spec.outputs), math.prod(response.shape) // len(spec.outputs))
        engine = self.engines.open(self.roles.respond)
        pixels = self.tile(self.roles.render, self.roles.respond)
        for site, squares in enumerate(tensor.name for tensor in spec.outputs):
            total, count = np.zeros((1, sites.shape[1])), 0
            for at in parts(pixels):
                inputs = {"coordinates": at, self.ratios: response, **sums}
                tokens = at.shape[0] * at.shape[1]
                total += tokens * engine.run(inputs, [squares])[squares].astype(np.float64)
                count += tokens
            root = np.sqrt(total / count)
            sites[site] = root / (root.mean() + GRN_EPSILON)
        return response
