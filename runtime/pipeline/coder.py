"""Images into latents and back, as the diffuser and every command ask for it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array, Manifest
from runtime.bundle.state import DecodeState
from runtime.pipeline.tiler import Pixels
from runtime.pipeline.tiles import Crop, Read, Window, fill, window_of, windows_of


class View(NamedTuple):
    """What of an image of `size` is drawn: a window, its ratios exact or not, within `memory`."""

    size: Size
    window: Window
    exact: bool
    memory: int | None


class Coder(ABC):
    """What a `Resampler` computes, and what is alike where pixels are diffused (`Uncoded`).

    B images, C latent channels, c colours, H × W latent, h × w pixels; sizes are (height, width)
    and `memory` is what the process may hold, in bytes.
    """

    def __init__(self, manifest: Manifest):
        self.manifest, self.interface = manifest, manifest.interface

    @abstractmethod
    def drawing(self, latent: Size, size: Size) -> list[str]:
        """The graphs that drawing an image of `size` from a latent of a size needs."""

    @abstractmethod
    def encoding(self, size: Size) -> list[str]:
        """The graphs that encoding an image of `size` needs."""

    @abstractmethod
    def check_draw(self, image: Size) -> None:
        """Raise UsageError where no image of this size can be drawn."""

    @abstractmethod
    def check_state(self, latent: Size) -> None:
        """Raise UsageError where no latent of this size can be read."""

    @abstractmethod
    def check_encode(self, image: Size, latent: Size, batch: int) -> None:
        """Raise UsageError where images of this size cannot become latents of that one."""

    @abstractmethod
    def check_enlarge(self, latent: Size, larger: Size, batch: int) -> None:
        """Raise UsageError where `enlarge` cannot take latents of one size to the other."""

    @abstractmethod
    def check_memory(self, memory: int, latent: Size, size: Size) -> None:
        """Raise ResourceError where drawing an image of `size` needs more than `memory`."""

    @abstractmethod
    def enlarge(self, x0: Array, size: Size) -> Array:
        """Latents float32 `[B, C, H, W]` as ones of `size`."""

    def encode(self, pixels: Array, size: Size, memory: int | None = None) -> Pixels:
        """Pixels float32 `[B, c, h, w]` in [-1, 1] -> latent `[B, C, *size]` in [-1, 1]."""
        image = pixels.shape[2], pixels.shape[3]
        return self.encode_windows(windows_of(pixels), image, size, memory, len(pixels))

    @abstractmethod
    def encode_windows(
        self, read: Read, image: Size, size: Size, memory: int | None = None, batch: int = 1
    ) -> Pixels:
        """`encode` of an image that is read by windows: one tile of it is in memory at a time.

        `read(top, left, height, width)` gives float32 `[B, c, height, width]`, from the top down.
        The latent is made whole: raises ResourceError where a `memory` given is too small for it.
        """

    @abstractmethod
    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """What a decode needs of latents float32 `[B, C, H, W]`, to draw any size and crop from."""

    @abstractmethod
    def check_decode_state(self, state: DecodeState, source: str) -> None:
        """Raise ArtefactError naming `source` where a state is of another bundle or not whole."""

    def draw(
        self,
        state: DecodeState,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
        index: int = 0,
    ) -> Iterator[Pixels]:
        """Image `index` of a state at `size` in bands `[c, rows, width]` in [-1, 1], from the top.

        `crop` (top, left, height, width) draws that window of the image alone, `exact` takes the
        GRN ratios from every pixel instead of a sample, `memory` chooses the tiles. Images of
        fewer pixels per latent cell than the model was trained with are averaged. Raises
        UsageError, ArtefactError for a state of another bundle, ResourceError.
        """
        self.check_draw(size)
        window = window_of(crop, size)
        self.check_decode_state(state, "decode state")
        return self._bands(state.one(index), state.latent, View(size, window, exact, memory))

    @abstractmethod
    def _bands(self, sums: dict[str, Array], latent: Size, view: View) -> Iterator[Pixels]:
        """`draw` of the arrays that one image's state holds."""

    def decode(
        self,
        latent: Array,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
    ) -> Pixels:
        """Latent float32 `[B, C, H, W]` -> pixels `[B, c, *size]` in [-1, 1]; see `draw`."""
        self.check_draw(size)
        window = window_of(crop, size)
        state = self.state(latent)
        shape = (len(state), self.interface.color_channels, window.height, window.width)
        pixels = np.empty(shape, np.float32)
        for index, image in enumerate(pixels):
            fill(image, self.draw(state, size, crop, exact, memory, index))
        return pixels
