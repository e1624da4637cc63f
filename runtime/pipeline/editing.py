"""Edits: a picture that a run begins with, and what of it is kept, in latents and in pixels.

The part that is kept is put back after every step as it is at that step's noise, so that what is
drawn fits it; in the end its pixels are the picture's own. Sources: Meng et al., "SDEdit" (arXiv
2108.01073), the start; Lugmayr et al., "RePaint" (arXiv 2201.09865), eq. 8, what is held, here with
one noise for all steps.

Letters: B images, C latent channels, c colours, H × W latent, h × w pixels.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Interface, Size
from runtime.bundle.manifest import Array
from runtime.images.pixels import resized
from runtime.pipeline.coder import Coder
from runtime.sampling.loop import Hold
from runtime.sampling.request import Request

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Held:
    """A picture's latents at every node of a run: x0 `[1 or B, C, H, W]`, noise `[B, C, H, W]`.

    `drawn` bool `[1 or B, 1, H, W]`: the cells that are drawn anew.
    """

    x0: Floats
    noise: Floats
    drawn: NDArray[np.bool_]
    alpha_bar: NDArray[np.float64]

    def at(self, node: int) -> Floats:
        """The noised picture `[B, C, H, W]`; at the last node it is x0 itself."""
        last = node == len(self.alpha_bar) - 1
        a = 1.0 if last else float(self.alpha_bar[node])
        return self.x0 * math.sqrt(a) + self.noise * math.sqrt(1 - a)

    def __call__(self, x: Array, node: int) -> Array:
        """x with the cells that are kept as they are at a node."""
        return np.where(self.drawn, x, self.at(node))


@dataclass(frozen=True)
class Kept:
    """pixels float32 `[1 or B, c, h, w]`, and the share of what is drawn, `[1 or B, 1, h, w]`."""

    pixels: Floats
    share: Floats

    def paste(self, drawn: Array, top: int = 0, left: int = 0) -> Floats:
        """A window of drawn images `[B, c, n, m]` with the kept pixels put back, bit for bit."""
        rows, columns = slice(top, top + drawn.shape[2]), slice(left, left + drawn.shape[3])
        pixels, share = (each[:, :, rows, columns] for each in (self.pixels, self.share))
        return np.where(share > 0, drawn * share + pixels * (1 - share), pixels)


class Editor:
    """The pictures of requests as latents and as what is kept; the last one's latents stay."""

    def __init__(self, interface: Interface, resampler: Coder):
        self.interface, self.resampler = interface, resampler
        self._last: tuple[tuple[object, ...], Floats] | None = None  # replaced whole: no lock

    def begin(
        self, request: Request, noise: Floats, alpha_bar: NDArray[np.float64]
    ) -> tuple[Floats, Hold | None]:
        """The x that a run begins with, and what holds it to the picture after a step."""
        if not request.begins_with_picture:
            return noise, None
        mask = np.ones((1, 1, 1, 1), np.float32) if request.mask is None else request.mask
        drawn = resized(mask, request.latent, box=True) > 0
        held = Held(self.encoded(request), noise, drawn, alpha_bar)
        x = held(noise, 0) if request.start_time == 1 else held.at(0)
        return x, None if request.mask is None else held

    def encoded(self, request: Request) -> Floats:
        """The latents `[1 or B, C, H, W]` of a request's picture; computed once for several."""
        assert request.init is not None
        pixels = np.ascontiguousarray(request.init)
        key = hashlib.sha256(pixels.data).digest(), pixels.shape, request.latent
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        fitting = pixels if self.interface.decoupled else fitted(pixels, request.latent)
        made = self.resampler.encode(fitting, request.latent)
        self._last = key, made
        return made

    def kept(self, request: Request, size: Size) -> Kept | None:
        """What of a request's picture stays in its images of a size; None where nothing does."""
        if request.init is None or request.mask is None:
            return None
        own = request.drawn_size(self.interface)
        radius = -(-request.seam_width(own) * size[0] // own[0] // 2)
        mask = resized(request.mask, size, box=True)
        return Kept(fitted(request.init, size), softened(mask, radius))


def fitted(pixels: Floats, size: Size) -> Floats:
    """Pixels at a size, within [-1, 1]; as they are where they have it."""
    return pixels if pixels.shape[2:] == size else resized(pixels, size).clip(-1, 1)


def softened(mask: Floats, radius: int) -> Floats:
    """A mask that rises from its edge inwards: 0 where `mask` is, and 1 from 2 · radius on.

    The mean over (2 · radius + 1)² of the minimum over as many. Beyond its borders a mask goes on.
    """
    if radius == 0:
        return mask
    width = 2 * radius + 1
    found = mask
    for axis in (-2, -1):
        found = least(padded(found, radius, axis), width, axis)
    for axis in (-2, -1):
        found = mean(padded(found, radius, axis), width, axis)
    return found.clip(0, mask).astype(np.float32)


def padded(values: Array, count: int, axis: int) -> Array:
    """`count` more values at both ends of an axis, each as the end."""
    ways = [(0, 0)] * values.ndim
    ways[axis] = (count, count)
    return np.pad(values, ways, mode="edge")


def least(values: Array, width: int, axis: int) -> Array:
    """The minimum of each `width` values in a row, by doubling."""
    values, span = np.moveaxis(values, axis, 0), 1
    while span < width:
        step = min(span, width - span)
        values, span = np.minimum(values[:-step], values[step:]), span + step
    return np.moveaxis(values, 0, axis)


def mean(values: Array, width: int, axis: int) -> Array:
    """The mean of each `width` values in a row, in float64."""
    sums = np.cumsum(np.moveaxis(values, axis, 0), 0, np.float64)
    sums = np.concatenate([np.zeros_like(sums[:1]), sums])
    return np.moveaxis((sums[width:] - sums[:-width]) / width, 0, axis)
