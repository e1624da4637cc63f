"""Where pixels are diffused: the latent is the image, and its size is the image's."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import Array
from runtime.bundle.state import DecodeState
from runtime.errors import UsageError
from runtime.images.pixels import resized
from runtime.pipeline.coder import Coder, View
from runtime.pipeline.tiler import Pixels
from runtime.pipeline.tiles import Read, windows_of

NAME = "pixels"  # of a state's array


class Uncoded(Coder):
    """Image and latent of one size, of which windows are cut and nothing is computed."""

    def drawing(self, latent: Size, size: Size) -> list[str]:
        """No graph is needed to draw."""
        return []

    def encoding(self, size: Size) -> list[str]:
        """No graph is needed to encode."""
        return []

    def check_draw(self, image: Size) -> None:
        self.interface.latent_sides.check(image, "image")

    def check_state(self, latent: Size) -> None:
        self.interface.latent_sides.check(latent, "latent")

    def check_encode(self, image: Size, latent: Size, batch: int) -> None:
        self.interface.check_image(latent, image)
        self.check_state(latent)

    def check_enlarge(self, latent: Size, larger: Size, batch: int) -> None:
        self.check_state(latent)
        self.check_state(larger)

    def check_memory(self, memory: int, latent: Size, size: Size) -> None:
        """Nothing is computed, so that any limit holds."""

    def enlarge(self, x0: Array, size: Size) -> Array:
        """Pixels float32 `[B, c, H, W]` as ones of `size`, by Pillow's bicubic filter."""
        return resized(x0, size)

    def encode_windows(
        self, read: Read, image: Size, size: Size, memory: int | None = None, batch: int = 1
    ) -> Pixels:
        self.check_encode(image, size, batch)
        return np.asarray(read(0, 0, *image), np.float32)

    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """Images float32 `[B, c, H, W]`, to draw any crop from."""
        self.check_state(size := (latent.shape[2], latent.shape[3]))
        pixels = {NAME: np.asarray(latent, np.float32)}
        return DecodeState(pixels, self._bound_to, size, metadata or {})

    @property
    def _bound_to(self) -> str:
        """What a `DecodeState` belongs to: the graph that drew its pixels, in fp32."""
        return self.manifest.graph(self.manifest.step_graph).sha256

    def check_decode_state(self, state: DecodeState, source: str) -> None:
        axes = ("batch", self.interface.color_channels, "height", "width")
        state.check(self._bound_to, {NAME: axes}, source)

    def _bands(self, sums: dict[str, Array], latent: Size, view: View) -> Iterator[Pixels]:
        """In one band."""
        if view.size != latent:
            raise UsageError(
                f"image {size_name(view.size)}: {self.interface.why_coupled}; expected the size "
                f"{size_name(latent)} that the pixels have"
            )
        return iter([np.clip(windows_of(sums[NAME])(*view.window)[0], -1, 1)])
