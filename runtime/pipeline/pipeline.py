"""A bundle opened: generate, encode, decode, resample. numpy in, numpy out.

Letters: B images, K conditions, C latent channels, c colours, H × W latent, h × w pixels.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.manifest import FILE_NAME, TO_PLAN, Array, Manifest, find_bundle, read_manifest
from runtime.bundle.profiles import choose
from runtime.bundle.state import DecodeState
from runtime.coordinates import grid
from runtime.engines import (
    Engine,
    EngineOptions,
    SamplingEngine,
    check_engine_kind,
    open_engine,
)
from runtime.errors import ArtefactError, UsageError
from runtime.memory import resident
from runtime.pipeline.tiles import (
    DEFAULT_ROOM,
    Read,
    Resampler,
    Size,
    check_memory,
    graphs_for,
    window_of,
    windows_of,
)
from runtime.providers import PROVIDERS
from runtime.sampling import ddim, schedule
from runtime.sampling.noise import COHERENT, NoiseStreams, refine
from runtime.sampling.request import Label, Request

Crop = tuple[int, int, int, int]
# eps enters x0 divided by sqrt(alpha_bar): at 1e-6, where a trajectory starts, its error comes out
# 1000 times as large. bf16 and 8 bits begin where alpha_bar has reached this: with the third of 50
# steps.
EXACT_BELOW = 1e-3
COARSE = ("bf16", "int8", "int8w", "fp8")
ENCODING = ("r2ir_image_summary", "r2ir_encode")
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
    not whole, UsageError for a precision that it lacks, IncompatibleError for an engine that
    cannot run here.
    """
    path, options = Path(engine), options or EngineOptions()
    check_engine_kind(path)
    manifest = read_manifest(find_bundle(path), expect_sha256)
    if path.suffix == ".plan":
        if path.name not in manifest.plans:
            raise ArtefactError(
                f"{path}: no plan that {manifest.folder / FILE_NAME} names; found "
                f"{[*manifest.plans]}. Build plans with: {TO_PLAN} {manifest.folder}"
            )
        precision = manifest.plans[path.name].precision
        options = replace(options, plans=True, precision=precision)
    return Pipeline(manifest, options)


class Pipeline:
    """A bundle's graphs, each opened when it is first needed and kept."""

    def __init__(self, manifest: Manifest, options: EngineOptions | None = None):
        self.manifest = manifest
        self.options = options or EngineOptions()
        manifest.check_precision(self.options.form)
        self.model = manifest.model
        self._engines: dict[tuple[str, str], Engine] = {}
        self._opening = threading.Lock()
        self._held: int | None = None  # bytes in memory before the first tile

    def engine(self, graph: str, precision: str | None = None) -> Engine:
        """The engine of a graph, opened on first use; `precision` if not the pipeline's own."""
        options = replace(self.options, precision=precision or self.options.precision)
        key = graph, options.precision
        with self._opening:
            if key not in self._engines:
                self._engines[key] = open_engine(self.manifest, graph, options)
            return self._engines[key]

    def exact_steps(self, steps: int) -> int:
        """How many of the first of `steps` run in fp32, whatever the precision; see EXACT_BELOW."""
        if self.options.precision not in COARSE:
            return 0
        return int((schedule.sampling_alpha_bar(steps)[:-1] < EXACT_BELOW).sum())

    def step_engines(self, steps: int) -> tuple[Engine, Engine]:
        """The engines of `r2id`: of the first `exact_steps` and of all others; often one."""
        exact = "fp32" if self.exact_steps(steps) else None
        return self.engine("r2id", exact), self.engine("r2id")

    @property
    def provider(self) -> str:
        """What runs the graphs that are open: a name, or several joined by + after a fallback."""
        with self._opening:
            return "+".join(sorted({engine.provider for engine in self._engines.values()}))

    def noise(self, request: Request, latent: Size) -> NoiseStreams:
        """The noise of a request's images at a latent size."""
        shape = (self.model.r2id.latent_channels, *latent)
        return NoiseStreams(request.seed, request.indices, shape, request.noise)

    def image_size(self, latent: Size) -> Size:
        """The image size that a latent of this size was trained to decode to."""
        ratio = self.model.pixels_per_latent
        return latent[0] * ratio, latent[1] * ratio

    def drawn_size(self, request: Request) -> Size:
        """The size of a request's images."""
        return request.image or self.image_size(request.largest)

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
        noise: str = COHERENT,
        continue_at: Size | None = None,
        continue_from: int | None = None,
    ) -> Generated:
        """Draw one image per entry of `labels` as one batch; see `Request` for the rest.

        `latent` defaults to the bundle's; `on_step` is called with the number of each step done.
        Raises UsageError before any engine is opened, NumericalError naming the step.
        """
        latent = latent or self.model.default_latent
        request = Request(
            *(labels, latent, image, steps, guidance_scale, eta, seed, first_index, noise),
            *(continue_at, continue_from),
        )
        self.check_request(request)
        size = self.drawn_size(request)
        for graph in self.drawing_graphs(size):
            self.engine(graph)
        x = self.diffuse(request, on_step)
        return Generated(self.decode(x, size), x)

    def diffuse(
        self, request: Request, on_step: Callable[[int], object] | None = None
    ) -> NDArray[np.float32]:
        """The latents `[B, C, H, W]` of a request that was checked."""
        steps, turn, larger = request.steps, request.turn, request.continue_at
        self.step_engines(steps)  # a damaged file shows before any work, not after it
        for graph in DIFFUSING + (ENCODING if larger else ()):
            self.engine(graph)
        streams = self.noise(request, request.latent)
        x = self.sample(streams.draw(), streams, request, on_step, (0, turn))
        if larger is None:
            return x
        conditions, weights = request.branches(self.model.condition.labels)
        denoise = self.denoiser(conditions, request.latent, steps)
        part = ddim.sample(denoise, x, steps, weights, first=turn, last=turn)
        streams = self.noise(request, larger)
        x = self.enlarge(part, turn, steps, streams.draw())
        return self.sample(x, streams, request, on_step, (turn, steps))

    def sample(
        self,
        x: Array,
        streams: NoiseStreams,
        request: Request,
        on_step: Callable[[int], object] | None,
        part: tuple[int, int],
    ) -> NDArray[np.float32]:
        """`x` `[B, C, H, W]` after DDIM steps, on the device where it can stay.

        `part`: the first step and the one before which to stop, of `request.steps`.
        """
        (start, stop), steps = part, request.steps
        size = (x.shape[2], x.shape[3])
        conditions, weights = request.branches(self.model.condition.labels)
        first, engine = self.step_engines(steps)
        if isinstance(first, SamplingEngine) and isinstance(engine, SamplingEngine):
            inputs, film = self.step_inputs(conditions, size, steps)
            turn = min(max(self.exact_steps(steps), start), stop)
            for own, span in ((first, (start, turn)), (engine, (turn, stop))):
                updates = self.updates(film, weights, streams, request, span)
                if update := next(updates, None):  # None where the span has no step
                    given = {"latent": x, **inputs, **update}
                    x = own.sample(given, chain([update], updates), on_step, span[0])
            return x

        def fresh(step: int) -> Array:
            return streams.draw(step + 1)

        denoise = self.denoiser(conditions, size, steps)
        made = ddim.sample(denoise, x, steps, weights, request.eta, fresh, on_step, *part)
        return np.asarray(made.x, np.float32)

    def denoiser(self, conditions: Array, latent: Size, steps: int) -> ddim.Denoiser:
        """eps of `r2id` with all that outlives a step computed here."""
        inputs, film = self.step_inputs(conditions, latent, steps)
        exact, (first, engine) = self.exact_steps(steps), self.step_engines(steps)

        def denoise(x: Array, step: int) -> Array:
            own = first if step < exact else engine
            return own.run({"latent": x, "film": film[step], **inputs})["eps"]

        return denoise

    def enlarge(self, part: ddim.Sample, step: int, steps: int, noise: Array) -> Array:
        """x of `step` at the larger size of `noise` `[B, C, H, W]`, from a sample at that step.

        x = sqrt(a) · x0 + sqrt(1 - a) · eps there as here: R2IR enlarges the estimate of x0, and
        the estimate of eps becomes the coarse part of `noise`, so that the variance stays 1 - a.
        """
        height, width = noise.shape[2:]
        a = float(schedule.sampling_alpha_bar(steps)[step])
        x0 = self.encode(self.decode(part.x0, self.image_size((height, width))), (height, width))
        eps = refine(ddim.predict_eps(part.x, part.x0, a), noise)
        return np.asarray(x0 * math.sqrt(a) + eps * math.sqrt(1 - a), np.float32)

    def check_request(self, request: Request, batch: int | None = None) -> None:
        """Raise UsageError for a request that the bundle cannot meet.

        `batch`: images drawn at once, where not all of them are.
        """
        request.check(self.manifest.labels)
        conditions = request.branches(count := self.model.condition.labels)[0]
        unique = np.unique(conditions.reshape(-1, count), axis=0)
        images = min(len(request.labels), batch or len(request.labels))
        forms = {self.options.form} | ({"fp32"} if self.exact_steps(request.steps) else set())
        for size in (request.latent, request.largest):
            for form in forms:  # each has a plan, and profiles, of its own
                self.check_size("r2id", size, form, batch=images, conditions=len(conditions))
            self.check_size("r2id_position", size)
        self.check_size("r2id_film", request.latent, steps=request.steps + 1)
        self.check_size("r2id_condition", request.latent, conditions=len(unique))
        self.check_size("r2ir_latent_summary", request.largest, batch=1)  # one after the other
        self.check_size("r2ir_decode", self.drawn_size(request), batch=1)
        if request.continue_at is not None:  # what `enlarge` decodes and encodes
            between = self.image_size(request.continue_at)
            self.check_size("r2ir_latent_summary", request.latent, batch=1)
            self.check_size("r2ir_decode", between, batch=1)
            self.check_size("r2ir_image_summary", between, batch=images)
            self.check_size("r2ir_encode", request.continue_at, batch=images)

    def check_size(self, graph: str, size: Size, form: str | None = None, **axes: int) -> None:
        """Raise UsageError where a graph cannot run at `size` (height, width) and other `axes`.

        `form`: its precision, if not the pipeline's own. With plans, one profile must cover all.
        """
        form = form or self.options.form
        ranges = self.manifest.graph(graph, form).ranges
        if "height" in ranges:
            (low_h, high_h), (low_w, high_w) = ranges["height"], ranges["width"]
            nearest = (min(max(size[0], low_h), high_h), min(max(size[1], low_w), high_w))
            if size != nearest:
                raise UsageError(
                    f"size {size[0]}x{size[1]} is outside the range of {graph}, {low_h}x{low_w} "
                    f"to {high_h}x{high_w}; the nearest is {nearest[0]}x{nearest[1]}"
                )
        plan = self.manifest.plan(graph, form) if self.options.plans else None
        if plan is not None:
            asked = {"height": size[0], "width": size[1], **axes}
            choose(plan.file, plan.profiles, {a: asked[a] for a in ranges if a in asked})

    def step_inputs(
        self, conditions: Array, latent: Size, steps: int
    ) -> tuple[dict[str, Array], Array]:
        """What outlives a step: the step graph's inputs that stay, and `film` of every step."""
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
        return {"position": position, **gathered}, film

    def updates(
        self,
        film: Array,
        weights: Sequence[NDArray[np.float32]],
        noise: NoiseStreams,
        request: Request,
        part: tuple[int, int],
    ) -> Iterator[dict[str, Array]]:
        """What changes per step of `part` for a `SamplingEngine`; `noise` where it has changed."""
        first, last = part
        alpha_bars = [float(a) for a in schedule.sampling_alpha_bar(request.steps)]
        for step, (a, a_next) in enumerate(pairwise(alpha_bars[first : last + 1]), first):
            keep, move, spread = ddim.step_weights(a, a_next, request.eta)
            update = {
                "film": film[step],
                "keep": np.array([keep], np.float32),
                "weights": np.stack(weights) * np.float32(move),
            }
            if spread > 0:
                update["noise"] = noise.draw(step + 1) * np.float32(spread)
            elif step == first:
                update["noise"] = np.zeros((len(noise.indices), *noise.shape), np.float32)
            yield update

    def resampler(self, memory: int | None = None) -> Resampler:
        """R2IR in tiles within `memory` bytes of this process; None takes DEFAULT_ROOM.

        What the process holds besides is measured once, when this is first asked for.
        """
        if self._held is None:
            self._held = resident()
        room = DEFAULT_ROOM if memory is None else memory - self._held
        return Resampler(self.engine, self.model.r2ir.width, room, self.whole)

    @property
    def whole(self) -> bool:
        """Whether R2IR runs on whole images: plans are built for their sizes and for no tiles.

        So are the engines of a provider that takes its sizes from the plans.
        """
        plan = self.manifest.plan("r2ir_decode", self.options.form)
        builds = bool(PROVIDERS[self.options.provider].profiles) and plan is not None
        return self.options.plans or builds

    def drawing_graphs(self, size: Size) -> tuple[str, ...]:
        """What drawing an image of `size` needs of a bundle."""
        return graphs_for(size, self.whole)

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
        self.check_size("r2ir_image_summary", image, batch=batch)
        self.check_size("r2ir_encode", size, batch=batch)
        engine = self.engine("r2ir_encode")
        if memory is not None:
            cells = batch * size[0] * size[1]
            check_memory(memory, self.model.r2ir.width, ["r2ir_encode"], cells)
        sums = self.resampler(memory).summarise("r2ir_image_summary", "pixels", read, image, batch)
        return engine.run({"coordinates": grid(*size), **sums})["latent"]

    def state(self, latent: Array, metadata: dict[str, Any] | None = None) -> DecodeState:
        """What a decode needs of latents float32 `[B, C, H, W]`, to draw any size and crop from.

        One latent after the other, so that B has no limit and changes nothing.
        """
        size = (latent.shape[2], latent.shape[3])
        self.check_size("r2ir_latent_summary", size, batch=1)
        summarise = partial(self.resampler().summarise, "r2ir_latent_summary", "latent", size=size)
        sums = [summarise(read=windows_of(own)) for own in np.split(latent, len(latent))]
        kv, k = (np.concatenate([own[name] for own in sums]) for name in ("kv", "k"))
        return DecodeState(kv, k, self.render_sha256, metadata or {})

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
        self.check_size("r2ir_decode", size, batch=1)
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
        self.check_size("r2ir_decode", size, batch=1)
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
        self.check_size("r2ir_decode", size, batch=1)  # before any work
        return self.decode(self.encode(pixels, latent or self.latent_size((height, width))), size)
