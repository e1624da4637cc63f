"""Plans that cannot be opened or asked: damaged, of another machine, without libraries or GPU."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import Manifest, PlanSpec, read_manifest
from runtime.engines import EngineOptions, cuda, tensorrt
from runtime.errors import ArtefactError, IncompatibleError, UsageError
from tests.conftest import Command
from tests.runtime.conftest import opened
from tests.runtime.simulated import Library


def alter(planned: Path, name: str, **changes: Any) -> None:
    """Change entries of one plan in the manifest."""
    manifest = read_manifest(planned)
    plan = replace(manifest.plans[f"{name}.plan"], **changes)
    replace(manifest, plans={**manifest.plans, plan.file: plan}).write(planned)


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
    planned: Path, library: Library, request_: dict[str, Any], words: str
) -> None:
    pipeline = opened(planned)
    with pytest.raises(UsageError, match=words):
        pipeline.generate(**{"labels": [1], **request_})
    pixels = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(UsageError, match="r2ir_decode"):
        pipeline.resample(pixels, (65, 65))
    assert not library.opened


def test_the_plan_of_the_first_steps_bounds_a_request_too(planned: Path, library: Library) -> None:
    """bf16 starts in fp32, whose plan may cover less: that must show before the first step."""
    manifest = read_manifest(planned)
    fp32, plan = manifest.graph("r2id"), manifest.plans["r2id.plan"]
    half = replace(fp32, file="r2id.bf16.onnx", precision="bf16")
    for file in (half.file, "r2id.bf16.plan"):
        (planned / file).write_bytes(manifest.file_bytes(fp32))
    taller = tuple({**profile, "height": (1, 16, 128)} for profile in plan.profiles)
    made = replace(plan, file="r2id.bf16.plan", precision="bf16", profiles=taller)
    plans = {**manifest.plans, made.file: made}
    replace(manifest, variants={"bf16": {"r2id": half}}, plans=plans).write(planned)
    with pytest.raises(UsageError, match=r"r2id\.plan: .*nearest legal size"):
        open_bundle(planned / made.file).generate([1], latent=(65, 4))
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
    planned: Path, library: Library, damage: Callable[[bytes], bytes]
) -> None:
    path = planned / "r2id.plan"
    path.write_bytes(damage(path.read_bytes()))
    alter(planned, "r2id", version="1.0", targets=("sm80",))  # the hash is compared first
    with pytest.raises(ArtefactError, match=r"SHA-256 .*to_plan .*--target current"):
        opened(planned).engines.open("r2id")
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
    planned: Path, library: Library, change: dict[str, Any], both: tuple[str, ...]
) -> None:
    alter(planned, "r2id", **change)
    with pytest.raises(IncompatibleError) as refused:
        opened(planned).engines.open("r2id")
    for words in (*both, "python -m export.to_plan", f"--engine {planned / 'r2id.onnx'}"):
        assert words in str(refused.value)
    assert not library.opened


def test_a_plan_of_another_graph_is_refused(planned: Path, library: Library) -> None:
    alter(planned, "r2id", source_sha256="0" * 64)
    with pytest.raises(ArtefactError, match=r"built from a graph of SHA-256 0{12}…; r2id\.onnx"):
        opened(planned).engines.open("r2id")
    assert not library.opened
    film = (planned / "r2id_film.plan").read_bytes()
    (planned / "r2id_position.plan").write_bytes(film)
    alter(planned, "r2id_position", sha256=sha256(film))
    with pytest.raises(ArtefactError, match=r"has \['alpha_bar', 'film'\] and 2 profiles"):
        opened(planned).engines.open("r2id_position")


def test_a_missing_plan_is_named_and_may_fall_back(planned: Path, library: Library) -> None:
    (planned / "r2id.plan").unlink()
    with pytest.raises(ArtefactError, match=r"r2id\.plan: no such file.*to_plan"):
        open_bundle(planned / "r2id_film.plan").engines.open("r2id")
    manifest = read_manifest(planned)
    plans = {k: plan for k, plan in manifest.plans.items() if plan.graph != "r2id"}
    replace(manifest, plans=plans).write(planned)
    with pytest.raises(ArtefactError, match=r"no plan of r2id in fp32.*--graphs r2id"):
        open_bundle(planned / "r2id_film.plan").engines.open("r2id")
    mixed = open_bundle(planned / "r2id_film.plan", EngineOptions(allow_fallback=True))
    assert mixed.engines.open("r2id").provider == "cpu"
    assert mixed.generate([1], steps=2).images.shape == (1, 1, 16, 16)
    (planned / "unnamed.plan").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"unnamed\.plan: no plan that .* names"):
        open_bundle(planned / "unnamed.plan")


def test_edited_plan_entries_are_refused(planned: Path) -> None:
    path = planned / "manifest.json"
    content = json.loads(path.read_text())
    del content["plans"]["r2id.plan"]["targets"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="no manifest"):
        read_manifest(planned)
    content["plans"]["r2id.plan"] |= {"targets": ["sm89"], "file": "../r2id.plan"}
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="outside the bundle"):
        read_manifest(planned)


def manifest_of(planned: Path) -> tuple[Manifest, PlanSpec]:
    manifest = read_manifest(planned)
    return manifest, manifest.plans["r2id.plan"]


@pytest.mark.skipif(bool(tensorrt.installed()), reason="TensorRT is installed here")
def test_without_tensorrt_the_command_that_installs_it_is_named(
    planned: Path, command: Command
) -> None:
    for engine in ("r2id.plan", "nothing.plan"):
        done = command("runtime.generate", "--engine", planned / engine)
        assert done.returncode == 4 and "Traceback" not in done.stderr
        assert "'tensorrt-rtx>=1.7'" in done.stderr and engine.split(".")[0] in done.stderr
    manifest, plan = manifest_of(planned)
    with pytest.raises(IncompatibleError, match=r"here is no TensorRT.*tensorrt-rtx"):
        tensorrt.check_plan(plan, manifest.graph("r2id"), planned)
    assert command("runtime.generate", "--help").returncode == 0
    done = command("runtime.generate", "--engine", planned / "r2id.onnx", "--steps", 1)
    assert done.returncode == 0, done.stderr


def test_without_a_driver_the_gpu_is_what_is_missing(planned: Path, command: Command) -> None:
    """The real libraries, on a machine without a GPU."""
    library = pytest.importorskip("tensorrt_rtx", reason="no tensorrt-rtx here")
    try:
        cuda.device_target()
    except IncompatibleError as error:
        assert re.search(r"no usable GPU or driver.*nvidia-smi", str(error))
    else:
        pytest.skip("this machine has a GPU")
    for name in read_manifest(planned).graphs:
        alter(planned, name, version=library.__version__)
    done = command("runtime.generate", "--engine", planned / "r2id.plan")
    assert done.returncode == 4 and "sm89, sm120; no usable GPU" in done.stderr
    assert "--engine" in done.stderr and ".onnx" in done.stderr


def test_the_real_deserialiser_s_refusal_is_an_error(
    planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="no tensorrt-rtx here")
    monkeypatch.setattr(tensorrt, "device_target", lambda: "sm89")
    alter(planned, "r2id", version=library.__version__)
    with pytest.raises(IncompatibleError, match=r"the plan was refused by tensorrt_rtx .*Error"):
        opened(planned).engines.open("r2id")


def test_cuda_python_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'cuda-bindings>=13'"):
        cuda.load_cuda()
