"""A bundle opened: generate, encode, decode, resample. numpy in, numpy out.

Letters: B images, K conditions, C latent channels, c colours, H × W latent, h × w pixels.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import ddim, schedule
from runtime.coordinates import grid
from runtime.engines import (
    Engine,
    EngineOptions,
    SamplingEngine,
    check_engine_kind,
    open_engine,
)
from runtime.errors import ArtefactError, UsageError
from runtime.manifest import FILE_NAME, TO_PLAN, Array, Manifest, find_bundle, read_manifest
from runtime.noise import LARGEST_SEED, NoiseStreams
from runtime.profiles import choose

Size = tuple[int, int]
# One image's condition: a label's number, several with weights, or None for no condition.
Label = int | Mapping[int, float] | None

MOST_STEPS = 10_000
# eps enters x0 divided by sqrt(alpha_bar): at 1e-6, where a trajectory starts, its error comes out
# 1000 times as large. 8 bits begin where alpha_bar has reached this: after the second of 50 steps.
EXACT_BELOW = 1e-3
IN_8_BITS = ("int8", "int8w", "fp8")
GENERATING = (
    *("r2id_condition", "r2id_film", "r2id_position", "r2id"),
    *("r2ir_latent_summary", "r2ir_decode"),
)


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
        manifest.check_precision(self.options.precision)
        self.model = manifest.model
        self._engines: dict[tuple[str, str], Engine] = {}
        self._opening = threading.Lock()

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
        if self.options.precision not in IN_8_BITS:
            return 0
        return int((schedule.sampling_alpha_bar(steps)[:-1] < EXACT_BELOW).sum())

    @property
    def provider(self) -> str:
        """What runs the graphs that are open: a name, or several joined by + after a fallback."""
        with self._opening:
            return "+".join(sorted({engine.provider for engine in self._engines.values()}))

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
        for graph in GENERATING:  # a damaged file shows before any work, not after it
            self.engine(graph)
        if self.exact_steps(steps):
            self.engine("r2id", "fp32")
        indices = range(first_index, first_index + len(labels))
        noise = self.noise(seed, indices, latent)
        x = self.sample(labels, noise, latent, steps, guidance_scale, eta, on_step)
        return Generated(self.decode(x, image), x)

    def sample(
        self,
        labels: Sequence[Label],
        noise: NoiseStreams,
        latent: Size,
        steps: int,
        guidance_scale: float,
        eta: float,
        on_step: Callable[[int], object] | None,
    ) -> NDArray[np.float32]:
        """The latent `[B, C, H, W]` after `steps` DDIM steps, on the device where it can stay."""
        conditions, weights = self.branches(labels, guidance_scale)
        inputs, film = self.step_inputs(conditions, latent, steps)
        exact = self.exact_steps(steps)
        engine, first = self.engine("r2id"), self.engine("r2id", "fp32" if exact else None)
        x = noise.draw()
        if isinstance(engine, SamplingEngine) and isinstance(first, SamplingEngine):
            updates = self.updates(film, weights, noise, steps, eta)
            for own, count in ((first, exact), (engine, steps - exact)):
                if count:
                    start = next(updates)
                    inputs |= start
                    rest = islice(updates, count - 1)
                    x = own.sample({"latent": x, **inputs}, chain([start], rest), on_step)
            return x

        def denoise(x: Array, step: int) -> Array:
            own = first if step < exact else engine
            return own.run({"latent": x, "film": film[step], **inputs})["eps"]

        return ddim.sample(denoise, x, steps, weights, eta, lambda step: noise.draw(), on_step).x

    def check_request(
        self,
        labels: Sequence[Label],
        latent: Size,
        image: Size,
        steps: int,
        guidance_scale: float,
        eta: float,
        seed: int,
        batch: int | None = None,
    ) -> None:
        """Raise UsageError for a request that the bundle cannot meet.

        `batch`: images drawn at once, where not all of `labels` are.
        """
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
        conditions = self.branches(labels, guidance_scale)[0]
        unique = np.unique(conditions.reshape(-1, count), axis=0)
        images = min(len(labels), batch or len(labels))
        self.check_size("r2id", latent, batch=images, conditions=len(conditions))
        self.check_size("r2id_position", latent)
        self.check_size("r2id_film", latent, steps=steps + 1)
        self.check_size("r2id_condition", latent, conditions=len(unique))
        self.check_size("r2ir_latent_summary", latent, batch=images)
        self.check_size("r2ir_decode", image, batch=images)

    def check_size(self, graph: str, size: Size, **axes: int) -> None:
        """Raise UsageError where a graph cannot run at `size` (height, width) and other `axes`.

        With plans, one profile must cover them all.
        """
        ranges = self.manifest.graph(graph, self.options.precision).ranges
        if "height" in ranges:
            (low_h, high_h), (low_w, high_w) = ranges["height"], ranges["width"]
            nearest = (min(max(size[0], low_h), high_h), min(max(size[1], low_w), high_w))
            if size != nearest:
                raise UsageError(
                    f"size {size[0]}x{size[1]} is outside the range of {graph}, {low_h}x{low_w} "
                    f"to {high_h}x{high_w}; the nearest is {nearest[0]}x{nearest[1]}"
                )
        plan = self.manifest.plan(graph, self.options.precision) if self.options.plans else None
        if plan is not None:
            asked = {"height": size[0], "width": size[1], **axes}
            choose(plan.file, plan.profiles, {a: asked[a] for a in ranges if a in asked})

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
        steps: int,
        eta: float,
    ) -> Iterator[dict[str, Array]]:
        """What changes per step for a `SamplingEngine`; `noise` where it is not as it was."""
        alpha_bars = [float(a) for a in schedule.sampling_alpha_bar(steps)]
        for step, (a, a_next) in enumerate(pairwise(alpha_bars)):
            keep, move, spread = ddim.step_weights(a, a_next, eta)
            update = {
                "film": film[step],
                "keep": np.array([keep], np.float32),
                "weights": np.stack(weights) * np.float32(move),
            }
            if spread > 0:
                update["noise"] = noise.draw() * np.float32(spread)
            elif step == 0:
                update["noise"] = np.zeros((len(noise.generators), *noise.shape), np.float32)
            yield update

    def encode(self, pixels: Array, size: Size) -> NDArray[np.float32]:
        """Pixels float32 `[B, c, h, w]` in [-1, 1] -> latent `[B, C, *size]` in [-1, 1]."""
        batch, _, height, width = pixels.shape
        self.check_size("r2ir_image_summary", (height, width), batch=batch)
        self.check_size("r2ir_encode", size, batch=batch)
        sums = self.engine("r2ir_image_summary").run(
            {"pixels": pixels, "coordinates": grid(height, width)}
        )
        return self.engine("r2ir_encode").run({"coordinates": grid(*size), **sums})["latent"]

    def decode(self, latent: Array, size: Size) -> NDArray[np.float32]:
        """Latent float32 `[B, C, H, W]` -> pixels `[B, c, *size]` in [-1, 1]."""
        batch, _, height, width = latent.shape
        self.check_size("r2ir_latent_summary", (height, width), batch=batch)
        self.check_size("r2ir_decode", size, batch=batch)
        sums = self.engine("r2ir_latent_summary").run(
            {"latent": latent, "coordinates": grid(height, width)}
        )
        return self.engine("r2ir_decode").run({"coordinates": grid(*size), **sums})["pixels"]

    def resample(self, pixels: Array, size: Size, latent: Size | None = None) -> Array:
        """Pixels `[B, c, h, w]` in [-1, 1] through a latent to `[B, c, *size]`.

        `latent` defaults to the training ratio of the pixels' own size.
        """
        batch, _, height, width = pixels.shape
        self.check_size("r2ir_decode", size, batch=batch)  # before any work
        return self.decode(self.encode(pixels, latent or self.latent_size((height, width))), size)


def _weighted(label: Label) -> dict[int, float]:
    if label is None:
        return {}
    return dict(label) if isinstance(label, Mapping) else {int(label): 1.0}
