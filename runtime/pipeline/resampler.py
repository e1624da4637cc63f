"""Images of any size in constant memory, and the latents they are drawn from and read into.

Letters: B images, C latent channels, c colours, H × W latent, h × w pixels.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array
from runtime.bundle.state import DecodeState
from runtime.coordinates import grid
from runtime.errors import UsageError
from runtime.memory import resident
from runtime.pipeline.coder import Coder, View
from runtime.pipeline.opened import Engines
from runtime.pipeline.tiler import DEFAULT_ROOM, Pixels, Roles, Tiler
from runtime.pipeline.tiles import (
    SAMPLE,
    Read,
    averaged,
    check_memory,
    windows_of,
)


class Resampler(Coder):
    """Image ↔ latent of any size, within `memory` bytes of this process where that is given."""

    def __init__(self, engines: Engines):
        super().__init__(engines.manifest)
        self.engines = engines
        self.roles = Roles.of(self.manifest)
        self._held: int | None = None  # bytes in memory before the first tile

    def tiler(self, memory: int | None = None) -> "Tiler":
        """The graphs within `memory` bytes of this process; None takes DEFAULT_ROOM.

        What the process holds besides is measured once, when this is first asked for.
        """
        if self._held is None:
            self._held = resident()
        room = DEFAULT_ROOM if memory is None else memory - self._held
        whole = self.engines.whole(self.roles.decode)
        return Tiler(self.engines, self.roles, room, whole)

    def averaged(self, latent: Size, size: Size) -> int:
        """How many times as high and wide as an image its decode is; see `tiles.averaged`.

        1 where engines run whole images alone and cannot run so large a one.
        """
        factor = averaged(latent, size, self.interface.pixels_per_latent)
        if factor > 1 and self.engines.whole(self.roles.decode):
            try:
                self.check_draw((factor * size[0], factor * size[1]))
            except UsageError:
                return 1
        return factor

    def drawing(self, latent: Size, size: Size) -> list[str]:
        roles = self.roles
        pixels = self.averaged(latent, size) ** 2 * size[0] * size[1]
        sampled = pixels > SAMPLE * SAMPLE and not self.engines.whole(roles.decode)
        return [roles.read_latent, roles.decode, *([roles.render, roles.respond] * sampled)]

    def encoding(self, size: Size) -> list[str]:
        return [self.roles.read_image, self.roles.encode]

    def check_draw(self, image: Size) -> None:
        self.interface.image_sides.check(image, "image")
        self.engines.check(self.roles.decode, _sizes(image))

    def check_state(self, latent: Size) -> None:
        self.interface.latent_sides.check(latent, "latent")
        self.engines.check(self.roles.read_latent, _sizes(latent))

    def check_encode(self, image: Size, latent: Size, batch: int) -> None:
        self.interface.image_sides.check(image, "image")
        self.interface.latent_sides.check(latent, "latent")
        self.engines.check(self.roles.read_image, _sizes(image, batch))
        self.engines.check(self.roles.encode, _sizes(latent, batch))

    def check_enlarge(self, latent: Size, larger: Size, batch: int) -> None:
        between = self.interface.image_size(larger)
        self.check_state(latent)
        self.check_draw(between)
        self.check_encode(between, larger, batch)

    def check_memory(self, memory: int, latent: Size, size: Size) -> None:
        tiler, graphs = self.tiler(memory), self.drawing(latent, size)
        check_memory(memory, max(tiler.bytes_needed(graph, 1) for graph in graphs))

    def latent_between(self, image: Size, size: Size, memory: int | None = None) -> Size:
        """See `Bundle.latent_between`."""
        tiler, interface = self.tiler(memory), self.interface
        share = min(1.0, max(size[0] / image[0], size[1] / image[1]))
        cells = max(1, tiler.room // max(1, tiler.bytes_needed(self.roles.encode, 1)))
        height, width = interface.latent_size(image)
        share = min(share, math.sqrt(cells / (height * width)))
        height, width = max(1, round(image[0] * share)), max(1, round(image[1] * share))
        return interface.latent_size((height, width))

    def enlarge(self, x0: Array, size: Size) -> Array:
        """Latents float32 `[B, C, H, W]` as ones of `size`, by way of their images."""
        between = self.interface.image_size(size)
        return self.encode(self.decode(x0, between), size)

    def encode_windows(
        self, read: Read, image: Size, size: Size, memory: int | None = None, batch: int = 1
    ) -> Pixels:
        self.check_encode(image, size, batch)
        engine, tiler = self.engines.open(self.roles.encode), self.tiler(memory)
        if memory is not None:
            cells = batch * size[0] * size[1]
            check_memory(memory, tiler.bytes_needed(self.roles.encode, 1), cells)
        sums = tiler.summarise(self.roles.read_image, "pixels", read, image, batch)
        return engine.run({"coordinates": grid(*size), **sums})["latent"]

    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """What a decode needs of latents float32 `[B, C, H, W]`, to draw any size and crop from.

        One latent after the other, so that B has no limit and changes nothing.
        """
        size = (latent.shape[2], latent.shape[3])
        self.check_state(size)
        summarise = partial(self.tiler().summarise, self.roles.read_latent, "latent", size=size)
        each = [summarise(read=windows_of(own)) for own in np.split(latent, len(latent))]
        sums = {name: np.concatenate([own[name] for own in each]) for name in each[0]}
        return DecodeState(sums, self._bound_to, size, metadata or {})

    @property
    def _bound_to(self) -> str:
        """What a `DecodeState` belongs to: the graph that reads its sums, in fp32."""
        return self.manifest.graph(self.roles.render).sha256

    def check_decode_state(self, state: DecodeState, source: str) -> None:
        sums = self.manifest.graph(self.roles.read_latent).outputs
        state.check(self._bound_to, {tensor.name: tensor.axes for tensor in sums}, source)

    def _bands(self, sums: dict[str, Array], latent: Size, view: View) -> Iterator[Pixels]:
        size, window, exact, memory = view
        return self.tiler(memory).draw(sums, size, window, exact, self.averaged(latent, size))


def _sizes(size: Size, batch: int = 1) -> dict[str, int]:
    return {"height": size[0], "width": size[1], "batch": batch}
