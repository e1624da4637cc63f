"""Real inputs of every heavy graph: what the shipped numbers go through, not random ones.

Pictures are drawn once; latents of any size are encoded from them, so they are in [-1, 1] however
well the checkpoint draws, and the step graph sees them on their way from noise, at several
alpha_bar.

For quantisation `calibration_set` records whole DDIM trajectories, at several sizes and guidance
scales, and a resampler on its way there and back; they are kept in a file that knows its bundle.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from calibration.recorder import Recorder
from runtime.bundle.arrays import read_arrays, require
from runtime.bundle.files import parsing
from runtime.bundle.interface import Interface, Size, size_name
from runtime.bundle.manifest import Array, Manifest
from runtime.coordinates import grid
from runtime.engines.onnxruntime import load_library
from runtime.errors import ArtefactError, UsageError
from runtime.images.idx import read_idx
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.diffuser import EXACT_BELOW, Progress
from runtime.pipeline.tiler import Roles
from runtime.progress import Bar
from runtime.sampling import solvers
from runtime.sampling.labels import Label, Labels
from runtime.sampling.request import Request
from runtime.sampling.schedule import log_snr, read

PICTURES = 3
# Of the default latent's height and width; the largest last.
SCALES = ((0.5, 0.5), (1, 1), (2, 2), (1.125, 2), (2, 0.75), (4, 4))
DRAWING_STEPS = 20
# Step k of these is where the k-th sample (modulo their count) of the step graph is taken:
# alpha_bar 1e-6, 0.14, 0.49, 0.85 and 1.
TRAJECTORY_STEPS = 4
FORMAT = 1
FILE_NAME = "calibration-{}.npz"
IDX_FILE = "train-images-idx3-ubyte"
LARGEST, MOST_ARRAYS = (1 << 32) - 1, 10_000  # of a file of samples, in bytes and in number
LARGEST_INDEX = 1 << 24  # bytes

Arrays = dict[str, Array]


class _Key(Struct):
    """What a file of samples was made of, as far as a reader needs it."""

    bundle: str


class _Row(Struct):
    """A sample in such a file, its arrays by name."""

    graph: str
    size: Size
    inputs: dict[str, str]
    t: float | None
    guidance_scale: float | None


class _Index(Struct):
    key: _Key
    samples: list[_Row]


def heavy(manifest: Manifest) -> list[str]:
    """The graphs that lower precisions are made of: the step's, and the resampler's but for one.

    The one that ratios are counted with stays fp32: its sums over all pixels are what an exact
    drawing rests on.
    """
    if not manifest.interface.decoupled:
        return [manifest.step_graph]
    roles = Roles.of(manifest)
    names = (roles.read_image, roles.encode, roles.read_latent, roles.decode, roles.render)
    return [manifest.step_graph, *names]


def default_sizes(interface: Interface) -> tuple[Size, ...]:
    """Latent sizes around the default one: half of it, twice and, of a coded latent, four times.

    Four times the pixels a side, where these are diffused, would take hours.
    """
    scales = SCALES if interface.decoupled else SCALES[:-1]
    sides, (height, width) = interface.latent_sides, interface.default_latent
    each = (
        (sides.nearest(round(height * tall)), sides.nearest(round(width * wide)))
        for tall, wide in scales
    )
    return tuple(dict.fromkeys(each))


@dataclass(frozen=True)
class Settings:
    """What a calibration set is drawn with; `pictures` images go into each run.

    `sizes` are those of latents. A guidance scale of 0 runs the null condition alone, 1 the
    condition alone, others both. Of each trajectory every `every`-th step is kept, from another
    first one each time, so that together they hold every t. The steps that 8-bit precisions leave
    to fp32 are no samples.
    """

    sizes: tuple[Size, ...]
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    steps: int = 50
    every: int = 5
    pictures: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One run of a graph: its inputs, and where they come from.

    `size` is the graph's own grid; `t` (1 noise, 0 clean) and `guidance_scale` are the step graph's
    and None elsewhere.
    """

    graph: str
    size: Size
    inputs: Arrays
    t: float | None = None
    guidance_scale: float | None = None


class Samples:
    """Inputs of a bundle's heavy graphs, and the fp32 graphs' own outputs for them."""

    def __init__(self, manifest: Manifest):
        self.bundle = Bundle(manifest)
        self.labels = Labels(manifest.interface.labels, manifest.interface.parts)
        own: list[Label] = [self.labels.turn(i) for i in range(PICTURES)]
        self.pictures = self.bundle.generate(own, steps=DRAWING_STEPS).images
        self.latents = self.bundle.encode(self.pictures, manifest.interface.default_latent)

    def take(self, graph: str, sizes: Mapping[str, int], number: int) -> tuple[Arrays, Arrays]:
        """Inputs and fp32 outputs of `graph` at `sizes` of its named axes.

        `sizes` has height and width (the graph's own grid), batch up to 3, and for the step
        graph conditions. `number` chooses its alpha_bar and noise.
        """
        inputs = self._inputs(graph, sizes, number)
        return inputs, self.bundle.engines.open(graph).run(inputs)

    def _inputs(self, graph: str, sizes: Mapping[str, int], number: int) -> Arrays:
        size, batch = (sizes["height"], sizes["width"]), sizes["batch"]
        pictures, latents = self.pictures[:batch], self.latents[:batch]
        if graph == self.bundle.diffuser.step_graph:
            coded = self.bundle.interface.decoupled
            resized = self.bundle.encode if coded else self.bundle.resampler.enlarge
            return self._step(resized(pictures, size), sizes.get("conditions", 1), size, number)
        roles, at = Roles.of(self.bundle.manifest), {"coordinates": grid(*size)}
        if graph == roles.read_image:
            return {"pixels": self.bundle.decode(latents, size), **at}
        if graph == roles.encode:
            return self._sums(roles.read_image, "pixels", pictures) | at
        if graph == roles.read_latent:
            return {"latent": self.bundle.encode(pictures, size), **at}
        inputs = self._sums(roles.read_latent, "latent", latents) | at
        if graph == roles.render:  # draws again what a decode draws, given its ratios
            decoded = self.bundle.engines.open(roles.decode).run(inputs)
            del decoded["pixels"]
            inputs |= decoded
        return inputs

    def _sums(self, graph: str, name: str, values: Array) -> Arrays:
        """The sums over the tokens of `values`, as the other graphs take them."""
        at = grid(values.shape[2], values.shape[3])
        return self.bundle.engines.open(graph).run({name: values, "coordinates": at})

    def _step(self, latent: Array, conditions: int, size: Size, number: int) -> Arrays:
        """Inputs of the step graph on its way from noise to `latent` `[B, C, H, W]`."""
        batch, labels = len(latent), self.labels
        one_hot = np.zeros((conditions, batch, len(labels.names)), np.float32)
        for branch, image in np.ndindex(conditions, batch):
            if branch and labels.names:  # branch 0 is the null condition
                one_hot[branch, image, list(labels.combination(labels.turn(branch + image)))] = 1
        schedule = read(self.bundle.manifest.schedule, size)
        table = solvers.table("ddim", schedule, TRAJECTORY_STEPS)
        alpha_bars = table.alpha_bar
        step = number % len(alpha_bars)
        noise = np.random.default_rng(number).standard_normal(latent.shape)
        x = np.sqrt(alpha_bars[step]) * latent + np.sqrt(1 - alpha_bars[step]) * noise
        inputs = self.bundle.diffuser.inputs(one_hot, size, alpha_bars)
        return {"latent": x.astype(np.float32), **inputs.at(step)}


def calibration_set(
    manifest: Manifest, settings: Settings, folder: Path, scratch: Path, data: Path | None
) -> list[Sample]:
    """The bundle's samples, from `folder` where these settings and versions have made them.

    `data` is a folder of MNIST's IDX files whose pictures go through the resampler; without it
    these are pictures that the bundle draws. Written through `scratch`, a folder on the same disk.
    Raises UsageError for an illegal size, and for `data` where there is no resampler.
    """
    for size in settings.sizes:
        manifest.interface.latent_sides.check(size, "sizes")
    if data is not None and not manifest.interface.decoupled:
        raise UsageError(
            f"--data {data}: no picture goes through this bundle's graphs, since "
            f"{manifest.interface.why_coupled}. Leave --data out"
        )
    pictures = read_pictures(data, settings) if data else None
    given = hashlib.sha256(b"" if pictures is None else pictures.tobytes()).hexdigest()
    key = {
        "format": FORMAT,
        "bundle": fingerprint(manifest),
        "settings": json.loads(json.dumps(asdict(settings))),
        "pictures": given,
        "versions": {"numpy": np.__version__, "onnxruntime": load_library().__version__},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / FILE_NAME.format(digest[:12])
    if not path.exists():
        save(scratch / path.name, key, drawn(manifest, settings, pictures))
        (scratch / path.name).replace(path)
    return load(path, manifest)


def fingerprint(manifest: Manifest) -> str:
    """The SHA-256 of the fp32 graphs' own, which names a bundle whatever variants it has."""
    own = {name: spec.sha256 for name, spec in sorted(manifest.graphs.items())}
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def read_pictures(folder: Path, settings: Settings) -> Array:
    """Digits of MNIST's training images: float32 `[pictures, 1, 32, 32]` in [-1, 1]."""
    digits = read_idx(folder / IDX_FILE)
    if digits.ndim != 3 or len(digits) < settings.pictures or not digits.size:
        raise ArtefactError(
            f"{folder / IDX_FILE}: {digits.shape}; expected at least {settings.pictures} digits. "
            "Copy it again"
        )
    chosen = np.random.default_rng(settings.seed).choice(len(digits), settings.pictures, False)
    padded = np.pad(digits[chosen], ((0, 0), (2, 2), (2, 2)))
    return (padded[:, None] / np.float32(127.5) - 1).astype(np.float32)


def drawn(manifest: Manifest, settings: Settings, pictures: Array | None) -> Iterator[Sample]:
    """Every sample, drawn by the fp32 graphs."""
    recorder = Recorder(manifest)
    bundle = Bundle(manifest, engines=recorder)
    count, labels = settings.pictures, Labels(bundle.interface.labels, bundle.interface.parts)
    coded = bundle.interface.decoupled
    if coded and (pictures is None or pictures.shape[1] != bundle.interface.color_channels):
        own: list[Label] = [labels.turn(i) for i in range(count)]
        pictures = bundle.generate(own, steps=DRAWING_STEPS, seed=settings.seed).images
    runs = len(settings.sizes) * (coded + len(settings.guidance_scales))
    with Bar(total=runs, desc="samples", unit="run") as bar:
        for number, size in enumerate(settings.sizes):
            bar.set_postfix_str(size_name(size))
            if coded and pictures is not None:
                yield from through_resampler(bundle, pictures, size)
                bar.update()
            for turn, scale in enumerate(settings.guidance_scales):
                turn += number * len(settings.guidance_scales)
                own = [labels.turn(turn * count + i) for i in range(count)]
                yield from trajectory(bundle, recorder, own, size, scale, settings, turn)
                bar.update()


def through_resampler(bundle: Bundle, pictures: Array, size: Size) -> list[Sample]:
    """Pictures to a latent of `size`, and the latent to an image of the training ratio.

    The graphs run on whole images, which a bundle may draw in tiles.
    """
    found: list[Sample] = []
    roles = Roles.of(bundle.manifest)

    def run(graph: str, at: Size, inputs: Arrays) -> Arrays:
        found.append(Sample(graph, at, {**inputs, "coordinates": grid(*at)}))
        return bundle.engines.open(graph).run(found[-1].inputs)

    image = bundle.interface.image_size(size)
    at_size = bundle.resample(pictures, image) if image != pictures.shape[2:] else pictures
    for given in (pictures, at_size):
        sums = run(roles.read_image, (given.shape[2], given.shape[3]), {"pixels": given})
    latent = run(roles.encode, size, sums)["latent"]
    sums = run(roles.read_latent, size, {"latent": latent})
    decoded = run(roles.decode, image, sums)
    del decoded["pixels"]
    run(roles.render, image, {**sums, **decoded})
    return found


def trajectory(
    bundle: Bundle,
    recorder: Recorder,
    labels: Sequence[Label],
    size: Size,
    scale: float,
    settings: Settings,
    turn: int,
) -> Iterator[Sample]:
    """Runs of the step graph in one DDIM trajectory, `turn` saying which; see `Settings`."""
    steps, graph, data = settings.steps, bundle.diffuser.step_graph, bundle.manifest.schedule
    request = Request(labels, size, None, steps, scale, seed=settings.seed, solver="ddim")
    alpha_bars = request.table(data).alpha_bar
    times = request.schedule(data).time(log_snr(alpha_bars))
    found: list[Sample] = []

    def keep(progress: Progress) -> None:
        step = progress.step - 1
        if (step + turn) % settings.every == 0 and alpha_bars[step] >= EXACT_BELOW:
            inputs, _ = recorder.recorded[graph]
            found.append(Sample(graph, size, inputs, float(times[step]), scale))

    bundle.diffuse(request, keep)
    yield from found


def save(path: Path, key: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Write samples as an .npz of numbers alone, each array once however many samples share it."""
    arrays: dict[str, Array] = {}
    rows = []
    for sample in samples:
        names = {}
        for name, value in sample.inputs.items():
            digest = hashlib.sha256(value.tobytes() + repr(value.shape).encode()).hexdigest()[:24]
            arrays[digest] = value
            names[name] = digest
        rows.append({**asdict(sample), "inputs": names})
    index = np.frombuffer(json.dumps({"key": key, "samples": rows}).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, index=index, **arrays)


def load(path: Path, manifest: Manifest) -> list[Sample]:
    """Read samples; raises ArtefactError where they are not those of this bundle's graphs."""
    what, again = "calibration data", "Delete it and make it again with: make calibrate"
    arrays = read_arrays(path, what, again, LARGEST, MOST_ARRAYS)
    text = require(path, arrays, "index", again)
    with parsing(path, what, again):
        if text.nbytes > LARGEST_INDEX:
            raise ValueError(f"its index has {text.nbytes} bytes")
        index = msgspec.json.decode(text.tobytes(), type=_Index)
    if index.key.bundle != fingerprint(manifest):
        raise ArtefactError(
            f"{path}: calibration data of another bundle; expected that of {manifest.folder}. "
            f"{again}"
        )
    missing = {*heavy(manifest)} - {row.graph for row in index.samples}
    if missing:
        raise ArtefactError(f"{path}: has no sample of {', '.join(sorted(missing))}. {again}")
    try:
        samples = [_sample(row, arrays, manifest) for row in index.samples]
        for digest in {digest for row in index.samples for digest in row.inputs.values()}:
            if not np.isfinite(arrays[digest]).all():
                raise ValueError(f"NaN or infinity in array {digest}; expected finite numbers")
    except (UsageError, ValueError) as error:
        raise ArtefactError(f"{path}: {error}. {again}") from None
    return samples


def _sample(row: _Row, arrays: Arrays, manifest: Manifest) -> Sample:
    """A row with its arrays; raises UsageError or ValueError where it is no run of a graph."""
    spec = manifest.graphs.get(row.graph)
    of_step = row.graph == manifest.step_graph
    if spec is None or {of_step} != {row.t is not None, row.guidance_scale is not None}:
        raise ValueError(
            f"a sample of {row.graph!r} with t {row.t} and guidance_scale {row.guidance_scale} is "
            "of no graph"
        )
    if not arrays.keys() >= {*row.inputs.values()}:
        raise ValueError(f"a sample of {row.graph} names arrays that are not there")
    inputs = {name: arrays[digest] for name, digest in row.inputs.items()}
    spec.check_inputs(inputs)
    return Sample(row.graph, row.size, inputs, row.t, row.guidance_scale)


def coverage(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many samples there are of each graph at each size, and of the step graph at each t."""
    sizes: dict[str, dict[str, int]] = {}
    times: dict[str, int] = {}
    scales: dict[str, int] = {}
    for sample in samples:
        own, size = sizes.setdefault(sample.graph, {}), size_name(sample.size)
        own[size] = own.get(size, 0) + 1
        if sample.t is not None:
            times[f"{sample.t:.3f}"] = times.get(f"{sample.t:.3f}", 0) + 1
            scale = f"{sample.guidance_scale:g}"
            scales[scale] = scales.get(scale, 0) + 1
    return {"sizes": sizes, "t": times, "guidance_scale": scales}
