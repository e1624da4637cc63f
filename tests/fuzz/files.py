"""Readers of bundles, weights, states and what training and calibration keep."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace

from calibration.__main__ import coverage_text
from calibration.choices import Choice, Choices, read_choices, replayed
from calibration.quantize import layers
from calibration.samples import Settings, calibration_set, fingerprint, heavy, load
from reference import checkpoint, published
from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import GraphSpec, PlanSpec, read_manifest
from runtime.bundle.state import DecodeState
from runtime.engines import Engine, EngineOptions, tensorrt
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.openvino import OpenVinoEngine
from runtime.sampling.request import Request
from tests.conftest import TINY
from tests.fuzz.damage import Sample
from tests.fuzz.reader import ONE, ROOM_OF_PROGRAMS, Reader, drawing, reader
from tests.reference.families.golden import Golden
from tests.reference.test_run import Stopped
from tests.runtime.invented import write_bundle
from tests.runtime.simulated import simulate


@reader
def manifests(folder: Path) -> Reader:
    """manifest.json of two families, one with plans, as opening a bundle and asking it reads it."""
    decoupled, pixels = folder / "decoupled", folder / "pixels"
    shutil.copytree(TINY, decoupled)
    pixels.mkdir()
    write_bundle(pixels)
    manifest = read_manifest(decoupled)
    plans = {"r2id.plan": plan_of("r2id", manifest.graphs["r2id"], b"")}
    replace(manifest, plans=plans).write(decoupled)
    places = [decoupled / "manifest.json", pixels / "manifest.json"]

    def read(index: int, data: bytes) -> None:
        places[index].write_bytes(data)
        bundle = open_bundle(places[index].parent, ONE)
        bundle.check(Request([1, None], bundle.interface.default_latent))

    return Reader([Sample(path.read_bytes(), "json") for path in places], read)


def plan_of(name: str, spec: GraphSpec, data: bytes) -> PlanSpec:
    """A manifest's entry of a plan that is `data`."""
    profile = {axis: (sides.minimum, 2, 99) for axis, sides in spec.ranges.items()}
    return PlanSpec(
        f"{name}.plan",
        sha256(data),
        name,
        "fp32",
        spec.sha256,
        "tensorrt_rtx",
        "9.9",
        ("sm89",),
        tensorrt.platform_name(),
        (profile,),
        1.0,
        len(data),
    )


def graphs_by(
    folder: Path, names: Sequence[str], open_it: Callable[[GraphSpec, bytes, bool], Engine]
) -> Reader:
    """Graphs behind their right hashes, opened and run at their smallest sizes."""
    manifest = read_manifest(TINY)
    specs = [manifest.for_cpu.get(name, manifest.graphs[name]) for name in names]
    within = msgspec.structs.replace(manifest, folder=folder)

    def read(index: int, data: bytes) -> None:
        spec = replace(specs[index], sha256=sha256(data))
        (folder / spec.file).write_bytes(data)
        engine = open_it(spec, within.file_bytes(spec), names[index] in manifest.for_cpu)
        sizes = {axis: legal.minimum for axis, legal in spec.ranges.items()}
        found = engine.run({t.name: np.ones(t.shape(sizes), t.dtype) for t in spec.inputs})
        for tensor in spec.outputs:
            if found[tensor.name].shape != tensor.shape(sizes):
                raise AssertionError(f"{tensor.name} is {found[tensor.name].shape}")

    whole = [Sample(manifest.file_bytes(spec), "onnx") for spec in specs]
    return Reader(whole, read, ROOM_OF_PROGRAMS)


@reader
def graphs(folder: Path) -> Reader:
    """On ONNX Runtime; of two, the form for processors."""
    names = ("r2id_film", "r2id_condition", "r2ir_latent_summary", "r2ir_encode", "r2id")
    return graphs_by(folder, names, lambda s, d, own: OnnxRuntimeEngine(s, d, ONE, own))


@reader
def graphs_on_openvino(folder: Path) -> Reader:
    """Of those that it compiles soon."""
    options = EngineOptions("openvino", threads=1)
    names = ("r2id_position", "r2id_film")
    return graphs_by(folder, names, lambda s, d, _: OpenVinoEngine(s, d, options))


@reader
def plans(folder: Path) -> Reader:
    """Plans behind their right hash, of the real library and of the simulated one."""
    import tensorrt_rtx

    from export.plans import Job, PlanBuilder
    from runtime.progress import Bar

    manifest = read_manifest(TINY)
    name, spec = "r2id_position", manifest.graphs["r2id_position"]
    Bar.quiet = True
    with Bar(total=1) as bar:
        builder = PlanBuilder(tensorrt_rtx, "tensorrt_rtx", ("sm89",), folder, bar, 0)
        profile = {axis: (sides.minimum, 4, 64) for axis, sides in spec.ranges.items()}
        whole, made = builder.plan(Job(name, spec, manifest.file_bytes(spec), (profile,)))
    within = msgspec.structs.replace(manifest, folder=folder)
    # As on the simulated device: the graph itself.
    simulated = replace(made, flavour="tensorrt_rtx", version="9.9", profiles=(profile, profile))

    def read(index: int, data: bytes) -> None:
        (folder / made.file).write_bytes(data)
        plan = replace((made, simulated)[index], sha256=sha256(data))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt, "device_target", lambda: "sm89")
            if index:
                simulate(patch)
            tensorrt.TensorRTEngine(spec, plan, folder, within.file_bytes(plan))

    return Reader([Sample(whole), Sample(manifest.file_bytes(spec), "onnx")], read)


@reader
def checkpoints(folder: Path) -> Reader:
    """The tiny model's safetensors file."""
    path = folder / "a.safetensors"

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        checkpoint.load(path)

    return Reader([Sample((TINY / "tiny.safetensors").read_bytes(), "safetensors")], read)


@reader
def state_dicts(folder: Path) -> Reader:
    """Published files of three forms: both of a pair of pickles, one with a configuration in it."""
    paths = [folder / name for name in ("siid.pt", "text.pt", "hdit.safetensors")]
    golden, hdit = Golden("siid"), Golden("hdit").state("hour")
    for part, path in zip(("siid", "text"), paths, strict=False):
        torch.save({k: v.clone() for k, v in golden.state(part).tensors.items()}, path)
    from safetensors.torch import save_file

    tensors = {k: v.clone().contiguous() for k, v in hdit.tensors.items()}
    save_file(tensors, paths[2], {"config": json.dumps(hdit.settings)})
    whole = [path.read_bytes() for path in paths]
    out = folder / "out.safetensors"

    def read(index: int, data: bytes) -> None:
        for path, own in zip(paths, whole, strict=True):
            path.write_bytes(own)
        paths[index].write_bytes(data)
        line = [paths[2], out] if index == 2 else [*paths[:2], out, "--heads", 4, "--fold", 2]
        published.convert(published.parser().parse_args([*map(str, line), "--name", "own"]))

    forms = ("zip", "zip", "safetensors")
    return Reader([Sample(*pair) for pair in zip(whole, forms, strict=True)], read)


@reader
def decode_states(folder: Path) -> Reader:
    """A state of the tiny bundle, read and drawn from."""
    bundle, path = drawing(), folder / "a.npz"
    latent = np.zeros((2, bundle.interface.latent_channels, 2, 3), np.float32)
    bundle.state(latent, {"request": {"seed": 1}}).save(path)

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        bundle.render(DecodeState.load(path), (4, 4))

    return Reader([Sample(path.read_bytes(), "zip")], read)


@reader
def training_states(folder: Path) -> Reader:
    """A run's state and its log; a step is taken with what was read."""
    stopped = Stopped(folder)
    paths = [stopped.state, stopped.log]

    def read(index: int, data: bytes) -> None:
        for path, own in stopped.files.items():
            path.write_bytes(own)
        paths[index].write_bytes(data)
        stopped.resume()

    whole = [stopped.files[path] for path in paths]
    return Reader([Sample(whole[0], "safetensors"), Sample(whole[1])], read)


@reader
def choices(folder: Path) -> Reader:
    """A choice of layers, taken over."""
    manifest, path = read_manifest(TINY), folder / "choice.int8.json"
    own = {
        name: layers(onnx.load_model_from_string(manifest.file_bytes(spec)), spec)
        for name in heavy(manifest)
        for spec in [manifest.graph(name)]
    }
    made = {
        name: Choice((*found,)[:-1], (*found,)[-1:], dict.fromkeys(found, 0.1), 0.1, 0.2, 99.9)
        for name, found in own.items()
    }
    Choices(fingerprint(manifest), "int8", made).write(path)

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        found = read_choices(path, manifest)
        for name, choice in found.graphs.items():
            replayed(path, choice, name, own[name])

    return Reader([Sample(path.read_bytes(), "json")], read)


@reader
def calibration_caches(folder: Path) -> Reader:
    """Samples for calibration, counted."""
    few = Settings(((2, 2),), (0.0, 2.0), steps=3, every=1, pictures=1)
    manifest = read_manifest(TINY)
    calibration_set(manifest, few, folder, folder, None)
    (path,) = folder.glob("*.npz")

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        coverage_text(load(path, manifest))

    return Reader([Sample(path.read_bytes(), "zip")], read)
