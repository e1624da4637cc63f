"""Plans: what is refused on opening and why, and the engine on a simulated device."""

import dataclasses
import gc
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from runtime import certificate, open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.folders import exclusive
from runtime.bundle.manifest import Manifest, PlanSpec, read_manifest, relative_error
from runtime.engines import HISTORY, EngineOptions, SamplingEngine, cuda, kernels, tensorrt
from runtime.errors import (
    ArtefactError,
    IncompatibleError,
    NumericalError,
    ResourceError,
    UsageError,
)
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.diffuser import Progress
from runtime.sampling.request import Request
from tests.conftest import Command, poison_film
from tests.runtime.simulated import Library, simulate

NATIVE = (
    *("deserialize_cuda_engine", "create_runtime_config", "set_runtime_cache"),
    *("create_execution_context", "set_optimization_profile_async", "set_input_shape"),
    *("infer_shapes", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
)
LIMITS = {"batch": (1, 2, 8), "conditions": (1, 2, 11), "steps": (1, 11, 99)}
SIDES = ((1, 4, 8), (1, 16, 64))


@pytest.fixture
def bundle(own_bundle: Path) -> Path:
    """The tiny bundle with plans that the simulated library can read: its own graphs."""
    manifest = read_manifest(own_bundle)
    plans = {}
    for name, spec in manifest.graphs.items():
        data = manifest.file_bytes(spec)
        (own_bundle / f"{name}.plan").write_bytes(data)
        profiles = tuple({axis: LIMITS.get(axis, sides) for axis in spec.ranges} for sides in SIDES)
        plans[f"{name}.plan"] = PlanSpec(
            file=f"{name}.plan",
            sha256=sha256(data),
            graph=name,
            precision="fp32",
            source_sha256=spec.sha256,
            flavour="tensorrt_rtx",
            version="9.9",
            targets=("sm89", "sm120"),
            platform=tensorrt.platform_name(),
            profiles=profiles,
            build_seconds=1.0,
            bytes=len(data),
        )
    replace(manifest, plans=plans).write(own_bundle)
    return own_bundle


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    """A machine with a GPU of sm89 and TensorRT for RTX 9.9, simulated."""
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "cache"))
    return simulate(monkeypatch)


def alter(bundle: Path, name: str, **changes: Any) -> None:
    """Change entries of one plan in the manifest."""
    manifest = read_manifest(bundle)
    plan = replace(manifest.plans[f"{name}.plan"], **changes)
    replace(manifest, plans={**manifest.plans, plan.file: plan}).write(bundle)


def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle / "r2id.plan")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "more",
    [
        {"solver": "ddim"},
        {"continue_at": (6, 10), "continue_from": 2},
        {"image": (60, 64), "guidance_interval": (0.2, 0.7)},
    ],
)
def test_plans_draw_what_graphs_draw(
    bundle: Path, library: Library, eta: float, more: dict[str, Any]
) -> None:
    request: dict[str, Any] = {
        "labels": [3, None, {1: 0.5, 2: 0.5}],
        "latent": (3, 5),
        "steps": 6,
        "eta": eta,
        "seed": 4,
        **more,
    }
    steps: list[Progress] = []
    found = opened(bundle).generate(**request, on_step=steps.append)
    wanted = open_bundle(bundle, EngineOptions(threads=1)).generate(**request)
    assert relative_error(found.latents, wanted.latents) < 1e-5
    np.testing.assert_allclose(found.images, wanted.images, rtol=1e-4, atol=1e-4)
    assert [progress.step for progress in steps] == [*range(1, 7)]
    assert opened(bundle).engines.open("r2id").provider == "tensorrt_rtx"


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m"])
@pytest.mark.parametrize("masked", [True, False])
def test_plans_edit_as_graphs_do(bundle: Path, library: Library, solver: str, masked: bool) -> None:
    """With a mask the latent comes back after every step, else it stays on the device."""
    init = np.random.default_rng(0).uniform(-1, 1, (1, 1, 24, 40)).astype(np.float32)
    mask = np.zeros((1, 1, 3, 5), np.float32)
    mask[..., 3:] = 1
    request: dict[str, Any] = {"labels": [3, None], "latent": (3, 5), "steps": 8, "eta": 0.5}
    request |= {"solver": solver, "init": init, "strength": 0.8, "image": (24, 40)}
    request |= {"mask": mask} if masked else {}
    plans, graphs = opened(bundle), open_bundle(bundle, EngineOptions(threads=1))
    plans.generate(**request)  # so that all is loaded
    library.cuda.copies.clear()
    steps: list[Progress] = []
    found = plans.generate(**request, on_step=steps.append)
    wanted = graphs.generate(**request)
    assert relative_error(found.latents, wanted.latents) < 1e-5
    np.testing.assert_allclose(found.images, wanted.images, rtol=1e-4, atol=1e-4)
    assert 4 <= len(steps) == steps[0].steps < 8
    back = library.cuda.copies.count(("device→host", found.latents.nbytes))
    assert back == 3 * (len(steps) if masked else 1)


def test_the_latent_stays_on_the_device(bundle: Path, library: Library) -> None:
    """Up once, back once; between steps only what changes goes up and 4 bytes come back."""
    pipeline = opened(bundle)
    engine = pipeline.engines.open("r2id")
    assert isinstance(engine, SamplingEngine)
    request = Request([1], (6, 7), steps=5)
    diffuser = pipeline.diffuser
    guidance = diffuser.guidance(request, table := request.table(diffuser.schedule))
    inputs = diffuser.prepare(request, (6, 7))
    noise = diffuser.noise(request, request.latent)
    updates = [diffuser.update(inputs, table, guidance, noise.draw, step) for step in range(5)]
    state = dict.fromkeys(("latent", *HISTORY, "noise"), noise.draw())
    library.cuda.copies.clear()
    latent = engine.sample({**state, **inputs.kept((0, 1))}, updates)["latent"].nbytes
    copies = library.cuda.copies
    assert [n for way, n in copies if way == "device→host"] == [4] * 5 + [latent] * 3
    assert [n for way, n in copies if way == "device→device"] == [latent] * 15
    marks = [i for i, copy in enumerate(copies) if copy == ("device→host", 4)]
    small = sum(array.nbytes for array in updates[1].values())
    assert set(updates[1]) == {"film", "row", "weights"}
    for start, end in pairwise(marks):
        uploads = [n for way, n in copies[start:end] if way == "host→device"]
        assert len(uploads) == 3 and sum(uploads) == small


def test_threads_have_contexts_of_their_own(bundle: Path, library: Library) -> None:
    pipeline = opened(bundle)

    def draw(index: int) -> bytes:
        return pipeline.generate([index], steps=2, first_index=index).images.tobytes()

    serial = [draw(index) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == serial


def test_contexts_are_kept_one_per_profile(bundle: Path, library: Library) -> None:
    engine = opened(bundle).engines.open("r2id_position")
    for size, expected in ((4, [0]), (3, [0]), (30, [0, 1]), (4, [0, 1])):
        coordinates = np.zeros((size, size, 4), np.float32)
        assert engine.run({"coordinates": coordinates})["position"].shape[:2] == (size, size)
        assert library.profiles == expected


def test_memory_grows_and_is_given_back(bundle: Path, library: Library) -> None:
    engine = opened(bundle).engines.open("r2id_position")
    for size in (8, 2, 8, 5):
        engine.run({"coordinates": np.zeros((size, size, 4), np.float32)})
    assert len(library.cuda.device) == len(library.cuda.host) == 2
    assert library.cuda.allocations == 2
    del engine
    gc.collect()
    assert not library.cuda.device and not library.cuda.host


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_call_that_gives_nothing_is_an_error(
    bundle: Path, library: Library, name: str
) -> None:
    library.failing, library.says = name, "the native reason"
    coordinates = {"coordinates": np.zeros((4, 4, 4), np.float32)}
    with pytest.raises(IncompatibleError) as refused:
        opened(bundle).engines.open("r2id_position").run(coordinates)
    assert "the native reason" in str(refused.value)
    assert "r2id_position.plan" in str(refused.value) and "to_plan" in str(refused.value)


def test_out_of_memory_names_the_bytes_and_leaves_room(bundle: Path, library: Library) -> None:
    engine = opened(bundle).engines.open("r2id_position")
    library.cuda.limit = 60_000  # room for the larger request's first tensor alone
    with pytest.raises(ResourceError, match=r"\d+ bytes are needed, \d+ are free") as refused:
        engine.run({"coordinates": np.zeros((60, 60, 4), np.float32)})
    assert "230400 bytes" in str(refused.value)
    assert engine.run({"coordinates": np.zeros((9, 9, 4), np.float32)})["position"].size
    library.failing, library.says = "create_execution_context", "CUDA out of memory"
    with pytest.raises(ResourceError, match=r"12345 bytes are needed, \d+ are free"):
        engine.run({"coordinates": np.zeros((4, 4, 4), np.float32)})


def test_nan_on_the_device_names_its_step(bundle: Path, library: Library) -> None:
    pipeline = opened(bundle)
    poison_film(pipeline, step=2)
    with pytest.raises(NumericalError, match="after step 3"):
        pipeline.generate([1], steps=5)


def test_shapes_and_types_are_checked_before_any_native_call(
    bundle: Path, library: Library
) -> None:
    engine = opened(bundle).engines.open("r2ir_latent_summary")
    latent, coordinates = np.zeros((1, 4, 2, 3), np.float32), np.zeros((2, 3, 4), np.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"latent": latent}, "coordinates is missing"),
        ({"latent": latent.astype(np.float16), "coordinates": coordinates}, "float16"),
        ({"latent": latent, "coordinates": coordinates[:1]}, "height = 2"),
    ]
    for inputs, words in cases:
        with pytest.raises(UsageError, match=words):
            engine.run(inputs)
    assert not library.profiles


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"latent": (65, 4)}, r"height 1\.\.4\.\.8.*nearest legal size is .*height 64, width 4"),
        ({"image": (64, 70)}, r"r2ir_decode\.plan: .*nearest legal size is .*width 64"),
        ({"labels": [1] * 9}, r"r2id\.plan: batch 9, .*batch 8"),
        ({"steps": 99}, r"r2id_film\.plan: steps 100"),
    ],
)
def test_a_request_outside_the_profiles_is_refused_before_any_work(
    bundle: Path, library: Library, request_: dict[str, Any], words: str
) -> None:
    pipeline = opened(bundle)
    with pytest.raises(UsageError, match=words):
        pipeline.generate(**{"labels": [1], **request_})
    pixels = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(UsageError, match="r2ir_decode"):
        pipeline.resample(pixels, (65, 65))
    assert not library.opened


def test_the_plan_of_the_first_steps_bounds_a_request_too(bundle: Path, library: Library) -> None:
    """bf16 starts in fp32, whose plan may cover less: that must show before the first step."""
    manifest = read_manifest(bundle)
    fp32, plan = manifest.graph("r2id"), manifest.plans["r2id.plan"]
    half = replace(fp32, file="r2id.bf16.onnx", precision="bf16")
    for file in (half.file, "r2id.bf16.plan"):
        (bundle / file).write_bytes(manifest.file_bytes(fp32))
    taller = tuple({**profile, "height": (1, 16, 128)} for profile in plan.profiles)
    made = replace(plan, file="r2id.bf16.plan", precision="bf16", profiles=taller)
    plans = {**manifest.plans, made.file: made}
    replace(manifest, variants={"bf16": {"r2id": half}}, plans=plans).write(bundle)
    with pytest.raises(UsageError, match=r"r2id\.plan: .*nearest legal size"):
        open_bundle(bundle / made.file).generate([1], latent=(65, 4))
    assert not library.opened


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
        lambda data: b"not a plan",
        lambda data: b"",
    ],
)
def test_a_damaged_plan_never_reaches_the_deserialiser(
    bundle: Path, library: Library, damage: Callable[[bytes], bytes]
) -> None:
    path = bundle / "r2id.plan"
    path.write_bytes(damage(path.read_bytes()))
    alter(bundle, "r2id", version="1.0", targets=("sm80",))  # the hash is compared first
    with pytest.raises(ArtefactError, match=r"SHA-256 .*to_plan .*--target current"):
        opened(bundle).engines.open("r2id")
    assert not library.opened


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"version": "8.8"}, ("tensorrt_rtx 8.8", "tensorrt_rtx 9.9", "--target sm89,sm120")),
        ({"flavour": "tensorrt"}, ("tensorrt 9.9", "here is tensorrt_rtx", "'tensorrt>=11'")),
        ({"targets": ("sm86",)}, ("sm86", "the GPU here is sm89", "--target current")),
        ({"platform": "plan9-vax"}, ("plan9-vax", tensorrt.platform_name(), "--target current")),
    ],
)
def test_a_plan_of_another_machine_names_both_sides(
    bundle: Path, library: Library, change: dict[str, Any], both: tuple[str, ...]
) -> None:
    alter(bundle, "r2id", **change)
    with pytest.raises(IncompatibleError) as refused:
        opened(bundle).engines.open("r2id")
    for words in (*both, "python -m export.to_plan", f"--engine {bundle / 'r2id.onnx'}"):
        assert words in str(refused.value)
    assert not library.opened


def test_a_plan_of_another_graph_is_refused(bundle: Path, library: Library) -> None:
    alter(bundle, "r2id", source_sha256="0" * 64)
    with pytest.raises(ArtefactError, match=r"built from a graph of SHA-256 0{12}…; r2id\.onnx"):
        opened(bundle).engines.open("r2id")
    assert not library.opened
    film = (bundle / "r2id_film.plan").read_bytes()
    (bundle / "r2id_position.plan").write_bytes(film)
    alter(bundle, "r2id_position", sha256=sha256(film))
    with pytest.raises(ArtefactError, match=r"has \['alpha_bar', 'film'\] and 2 profiles"):
        opened(bundle).engines.open("r2id_position")


def test_a_missing_plan_is_named_and_may_fall_back(bundle: Path, library: Library) -> None:
    (bundle / "r2id.plan").unlink()
    with pytest.raises(ArtefactError, match=r"r2id\.plan: no such file.*to_plan"):
        open_bundle(bundle / "r2id_film.plan").engines.open("r2id")
    manifest = read_manifest(bundle)
    plans = {k: plan for k, plan in manifest.plans.items() if plan.graph != "r2id"}
    replace(manifest, plans=plans).write(bundle)
    with pytest.raises(ArtefactError, match=r"no plan of r2id in fp32.*--graphs r2id"):
        open_bundle(bundle / "r2id_film.plan").engines.open("r2id")
    mixed = open_bundle(bundle / "r2id_film.plan", EngineOptions(allow_fallback=True))
    assert mixed.engines.open("r2id").provider == "cpu"
    assert mixed.generate([1], steps=2).images.shape == (1, 1, 16, 16)
    (bundle / "unnamed.plan").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"unnamed\.plan: no plan that .* names"):
        open_bundle(bundle / "unnamed.plan")


def test_edited_plan_entries_are_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    del content["plans"]["r2id.plan"]["targets"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="no manifest"):
        read_manifest(bundle)
    content["plans"]["r2id.plan"] |= {"targets": ["sm89"], "file": "../r2id.plan"}
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="outside the bundle"):
        read_manifest(bundle)


def test_compiled_kernels_are_kept_for_the_next_start(
    bundle: Path, library: Library, tmp_path: Path
) -> None:
    engine = opened(bundle).engines.open("r2id_film")
    assert library.blobs == []
    del engine
    gc.collect()
    kept = list((tmp_path / "cache").rglob("*.cache"))
    assert len(kept) == 1 and kept[0].stem.endswith("sm89")
    assert kernels.read(kept[0]) == b"kernels"
    engine = opened(bundle).engines.open("r2id_film")
    assert library.blobs == [b"kernels"]
    kept[0].write_bytes(b"old")
    with exclusive(kept[0].with_suffix(".lock")):  # another process is writing it: left alone
        del engine
        gc.collect()
        assert kept[0].read_bytes() == b"old"


@pytest.mark.parametrize("cut", [slice(-1), slice(70), slice(1, None), slice(0)])
def test_damaged_kernels_never_reach_the_library(
    bundle: Path, library: Library, tmp_path: Path, cut: slice
) -> None:
    opened(bundle).engines.open("r2id_film")
    gc.collect()
    (kept,) = (tmp_path / "cache").rglob("*.cache")
    whole = kept.read_bytes()
    kept.write_bytes(whole[cut])
    opened(bundle).engines.open("r2id_film")
    assert library.blobs == []
    gc.collect()  # and the next start finds whole ones
    assert kept.read_bytes() == whole


def test_refused_kernels_are_no_reason_for_a_later_failure(bundle: Path, library: Library) -> None:
    opened(bundle).engines.open("r2id_film")
    gc.collect()
    library.failing, library.says = "deserialize", "of another driver"
    engine = opened(bundle).engines.open("r2id_film")
    library.failing, library.says = "execute_async_v3", "the native reason"
    with pytest.raises(IncompatibleError, match=r"by tensorrt_rtx 9\.9: the native reason\."):
        engine.run({"alpha_bar": np.full(3, 0.5, np.float32)})


def test_kernels_are_not_kept_where_that_is_off(
    bundle: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "off")
    opened(bundle).engines.open("r2id_film")
    gc.collect()
    assert not (tmp_path / "cache").exists()


def manifest_of(bundle: Path) -> tuple[Manifest, PlanSpec]:
    manifest = read_manifest(bundle)
    return manifest, manifest.plans["r2id.plan"]


@pytest.mark.skipif(bool(tensorrt.installed()), reason="TensorRT is installed here")
def test_without_tensorrt_the_command_that_installs_it_is_named(
    bundle: Path, command: Command
) -> None:
    for engine in ("r2id.plan", "nothing.plan"):
        done = command("runtime.generate", "--engine", bundle / engine)
        assert done.returncode == 4 and "Traceback" not in done.stderr
        assert "'tensorrt-rtx>=1.7'" in done.stderr and engine.split(".")[0] in done.stderr
    manifest, plan = manifest_of(bundle)
    with pytest.raises(IncompatibleError, match=r"here is no TensorRT.*tensorrt-rtx"):
        tensorrt.check_plan(plan, manifest.graph("r2id"), bundle)
    assert command("runtime.generate", "--help").returncode == 0
    done = command("runtime.generate", "--engine", bundle / "r2id.onnx", "--steps", 1)
    assert done.returncode == 0, done.stderr


def test_without_a_driver_the_gpu_is_what_is_missing(bundle: Path, command: Command) -> None:
    """The real libraries, on a machine without a GPU."""
    library = pytest.importorskip("tensorrt_rtx", reason="no tensorrt-rtx here")
    try:
        cuda.device_target()
    except IncompatibleError as error:
        assert re.search(r"no usable GPU or driver.*nvidia-smi", str(error))
    else:
        pytest.skip("this machine has a GPU")
    for name in read_manifest(bundle).graphs:
        alter(bundle, name, version=library.__version__)
    done = command("runtime.generate", "--engine", bundle / "r2id.plan")
    assert done.returncode == 4 and "sm89, sm120; no usable GPU" in done.stderr
    assert "--engine" in done.stderr and ".onnx" in done.stderr


def test_the_real_deserialiser_s_refusal_is_an_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="no tensorrt-rtx here")
    monkeypatch.setattr(tensorrt, "device_target", lambda: "sm89")
    alter(bundle, "r2id", version=library.__version__)
    with pytest.raises(IncompatibleError, match=r"the plan was refused by tensorrt_rtx .*Error"):
        opened(bundle).engines.open("r2id")


def test_cuda_python_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'cuda-bindings>=13'"):
        cuda.load_cuda()


def test_plans_are_certified_as_graphs_are(bundle: Path, library: Library) -> None:
    manifest = read_manifest(bundle)
    size = certificate.sized(manifest.interface, (4, 6))
    case = certificate.reference_case(manifest, size, 2, True, 1)
    (engine,) = certificate.contenders(manifest, [certificate.PLANS], None)
    row = certificate.measured(bundle, engine, 1, case)
    assert not certificate.broken("fp32", row) and row["ran_on"] == "tensorrt_rtx", row
    assert row["device_mib"] >= 0 and {*row["parity"]} == {"eps", "decode", "encode"}
    far = certificate.sized(manifest.interface, (80, 6))
    row = certificate.measured(bundle, engine, 1, dataclasses.replace(case, size=far))
    assert row["exit_code"] == 2 and "outside its profiles" in row["failed"]
