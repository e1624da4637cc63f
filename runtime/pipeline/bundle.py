"""A bundle opened: what a program does with it. numpy in, numpy out.

Letters: B images, K conditions, C latent channels, c colours, H × W latent, h × w pixels.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Interface, Size, check_size
from runtime.bundle.manifest import (
    FILE_NAME,
    TO_PLAN,
    Array,
    Manifest,
    find_bundle,
    quoted,
    read_manifest,
)
from runtime.bundle.state import DecodeState
from runtime.engines import EngineOptions, check_engine_kind
from runtime.errors import ArtefactError, UsageError
from runtime.pipeline.checks import check_images, check_pixels, check_request
from runtime.pipeline.coder import Coder
from runtime.pipeline.diffuser import Diffuser, OnStep
from runtime.pipeline.editing import Kept
from runtime.pipeline.opened import Engines
from runtime.pipeline.resampler import Resampler
from runtime.pipeline.tiles import Crop, fill, window_of
from runtime.pipeline.uncoded import Uncoded
from runtime.sampling.labels import Label
from runtime.sampling.request import Request


@dataclass(frozen=True)
class Generated:
    """images float32 `[B, c, h, w]` in [-1, 1], latents float32 `[B, C, H, W]`.

    A notebook shows the images as one sheet.
    """

    images: NDArray[np.float32]
    latents: NDArray[np.float32]

    def _repr_png_(self) -> bytes:
        """The images as one PNG, ten in a row."""
        from runtime.images.pixels import contact_sheet, png_bytes, to_uint8

        return png_bytes(contact_sheet(to_uint8(self.images), 10))


def open_bundle(
    engine: str | Path, options: EngineOptions | None = None, expect_sha256: str | None = None
) -> "Bundle":
    """Open a bundle's folder or any engine file in it.

    `expect_sha256` pins the manifest to a trusted one. Raises ArtefactError for a bundle that is
    not whole, UsageError for a precision that it lacks, IncompatibleError for an engine that
    cannot run here.
    """
    if not isinstance(engine, str | Path):
        raise UsageError(f"engine is {engine!r}; expected a bundle's folder, or a file in it")
    path, options = Path(engine), options or EngineOptions()
    check_engine_kind(path)
    manifest = read_manifest(find_bundle(path), expect_sha256)
    if path.suffix == ".plan":
        if path.name not in manifest.plans:
            raise ArtefactError(
                f"{path}: no plan that {manifest.folder / FILE_NAME} names; found "
                f"{[*manifest.plans]}. Build plans with: {TO_PLAN} {quoted(manifest.folder)}"
            )
        precision = manifest.plans[path.name].precision
        options = replace(options, plans=True, precision=precision)
    return Bundle(manifest, options)


class Bundle:
    """A bundle's graphs, each opened when it is first needed and kept.

    Several threads may use one: requests share its weights and nothing else.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: EngineOptions | None = None,
        engines: Engines | None = None,
    ):
        self.manifest = manifest
        self.engines = engines or Engines(manifest, options)
        self.options = self.engines.options
        self.resampler: Coder = (
            Resampler(self.engines) if manifest.interface.decoupled else Uncoded(manifest)
        )
        self.diffuser = Diffuser(self.engines, self.resampler)

    @property
    def interface(self) -> Interface:
        """Names, channels and legal sizes."""
        return self.manifest.interface

    @property
    def provider(self) -> str:
        """What runs the graphs that are open: a name, or several joined by + after a fallback."""
        return self.engines.provider

    def generate(
        self,
        labels: Sequence[Label],
        latent: Size | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generated:
        """Draw one image per entry of `labels` as one batch; `options` are those of `Request`.

        `latent` defaults to the bundle's, or that of an edit to its picture's aspect. `on_step`
        gets a `Progress` after each step, and stops the run by returning True. Raises UsageError
        before any engine is opened, StoppedError, NumericalError naming the step.
        """
        own = self.default_latent(options.get("init")) if latent is None else latent
        request = Request(labels, own, **options)
        self.check(request)
        size = request.drawn_size(self.interface)
        with self.opening(request):
            pass
        x = self.diffuse(request, on_step)
        images, kept = self.decode(x, size), self.kept(request, size)
        return Generated(images if kept is None else kept.paste(images), x)

    def default_latent(self, init: Array | None = None) -> Size:
        """The latent of a request for which none is asked; `init` `[B, c, h, w]` is its picture."""
        if init is None:
            return self.interface.default_latent
        check_pixels(self.interface, init, "init")
        return self.interface.latent_of_picture((init.shape[2], init.shape[3]))

    def kept(self, request: Request, size: Size) -> Kept | None:
        """What images of a size keep of the picture of an edit that was checked; None: nothing."""
        return self.diffuser.editor.kept(request, size)

    def opening(self, *requests: Request) -> AbstractContextManager[None]:
        """Open every graph that requests need, while the block runs: errors show at its end."""
        drawing: list[str] = []
        for request in requests:
            size = request.drawn_size(self.interface)
            drawing += self.resampler.drawing(request.largest, size)
        return self.diffuser.opening(requests, drawing)

    def check(self, request: Request, batch: int | None = None) -> None:
        """Raise UsageError for a request that cannot be met; `batch` images are drawn at once."""
        check_request(self.diffuser, request, batch)

    def diffuse(self, request: Request, on_step: OnStep | None = None) -> NDArray[np.float32]:
        """The latents float32 `[B, C, H, W]` of a request that was checked."""
        return self.diffuser.diffuse(request, on_step)

    def denoise(self, latent: Array, alpha_bar: float, conditions: Array) -> NDArray[np.float32]:
        """One evaluation of the model, whatever its family predicts: eps `[K, B, C, H, W]`.

        latent float32 `[B, C, H, W]` with the noise that `alpha_bar` in (0, 1) says it has;
        conditions float32 `[K, B, labels]`, the weight of each label, all zero for no condition.
        Raises UsageError for arrays or a size that do not fit, NumericalError.
        """
        labels = len(self.interface.labels)
        whole = conditions.ndim == 3 and conditions.shape[1:] == (len(latent), labels)
        if latent.ndim != 4 or not whole or not 0 < alpha_bar < 1:
            raise UsageError(
                f"latent {latent.shape}, conditions {conditions.shape}, alpha_bar {alpha_bar}; "
                f"expected [B, {self.interface.latent_channels}, H, W], [K, B, {labels}] and a "
                "number between 0 and 1"
            )
        self.interface.latent_sides.check((latent.shape[2], latent.shape[3]), "latent")
        return self.diffuser.denoise(latent, alpha_bar, conditions)

    def encode(self, pixels: Array, size: Size, memory: int | None = None) -> NDArray[np.float32]:
        """Pixels float32 `[B, c, h, w]` in [-1, 1] -> latent `[B, C, *size]` in [-1, 1].

        `memory`: the bytes that this process may hold. Raises UsageError, ResourceError.
        """
        check_pixels(self.interface, pixels)
        check_size("size", size)
        return self.resampler.encode(pixels, size, memory)

    def decode(
        self,
        latent: Array,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
    ) -> NDArray[np.float32]:
        """Latent float32 `[B, C, H, W]` -> pixels `[B, c, *size]` in [-1, 1].

        `crop` (top, left, height, width) draws that window of the images alone, `exact` takes the
        response ratios from every pixel and not from a sample. Images of fewer pixels per latent
        cell than the model was trained with are averaged, not sampled. Raises UsageError,
        ResourceError.
        """
        check_images("latent", latent, self.interface.latent_channels)
        check_size("size", size)
        return self.resampler.decode(latent, size, crop, exact, memory)

    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """What `render` needs of latents float32 `[B, C, H, W]`; it can be saved and loaded."""
        check_images("latent", latent, self.interface.latent_channels)
        return self.resampler.state(latent, metadata)

    def render(
        self,
        state: DecodeState,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
        index: int = 0,
    ) -> NDArray[np.float32]:
        """Image `index` of a state at `size`: pixels float32 `[c, h, w]` in [-1, 1].

        As `decode`; `bundle.resampler.draw` gives the same in bands, never holding the whole.
        Raises ArtefactError for a state of another bundle.
        """
        check_size("size", size)
        bands = self.resampler.draw(state, size, crop, exact, memory, index)
        window = window_of(crop, size)
        pixels = np.empty((self.interface.color_channels, *window[2:]), np.float32)
        fill(pixels, bands)
        return pixels

    def resample(
        self, pixels: Array, size: Size, latent: Size | None = None
    ) -> NDArray[np.float32]:
        """Pixels float32 `[B, c, h, w]` in [-1, 1] through a latent to `[B, c, *size]`.

        `latent` defaults to `latent_between`. Raises UsageError.
        """
        check_size("size", size)
        check_pixels(self.interface, pixels)
        self.check_resample(size)
        height, width = pixels.shape[2:]
        between = latent or self.latent_between((height, width), size)
        return self.decode(self.encode(pixels, between), size)

    def latent_between(self, image: Size, size: Size, memory: int | None = None) -> Size:
        """The latent that an image goes through on its way to `size`, if none is asked for.

        The training ratio of the image's own size, or less where the result is smaller or where
        the memory that encoding takes ends, the default one's too.
        """
        assert isinstance(self.resampler, Resampler)  # check_resample has said so
        return self.resampler.latent_between(image, size, memory)

    def check_resample(self, size: Size) -> None:
        """Raise UsageError where no image can be resampled to `size`."""
        if not self.interface.decoupled:
            raise UsageError(
                f"no image can be resampled: {self.interface.why_coupled}. Use a bundle that has "
                "one: --engine"
            )
        self.resampler.check_draw(size)
