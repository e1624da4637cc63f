"""What a GPU must give as the processor does; those that need one are marked `gpu`.

The same tests run on the processor where they can, so that they are known to work themselves.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from runtime import doctor, open_bundle
from runtime.bundle.manifest import Array, GraphSpec, read_manifest, relative_error
from runtime.engines import EngineOptions, SamplingEngine, cuda, open_engine, tensorrt
from runtime.engines.onnxruntime import load_library
from runtime.errors import IncompatibleError
from runtime.memory import resident
from runtime.pipeline.bundle import Bundle
from tests.conftest import ROOT

GRAPHS = (
    *("r2id_position", "r2id_film", "r2id_condition", "r2id", "r2ir_image_summary", "r2ir_encode"),
    *("r2ir_latent_summary", "r2ir_decode", "r2ir_render", "r2ir_response"),
)
CPU = EngineOptions(threads=2)
CAPTURED = {"enable_cuda_graph": "1"}
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(EngineOptions("cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(
        EngineOptions("cuda", provider_options=CAPTURED), id="captured", marks=pytest.mark.gpu
    ),
]
SIZES = ((4, 6), (16, 9), (32, 32))
TOLERANCE = 1e-4  # of the largest value, in fp32 that is no TF32
WARM, PICTURES = 20, 200  # pictures before memory is looked at, and until it is again
GROWTH = 8 << 20  # bytes


def require(options: EngineOptions) -> None:
    """Skip where the options' provider cannot run here, with the reason."""
    if options.provider == "cpu":
        return
    problem = doctor.nvidia()["problem"]
    if problem:
        pytest.skip(f"no GPU: {problem}")
    if "CUDAExecutionProvider" not in load_library().get_available_providers():
        pytest.skip("no CUDA in this onnxruntime: pip install '.[gpu]' instead of '.[cpu]'")


@pytest.fixture(scope="module")
def plans(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny bundle with plans for the GPU at hand, built by the library that is installed."""
    problem = doctor.nvidia()["problem"]
    if problem:
        pytest.skip(f"no GPU: {problem}")
    if not tensorrt.installed():
        pytest.skip("no TensorRT: pip install '.[tensorrt-rtx]'")
    folder = Path(copytree(tiny_bundle, tmp_path_factory.mktemp("plans") / "tiny"))
    line = [sys.executable, "-m", "export.to_plan", str(folder), "--latent", "4x4..32x32"]
    line += ["--image", "4x4..128x128"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode == IncompatibleError.exit_code or "no target of" in done.stderr:
        pytest.skip(f"no plans for this GPU: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    yield folder


def inputs(spec: GraphSpec, height: int, width: int) -> dict[str, Array]:
    """Inputs of a graph at a latent size; what is positive by nature is."""
    rng = np.random.default_rng(height * width)
    known = {"height": height, "width": width, "batch": 2, "conditions": 2, "steps": 5}
    sizes = {axis: known.get(axis, height) for axis in spec.ranges}
    return {t.name: rng.random(t.shape(sizes), np.float32) for t in spec.inputs}


@pytest.mark.parametrize("options", DEVICES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_gives_what_the_processor_gives(
    tiny_bundle: Path, options: EngineOptions, graph: str
) -> None:
    """At sizes in turn and again, so that what was kept of one is not taken for another's."""
    require(options)
    manifest = read_manifest(tiny_bundle)
    wanted, found = (open_engine(manifest, graph, own) for own in (CPU, options))
    assert found.provider == options.provider
    for size in (*SIZES, *SIZES, *SIZES):
        feed = inputs(manifest.graphs[graph], *size)
        expected = wanted.run(feed)
        for _ in range(2):
            for name, array in found.run(feed).items():
                assert relative_error(array, expected[name]) < TOLERANCE, (name, size)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_plan_gives_what_its_graph_gives(plans: Path, graph: str) -> None:
    manifest = read_manifest(plans)
    wanted = open_engine(manifest, graph, CPU)
    found = open_engine(manifest, graph, EngineOptions(plans=True))
    for size in SIZES:
        feed = inputs(manifest.graphs[graph], *size)
        expected = wanted.run(feed)
        for name, array in found.run(feed).items():
            assert relative_error(array, expected[name]) < TOLERANCE, (name, size)


def pictures(bundle: Bundle, **more: Any) -> Array:
    """The latents of a request that turns to a larger size half-way and adds noise."""
    request: dict[str, Any] = {"labels": [3, None, {1: 0.5, 2: 0.5}], "steps": 6, "seed": 4}
    return np.asarray(bundle.generate(**{**request, "latent": (6, 9), **more}).latents)


REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"eta": 1.0},
    {"solver": "ddim", "eta": 1.0},
    {"continue_at": (8, 12), "continue_from": 2},
    {"guidance_interval": (0.2, 0.7)},
)


@pytest.mark.parametrize("more", REQUESTS)
@pytest.mark.parametrize("options", DEVICES)
def test_pictures_are_those_of_the_processor(
    tiny_bundle: Path, options: EngineOptions, more: dict[str, Any]
) -> None:
    require(options)
    found, wanted = (pictures(open_bundle(tiny_bundle, own), **more) for own in (options, CPU))
    assert relative_error(found, wanted) < 10 * TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("more", REQUESTS)
def test_the_sampler_on_the_device_draws_what_numpy_s_loop_draws(
    plans: Path, more: dict[str, Any]
) -> None:
    bundle = open_bundle(plans / "r2id.plan")
    assert isinstance(bundle.engines.open("r2id"), SamplingEngine)
    found, wanted = pictures(bundle, **more), pictures(open_bundle(plans, CPU), **more)
    assert relative_error(found, wanted) < 10 * TOLERANCE


def used(options: EngineOptions) -> int:
    """Bytes in use, to be compared alone: resident ones, or those that the GPU lacks."""
    if options.provider == "cpu" and not options.plans:
        return resident()
    try:
        device = cuda.Device(cuda.load_cuda())
    except IncompatibleError as error:
        pytest.skip(str(error))
    return -int(device.call("cudaMemGetInfo"))


def check_flat(bundle: Bundle, options: EngineOptions) -> None:
    """Pictures of three sizes in turn: after the first ones, no more memory is taken."""
    for index in range(PICTURES):
        if index == WARM:
            before = used(options)
        size = SIZES[index % len(SIZES)]
        bundle.generate([index % 10], latent=size, steps=2, first_index=index)
    assert used(options) - before < GROWTH


@pytest.mark.parametrize("options", DEVICES)
def test_memory_stays_flat_over_many_pictures(tiny_bundle: Path, options: EngineOptions) -> None:
    require(options)
    check_flat(open_bundle(tiny_bundle, options), options)


@pytest.mark.gpu
def test_memory_stays_flat_over_many_pictures_of_plans(plans: Path) -> None:
    check_flat(open_bundle(plans / "r2id.plan"), EngineOptions(plans=True))
