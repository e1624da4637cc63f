"""A bundle opened: generate, encode, decode, resample. numpy in, numpy out.

Letters: B images, K conditions, C latent channels, c colours, H × W latent, h × w pixels.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import ddim, schedule
from runtime.coordinates import grid
from runtime.engines import Engine, EngineOptions, check_engine_kind, open_engine
from runtime.errors import UsageError
from runtime.manifest import Array, Manifest, find_bundle, read_manifest
from runtime.noise import LARGEST_SEED, NoiseStreams
from runtime.state import DecodeState
from runtime.tiles import (
    DEFAULT_ROOM,
    Read,
    Resampler,
    Size,
    check_memory,
    graphs_for,
    resident,
    window_of,
    windows_of,
)

Crop = tuple[int, int, int, int]
# One image's condition: a label's number, several with weights, or None for no condition.
Label = int | Mapping[int, float] | None

MOST_STEPS = 10_000
DIFFUSING = ("r2id_condition", "r2id_film", "r2id_position", "r2id")


@dataclass(frozen=True)
class Generated:
    """images float32 `[B, c, h, w]` in [-1, 1], latents float32 `[B, C, H, W]`."""

    images: NDArray[np.float32]
    latents: NDArray[np.float32]


def open_bundle(
    engine: str | Path, options: EngineOptions | None = None, expect_sha256: str | None = None
) -> "Pipeline":
    """Open a bundle's folder or any engine file in it.

    `expect_sha256` pins the manifest to a trusted one. Raises ArtefactError for a bundle that is
    not whole, IncompatibleError for an engine that cannot run here.
    """
    path = Path(engine)
    check_engine_kind(path)
    return Pipeline(read_manifest(find_bundle(path), expect_sha256), options)


class Pipeline:
    """A bundle's graphs, each opened when it is first needed and kept."""

    def __init__(self, manifest: Manifest, options: EngineOptions | None = None):
        self.manifest = manifest
        self.options = options or EngineOptions()
        self.model = manifest.model
        self._engines: dict[str, Engine] = {}
        self._opening = threading.Lock()
        self._held: int | None = None  # bytes in memory before the first tile

    def engine(self, graph: str) -> Engine:
        """The engine of a graph, opened on first use."""
        with self._opening:
            if graph not in self._engines:
                self._engines[graph] = open_engine(self.manifest, graph, self.options)
            return self._engines[graph]

    def noise(self, seed: int, indices: Sequence[int], latent: Size) -> NoiseStreams:
        """The noise streams of images `indices` at a latent size."""
        return NoiseStreams(seed, indices, (self.model.r2id.latent_channels, *latent))

    def image_size(self, latent: Size) -> Size:
        """The image size that a latent of this size was trained to decode to."""
        ratio = self.model.pixels_per_latent
        return latent[0] * ratio, latent[1] * ratio

    def latent_size(self, image: Size) -> Size:
        """The latent size that an image of this size was trained to encode to."""
        ratio = self.model.pixels_per_latent
        return max(1, round(image[0] / ratio)), max(1, round(image[1] / ratio))

    def generate(
        self,
        labels: Sequence[Label],
        latent: Size | None = None,
        image: Size | None = None,
        steps: int = 50,
        guidance_scale: float = 2.0,
        eta: float = 0.0,
        seed: int = 0,
        first_index: int = 0,
        on_step: Callable[[int], object] | None = None,
    ) -> Generated:
        """Draw one image per entry of `labels` as one batch.

        Image i has the noise of (seed, first_index + i). `image` defaults to the training ratio
        of `latent`. guidance_scale 1 runs the condition alone, 0 the null condition alone.
        Raises UsageError before any engine is opened, NumericalError naming the step.
        """
        latent = latent or self.model.default_latent
        image = image or self.image_size(latent)
        self.check_request(labels, latent, image, steps, guidance_scale, eta, seed)
        for graph in graphs_for(image):
            self.engine(graph)
        x = self.diffuse(labels, latent, steps, guidance_scale, eta, seed, first_index, on_step)
        return Generated(self.decode(x, image), x)

    def diffuse(
        self,
        labels: Sequence[Label],
        latent: Size,
        steps: int,
        guidance_scale: float,
        eta: float,
        seed: int,
        first_index: int = 0,
        on_step: Callable[[int], object] | None = None,
    ) -> NDArray[np.float32]:
        """The latents `[B, C, *latent]` of a request that was checked; see `generate`."""
        for graph in DIFFUSING:  # a damaged file shows before any work, not after it
            self.engine(graph)
        indices = range(first_index, first_index + len(labels))
        conditions, weights = self.branches(labels, guidance_scale)
        noise = self.noise(seed, indices, latent)
        denoise = self.denoiser(conditions, latent, steps)
        result = ddim.sample(
            denoise, noise.draw(), steps, weights, eta, lambda step: noise.draw(), on_step
        )
        x: NDArray[np.float32] = result.x
        return x

    def check_request(
        self,
        labels: Sequence[Label],
        latent: Size,
        image: Size,
        steps: int,
        guidance_scale: float,
        eta: float,
        seed: int,
    ) -> None:
        """Raise UsageError for a request that the bundle cannot meet."""
        self.check_size("r2id", latent)
        self.check_size("r2ir_decode", image)
        limits = {
            "steps": (steps, 1, MOST_STEPS),
            "guidance_scale": (guidance_scale, -100, 100),
            "eta": (eta, 0, 10),
            "seed": (seed, 0, LARGEST_SEED),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; expected {low} to {high}")
        if not labels:
            raise UsageError("no label is given; expected one per image, None for no condition")
        count = self.model.condition.labels
        for label in labels:
            for number in _weighted(label):
                if not 0 <= number < count:
                    raise UsageError(
                        f"label {number} is not in this bundle; expected 0 to {count - 1} "
                        f"({', '.join(self.manifest.labels)})"
                    )

    def check_size(self, graph: str, size: Size) -> None:
        """Raise UsageError where `size` (height, width) is outside a graph's range."""
        ranges = self.manifest.graph(graph).ranges
        (low_h, high_h), (low_w, high_w) = ranges["height"], ranges["width"]
        if not (low_h <= size[0] <= high_h and low_w <= size[1] <= high_w):
            nearest = (min(max(size[0], low_h), high_h), min(max(size[1], low_w), high_w))
            raise UsageError(
                f"size {size[0]}x{size[1]} is outside the range of {graph}, "
                f"{low_h}x{low_w} to {high_h}x{high_w}; the nearest is {nearest[0]}x{nearest[1]}"
            )

    def branches(
        self, labels: Sequence[Label], guidance_scale: float
    ) -> tuple[Array, list[NDArray[np.float32]]]:
        """Conditions `[K, B, labels]` and each branch's weight per image, `[B, 1, 1, 1]`.

        eps = eps_null + g · Σ w_i (eps_i - eps_null); branches of weight 0 in all images drop out.
        """
        weighted = [_weighted(label) for label in labels]
        count = 1 + max(len(w) for w in weighted)
        conditions = np.zeros((count, len(labels), self.model.condition.labels), np.float32)
        weights = np.zeros((count, len(labels)), np.float32)
        for image, own in enumerate(weighted):
            for branch, (number, weight) in enumerate(own.items(), 1):
                conditions[branch, image, number] = 1
                weights[branch, image] = guidance_scale * weight
            weights[0, image] = 1 - weights[1:, image].sum()
        used = np.abs(weights).max(1) > 0
        return conditions[used], [w.reshape(-1, 1, 1, 1) for w in weights[used]]

    def denoiser(self, conditions: Array, latent: Size, steps: int) -> ddim.Denoiser:
        """eps of `r2id` with all that outlives a step computed here."""
        count, batch, labels = conditions.shape
        unique, place = np.unique(conditions.reshape(-1, labels), axis=0, return_inverse=True)
        text = self.engine("r2id_condition").run({"condition": unique})
        gathered = {
            name: np.ascontiguousarray(
                value[place.reshape(-1)].reshape(count, batch, *value.shape[1:])
            )
            for name, value in text.items()
        }
        alpha_bar = schedule.sampling_alpha_bar(steps).astype(np.float32)
        film = self.engine("r2id_film").run({"alpha_bar": alpha_bar})["film"]
        position = self.engine("r2id_position").run({"coordinates": grid(*latent)})["position"]
        engine = self.engine("r2id")

        def denoise(x: Array, step: int) -> Array:
            inputs = {"latent": x, "position": position, "film": film[step], **gathered}
            return engine.run(inputs)["eps"]

        return denoise

    def resampler(self, memory: int | None = None) -> Resampler:
        """R2IR in tiles within `memory` bytes of this process; None takes DEFAULT_ROOM.

        What the process holds besides is measured once, when this is first asked for.
        """
        if self._held is None:
            self._held = resident()
        room = DEFAULT_ROOM if memory is None else memory - self._held
        return Resampler(self.engine, self.model.r2ir.width, room)

    def encode(self, pixels: Array, size: Size, memory: int | None = None) -> NDArray[np.float32]:
        """Pixels float32 `[B, c, h, w]` in [-1, 1] -> latent `[B, C, *size]` in [-1, 1]."""
        image = pixels.shape[2], pixels.shape[3]
        return self.encode_windows(windows_of(pixels), image, size, memory, len(pixels))

    def encode_windows(
        self,
        read: Read,
        image: Size,
        size: Size,
        memory: int | None = None,
        batch: int = 1,
    ) -> NDArray[np.float32]:
        """`encode` of an image that is read by windows: one tile of it is in memory at a time.

        `read(top, left, height, width)` gives float32 `[B, c, height, width]`, from the top down.
        The latent is made whole: raises ResourceError where a `memory` given is too small for it.
        """
        self.check_size("r2ir_image_summary", image)
        self.check_size("r2ir_encode", size)
        engine = self.engine("r2ir_encode")
        if memory is not None:
            cells = batch * size[0] * size[1]
            check_memory(memory, self.model.r2ir.width, ["r2ir_encode"], cells)
        sums = self.resampler(memory).summarise("r2ir_image_summary", "pixels", read, image, batch)
        return engine.run({"coordinates": grid(*size), **sums})["latent"]

    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """What a decode needs of latents float32 `[B, C, H, W]`, to draw any size and crop from."""
        height, width = latent.shape[2:]
        self.check_size("r2ir_latent_summary", (height, width))
        sums = self.resampler().summarise(
            "r2ir_latent_summary", "latent", windows_of(latent), (height, width), len(latent)
        )
        return DecodeState(sums["kv"], sums["k"], self.render_sha256, metadata or {})

    @property
    def render_sha256(self) -> str:
        """What a `DecodeState` is bound to."""
        return self.manifest.graph("r2ir_render").sha256

    def draw(
        self,
        state: DecodeState,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
        index: int = 0,
    ) -> Iterator[NDArray[np.float32]]:
        """Image `index` of a state at `size` in bands `[c, rows, width]` in [-1, 1], from the top.

        `crop` (top, left, height, width) draws that window of the image alone, `exact` takes the
        GRN ratios from every pixel instead of a sample, `memory` in bytes chooses the tiles.
        Raises UsageError, ArtefactError for a state of another bundle, ResourceError.
        """
        self.check_size("r2ir_decode", size)
        window = window_of(crop, size)
        config = self.model.r2ir
        state.check(self.render_sha256, config.decoder_blocks, config.width, "decode state")
        return self.resampler(memory).draw(state.sums(index), size, window, exact)

    def decode(
        self,
        latent: Array,
        size: Size,
        crop: Crop | None = None,
        exact: bool = False,
        memory: int | None = None,
    ) -> NDArray[np.float32]:
        """Latent float32 `[B, C, H, W]` -> pixels `[B, c, *size]` in [-1, 1]; see `draw`."""
        self.check_size("r2ir_decode", size)
        window = window_of(crop, size)
        state = self.state(latent)
        shape = (len(state), self.model.r2ir.color_channels, window.height, window.width)
        pixels = np.empty(shape, np.float32)
        for index, image in enumerate(pixels):
            top = 0
            for band in self.draw(state, size, crop, exact, memory, index):
                image[:, top : top + band.shape[1]] = band
                top += band.shape[1]
        return pixels

    def resample(self, pixels: Array, size: Size, latent: Size | None = None) -> Array:
        """Pixels `[B, c, h, w]` in [-1, 1] through a latent to `[B, c, *size]`.

        `latent` defaults to the training ratio of the pixels' own size.
        """
        height, width = pixels.shape[2:]
        return self.decode(self.encode(pixels, latent or self.latent_size((height, width))), size)


def _weighted(label: Label) -> dict[int, float]:
    if label is None:
        return {}
    return dict(label) if isinstance(label, Mapping) else {int(label): 1.0}
