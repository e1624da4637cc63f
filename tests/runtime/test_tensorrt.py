"""Plans on a simulated device: what the engine draws, copies, keeps and gives back."""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import certificate, open_bundle
from runtime.bundle.folders import exclusive
from runtime.bundle.manifest import read_manifest, relative_error
from runtime.engines import HISTORY, EngineOptions, SamplingEngine, kernels
from runtime.errors import (
    IncompatibleError,
    NumericalError,
    ResourceError,
    UsageError,
)
from runtime.pipeline.diffuser import Progress
from runtime.providers import PLANS
from runtime.sampling.request import Request
from tests.conftest import poison_film
from tests.runtime.conftest import opened
from tests.runtime.simulated import Library

NATIVE = (
    *("deserialize_cuda_engine", "create_runtime_config", "set_runtime_cache"),
    *("create_execution_context", "set_optimization_profile_async", "set_input_shape"),
    *("infer_shapes", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
)


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
    planned: Path, library: Library, eta: float, more: dict[str, Any]
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
    found = opened(planned).generate(**request, on_step=steps.append)
    wanted = open_bundle(planned, EngineOptions(threads=1)).generate(**request)
    assert relative_error(found.latents, wanted.latents) < 1e-5
    np.testing.assert_allclose(found.images, wanted.images, rtol=1e-4, atol=1e-4)
    assert [progress.step for progress in steps] == [*range(1, 7)]
    assert opened(planned).engines.open("r2id").provider == "tensorrt_rtx"


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m"])
@pytest.mark.parametrize("masked", [True, False])
def test_plans_edit_as_graphs_do(
    planned: Path, library: Library, solver: str, masked: bool
) -> None:
    """With a mask the latent comes back after every step, else it stays on the device."""
    init = np.random.default_rng(0).uniform(-1, 1, (1, 1, 24, 40)).astype(np.float32)
    mask = np.zeros((1, 1, 3, 5), np.float32)
    mask[..., 3:] = 1
    request: dict[str, Any] = {"labels": [3, None], "latent": (3, 5), "steps": 8, "eta": 0.5}
    request |= {"solver": solver, "init": init, "strength": 0.8, "image": (24, 40)}
    request |= {"mask": mask} if masked else {}
    plans, graphs = opened(planned), open_bundle(planned, EngineOptions(threads=1))
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


def test_the_latent_stays_on_the_device(planned: Path, library: Library) -> None:
    """Up once, back once; between steps only what changes goes up and 4 bytes come back."""
    pipeline = opened(planned)
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


def test_threads_have_contexts_of_their_own(planned: Path, library: Library) -> None:
    pipeline = opened(planned)

    def draw(index: int) -> bytes:
        return pipeline.generate([index], steps=2, first_index=index).images.tobytes()

    serial = [draw(index) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == serial


def test_contexts_are_kept_one_per_profile(planned: Path, library: Library) -> None:
    engine = opened(planned).engines.open("r2id_position")
    for size, expected in ((4, [0]), (3, [0]), (30, [0, 1]), (4, [0, 1])):
        coordinates = np.zeros((size, size, 4), np.float32)
        assert engine.run({"coordinates": coordinates})["position"].shape[:2] == (size, size)
        assert library.profiles == expected


def test_memory_grows_and_is_given_back(planned: Path, library: Library) -> None:
    engine = opened(planned).engines.open("r2id_position")
    for size in (8, 2, 8, 5):
        engine.run({"coordinates": np.zeros((size, size, 4), np.float32)})
    assert len(library.cuda.device) == len(library.cuda.host) == 2
    assert library.cuda.allocations == 2
    del engine
    gc.collect()
    assert not library.cuda.device and not library.cuda.host


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_call_that_gives_nothing_is_an_error(
    planned: Path, library: Library, name: str
) -> None:
    library.failing, library.says = name, "the native reason"
    coordinates = {"coordinates": np.zeros((4, 4, 4), np.float32)}
    with pytest.raises(IncompatibleError) as refused:
        opened(planned).engines.open("r2id_position").run(coordinates)
    assert "the native reason" in str(refused.value)
    assert "r2id_position.plan" in str(refused.value) and "to_plan" in str(refused.value)


def test_out_of_memory_names_the_bytes_and_leaves_room(planned: Path, library: Library) -> None:
    engine = opened(planned).engines.open("r2id_position")
    library.cuda.limit = 60_000  # room for the larger request's first tensor alone
    with pytest.raises(ResourceError, match=r"\d+ bytes are needed, \d+ are free") as refused:
        engine.run({"coordinates": np.zeros((60, 60, 4), np.float32)})
    assert "230400 bytes" in str(refused.value)
    assert engine.run({"coordinates": np.zeros((9, 9, 4), np.float32)})["position"].size
    library.failing, library.says = "create_execution_context", "CUDA out of memory"
    with pytest.raises(ResourceError, match=r"12345 bytes are needed, \d+ are free"):
        engine.run({"coordinates": np.zeros((4, 4, 4), np.float32)})


def test_nan_on_the_device_names_its_step(planned: Path, library: Library) -> None:
    pipeline = opened(planned)
    poison_film(pipeline, step=2)
    with pytest.raises(NumericalError, match="after step 3"):
        pipeline.generate([1], steps=5)


def test_shapes_and_types_are_checked_before_any_native_call(
    planned: Path, library: Library
) -> None:
    engine = opened(planned).engines.open("r2ir_latent_summary")
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


def test_compiled_kernels_are_kept_for_the_next_start(
    planned: Path, library: Library, tmp_path: Path
) -> None:
    engine = opened(planned).engines.open("r2id_film")
    assert library.blobs == []
    del engine
    gc.collect()
    kept = list((tmp_path / "cache").rglob("*.cache"))
    assert len(kept) == 1 and kept[0].stem.endswith("sm89")
    assert kernels.read(kept[0]) == b"kernels"
    engine = opened(planned).engines.open("r2id_film")
    assert library.blobs == [b"kernels"]
    kept[0].write_bytes(b"old")
    with exclusive(kept[0].with_suffix(".lock")):  # another process is writing it: left alone
        del engine
        gc.collect()
        assert kept[0].read_bytes() == b"old"


@pytest.mark.parametrize("cut", [slice(-1), slice(70), slice(1, None), slice(0)])
def test_damaged_kernels_never_reach_the_library(
    planned: Path, library: Library, tmp_path: Path, cut: slice
) -> None:
    opened(planned).engines.open("r2id_film")
    gc.collect()
    (kept,) = (tmp_path / "cache").rglob("*.cache")
    whole = kept.read_bytes()
    kept.write_bytes(whole[cut])
    opened(planned).engines.open("r2id_film")
    assert library.blobs == []
    gc.collect()  # and the next start finds whole ones
    assert kept.read_bytes() == whole


def test_refused_kernels_are_no_reason_for_a_later_failure(planned: Path, library: Library) -> None:
    opened(planned).engines.open("r2id_film")
    gc.collect()
    library.failing, library.says = "deserialize", "of another driver"
    engine = opened(planned).engines.open("r2id_film")
    library.failing, library.says = "execute_async_v3", "the native reason"
    with pytest.raises(IncompatibleError, match=r"by tensorrt_rtx 9\.9: the native reason\."):
        engine.run({"alpha_bar": np.full(3, 0.5, np.float32)})


def test_kernels_are_not_kept_where_that_is_off(
    planned: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "off")
    opened(planned).engines.open("r2id_film")
    gc.collect()
    assert not (tmp_path / "cache").exists()


def test_plans_are_certified_as_graphs_are(planned: Path, library: Library) -> None:
    manifest = read_manifest(planned)
    size = certificate.sized(manifest.interface, (4, 6))
    case = certificate.reference_case(manifest, size, 2, True, 1)
    (engine,) = certificate.contenders(manifest, [PLANS], None)
    row = certificate.measured(planned, engine, 1, case)
    assert not certificate.broken("fp32", row) and row["ran_on"] == "tensorrt_rtx", row
    assert row["device_mib"] >= 0 and {*row["parity"]} == {"eps", "decode", "encode"}
    far = certificate.sized(manifest.interface, (80, 6))
    row = certificate.measured(planned, engine, 1, dataclasses.replace(case, size=far))
    assert row["exit_code"] == 2 and "outside its profiles" in row["failed"]
