"""A bundle opened: generate, encode, decode, resample. numpy in, numpy out.

Letters: B images, K conditions, C latent channels, c colours, H × W latent, h × w pixels.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.manifest import FILE_NAME, TO_PLAN, Array, Manifest, find_bundle, read_manifest
from runtime.bundle.profiles import choose
from runtime.bundle.state import DecodeState
from runtime.coordinates import grid
from runtime.engines import (
    HISTORY,
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
from runtime.sampling import schedule, solvers
from runtime.sampling.guidance import Guidance, Label, guide
from runtime.sampling.loop import Predictor, sample
from runtime.sampling.noise import NoiseStreams, refine
from runtime.sampling.request import Request
from runtime.sampling.solvers import Table

Crop = tuple[int, int, int, int]
# eps enters x0 divided by sqrt(alpha_bar): at 1e-6, where a trajectory starts, its error comes out
# 1000 times as large. bf16 and 8 bits begin after the first step, once alpha_bar has reached this:
# with the third of 12 steps. In int8 and bf16 that is worth 6 dB of the picture.
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
        self.schedule = schedule.read(manifest.schedule, f"{manifest.folder / FILE_NAME}")
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

    def exact_steps(self, table: Table) -> int:
        """How many of the first steps run in fp32, whatever the precision; see EXACT_BELOW."""
        if self.options.precision not in COARSE:
            return 0
        return max(1, int((table.alpha_bar[:-1] < EXACT_BELOW).sum()))

    def step_engines(self, table: Table) -> tuple[Engine, Engine]:
        """The engines of `r2id`: of the first `exact_steps` and of all others; often one."""
        exact = "fp32" if self.exact_steps(table) else None
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
        on_step: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Generated:
        """Draw one image per entry of `labels` as one batch; `options` are those of `Request`.

        `latent` defaults to the bundle's; `on_step` is called with the number of each step done.
        Raises UsageError before any engine is opened, NumericalError naming the step.
        """
        latent = latent or self.model.default_latent
        request = Request(labels, latent, **options)
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
        table, turn, larger = request.table(self.schedule), request.turn, request.continue_at
        self.step_engines(table)  # a damaged file shows before any work, not after it
        for graph in DIFFUSING + (ENCODING if larger else ()):
            self.engine(graph)
        streams = self.noise(request, request.latent)
        guidance = self.guidance(request, table)
        x = self.sample(streams.draw(), streams, table, guidance, on_step, (0, turn))
        if larger is None:
            return x
        eps = self.predictor(guidance, request.latent, table)(x, turn)
        streams = self.noise(request, larger)
        x = self.enlarge(x, eps, float(table.alpha_bar[turn]), streams.draw())
        return self.sample(x, streams, table, guidance, on_step, (turn, len(table)))

    def guidance(self, request: Request, table: Table) -> Guidance:
        """The conditions of a request and their weights in each step of its table."""
        return request.guidance(table, self.schedule, self.model.condition.labels)

    def sample(
        self,
        x: Array,
        streams: NoiseStreams,
        table: Table,
        guidance: Guidance,
        on_step: Callable[[int], object] | None,
        part: tuple[int, int],
    ) -> NDArray[np.float32]:
        """`x` `[B, C, H, W]` after steps of a table, on the device where it can stay.

        `part`: the first step and the one before which to stop.
        """
        size = (x.shape[2], x.shape[3])

        def fresh(step: int) -> Array:
            return streams.draw(step + 1)

        engines = self.step_engines(table)
        if not all(isinstance(engine, SamplingEngine) for engine in engines):
            predict = self.predictor(guidance, size, table)
            return np.asarray(sample(predict, x, table, fresh, on_step, *part), np.float32)
        exact = self.exact_steps(table)
        inputs, film = self.step_inputs(guidance.conditions, size, table)
        state = {"latent": x} | {name: np.zeros_like(x) for name in (*HISTORY, "noise")}
        kinds = groupby(range(*part), lambda step: (step >= exact, guidance.branches(step)))
        for (later, branches), group in kinds:  # an engine and a number of conditions each
            steps = list(group)
            engine = engines[later]
            assert isinstance(engine, SamplingEngine)
            given = {**state, **self.counted(inputs, branches)}
            updates = (self.update(film, table, guidance, fresh, step) for step in steps)
            state |= engine.sample(given, updates, on_step, steps[0])
        return state["latent"]

    def predictor(self, guidance: Guidance, latent: Size, table: Table) -> Predictor:
        """Guided eps of `r2id` with all that outlives a step computed here."""
        inputs, film = self.step_inputs(guidance.conditions, latent, table)
        exact, (first, engine) = self.exact_steps(table), self.step_engines(table)

        def predict(x: Array, step: int) -> Array:
            own = first if step < exact else engine
            given = self.counted(inputs, guidance.branches(step))
            eps = own.run({"latent": x, "film": film[step], **given})["eps"]
            return np.asarray(guide(eps, guidance.at(step)))

        return predict

    def enlarge(self, x: Array, eps: Array, alpha_bar: float, noise: Array) -> Array:
        """x at the larger size of `noise` `[B, C, H, W]`, from x and its eps where both are small.

        x = sqrt(a) · x0 + sqrt(1 - a) · eps there as here: R2IR enlarges the estimate of x0, and
        that of eps becomes the coarse part of `noise`, so that the variance stays 1 - a.
        """
        height, width = noise.shape[2:]
        x0 = solvers.predict_x0(x, eps, alpha_bar)
        eps = refine(solvers.predict_eps(x, x0, alpha_bar), noise)
        x0 = self.encode(self.decode(x0, self.image_size((height, width))), (height, width))
        larger = x0 * math.sqrt(alpha_bar) + eps * math.sqrt(1 - alpha_bar)
        return np.asarray(larger, np.float32)

    def check_request(self, request: Request, batch: int | None = None) -> None:
        """Raise UsageError for a request that the bundle cannot meet.

        `batch`: images drawn at once, where not all of them are.
        """
        request.check(self.manifest.labels)
        guidance = self.guidance(request, table := request.table(self.schedule))
        conditions = guidance.conditions
        unique = np.unique(conditions.reshape(-1, conditions.shape[2]), axis=0)
        counts = {len(guidance.branches(step)) for step in range(len(table))}
        images = min(len(request.labels), batch or len(request.labels))
        forms = {self.options.form} | ({"fp32"} if self.exact_steps(table) else set())
        for size in (request.latent, request.largest):
            for form in forms:  # each has a plan, and profiles, of its own
                for count in counts:
                    self.check_size("r2id", size, form, batch=images, conditions=count)
            self.check_size("r2id_position", size)
        self.check_size("r2id_film", request.latent, steps=len(table.alpha_bar))
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
        self, conditions: Array, latent: Size, table: Table
    ) -> tuple[dict[str, Array], Array]:
        """What outlives a step: the step graph's inputs that stay, and `film` of every node."""
        count, batch, labels = conditions.shape
        unique, place = np.unique(conditions.reshape(-1, labels), axis=0, return_inverse=True)
        text = self.engine("r2id_condition").run({"condition": unique})
        gathered = {
            name: np.ascontiguousarray(
                value[place.reshape(-1)].reshape(count, batch, *value.shape[1:])
            )
            for name, value in text.items()
        }
        alpha_bar = table.alpha_bar.astype(np.float32)
        film = self.engine("r2id_film").run({"alpha_bar": alpha_bar})["film"]
        position = self.engine("r2id_position").run({"coordinates": grid(*latent)})["position"]
        return {"position": position, **gathered}, film

    def counted(self, inputs: dict[str, Array], branches: tuple[int, ...]) -> dict[str, Array]:
        """The step graph's `inputs` of some of the conditions alone."""
        own = {s.name for s in self.manifest.graph("r2id").inputs if s.axes[0] == "conditions"}
        return {
            name: value[list(branches)] if name in own and len(branches) < len(value) else value
            for name, value in inputs.items()
        }

    def update(
        self,
        film: Array,
        table: Table,
        guidance: Guidance,
        noise: Callable[[int], Array],
        step: int,
    ) -> dict[str, Array]:
        """What changes in a step for a `SamplingEngine`; `noise` where it is used."""
        row = *table.update(step), *map(float, table.rows[step, :2])
        update = {
            "film": film[step],
            "row": np.array(row, np.float32),
            "weights": np.stack(guidance.at(step)),
        }
        if table.rows[step, 6] > 0:
            update["noise"] = noise(step)
        return update

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
