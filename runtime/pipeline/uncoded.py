"""Where pixels are diffused: the latent is the image, and its size is the image's.

The same operations as a resampler's, so that every command meets both alike.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import Array, Manifest
from runtime.bundle.state import DecodeState
from runtime.errors import UsageError
from runtime.images.pixels import resized
from runtime.pipeline.tiles import Crop, Read, window_of, windows_of

Pixels = NDArray[np.float32]
NAME = "pixels"  # of a state's array


class Uncoded:
    """Image and latent of one size, of which windows are cut and nothing is computed."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.interface = manifest, manifest.interface

    def drawing(self, latent: Size, size: Size) -> list[str]:
        """No graph is needed to draw."""
        return []

    def encoding(self, size: Size) -> list[str]:
        """No graph is needed to encode."""
        return []

    def check_draw(self, image: Size) -> None:
        """Raise UsageError where no image has this size."""
        self.interface.latent_sides.check(image, "image")

    def check_state(self, latent: Size) -> None:
        """Raise UsageError where no latent has this size."""
        self.interface.latent_sides.check(latent, "latent")

    def check_encode(self, image: Size, latent: Size, batch: int) -> None:
        """Raise UsageError where the sizes are not the same, or not legal."""
        self.interface.check_image(latent, image)
        self.check_state(latent)

    def check_enlarge(self, latent: Size, larger: Size, batch: int) -> None:
        """Raise UsageError where either size is not legal."""
        self.check_state(latent)
        self.check_state(larger)

    def check_memory(self, memory: int, latent: Size, size: Size) -> None:
        """Nothing is computed, so that any limit holds."""

    def enlarge(self, x0: Array, size: Size) -> Array:
        """Pixels float32 `[B, c, H, W]` as ones of `size`, by Pillow's bicubic filter."""
        return resized(x0, size)

    def encode(self, pixels: Array, size: Size, memory: int | None = None) -> Pixels:
        """Pixels float32 `[B, c, *size]` as they are; raises UsageError for another size."""
        image = pixels.shape[2], pixels.shape[3]
        return self.encode_windows(windows_of(pixels), image, size, memory, len(pixels))

    def encode_windows(
        self, read: Read, image: Size, size: Size, memory: int | None = None, batch: int = 1
    ) -> Pixels:
        """`encode` of an image that is read by windows."""
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
        """Raise ArtefactError naming `source` where a state is of another bundle or not whole."""
        axes = ("batch", self.interface.color_channels, "height", "width")
        state.check(self._bound_to, {NAME: axes}, source)

    def draw(
        self,
        state: DecodeState,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
        index: int = 0,
    ) -> Iterator[Pixels]:
        """Image `index` of a state in one band `[c, rows, width]` in [-1, 1].

        `crop` (top, left, height, width) gives that window alone. Raises UsageError for a size
        that is not the state's own, ArtefactError for a state of another bundle.
        """
        self.check_decode_state(state, "decode state")
        pixels = state.arrays[NAME][index]
        own = (pixels.shape[1], pixels.shape[2])
        if size != own:
            raise UsageError(
                f"image {size_name(size)}: {self.interface.why_coupled}; expected the size "
                f"{size_name(own)} that the pixels have"
            )
        window = window_of(crop, size)
        return iter([np.clip(windows_of(pixels)(*window), -1, 1)])

    def decode(
        self,
        latent: Array,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
    ) -> Pixels:
        """Images float32 `[B, c, H, W]`, clipped to [-1, 1]; see `draw`."""
        state = self.state(latent)
        each = range(len(state))
        return np.stack([next(self.draw(state, size, crop, index=index)) for index in each])
