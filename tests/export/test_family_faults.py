"""Every family under the faults of docs/reliability.md: checkpoint, graphs, plans, requests."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file, save_file

from reference import checkpoint
from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import Array, PlanSpec, read_manifest
from runtime.engines import EngineOptions, kernels, tensorrt
from runtime.errors import (
    ArtefactError,
    IncompatibleError,
    NumericalError,
    ToolkitError,
    UsageError,
)
from runtime.pipeline.bundle import Bundle
from tests.conftest import ROOT, Command
from tests.runtime.simulated import Library, simulate
from tests.runtime.test_faults import field, model, tensor

ONE = EngineOptions(threads=1)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as on Linux")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def own(family_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the family's bundle that a test may damage."""
    return Path(shutil.copytree(family_bundle, tmp_path / "bundle"))


def draw(bundle: Bundle, seed: int = 0, **more: Any) -> Array:
    return bundle.generate([1], steps=2, seed=seed, **more).images


# 1: checkpoints.


def a_matrix(tensors: Tensors) -> str:
    return next(name for name, own in sorted(tensors.items()) if own.ndim == 2)


CHANGES: dict[str, tuple[Callable[[Tensors, str], object], str]] = {
    "missing": (lambda t, n: t.pop(n), "missing {name}"),
    "surplus": (lambda t, n: t.update(surplus=torch.zeros(1)), "unexpected surplus"),
    "shape": (lambda t, n: t.update({n: t[n][:, 1:].contiguous()}), "{name} is "),
    "dtype": (lambda t, n: t.update({n: t[n].int()}), "{name} is torch.int32"),
    "nan": (lambda t, n: t[n].view(-1)[:1].fill_(torch.nan), "{name} holds NaN"),
    "infinity": (lambda t, n: t[n].view(-1)[-1:].fill_(torch.inf), "{name} holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_that_does_not_fit_says_where(kind: str, own: Path) -> None:
    path = own / "tiny.safetensors"
    tensors, metadata = load_file(path), checkpoint.read_metadata(path.read_bytes(), path)
    name, (change, words) = a_matrix(tensors), CHANGES[kind]
    change(tensors, name)
    save_file(tensors, path, metadata)
    with pytest.raises(ArtefactError) as caught:
        checkpoint.load(path)
    assert words.format(name=name) in str(caught.value)


@pytest.mark.parametrize("left", [0, 7, 0.3, -1])
def test_a_checkpoint_that_is_cut_is_refused(left: float, own: Path) -> None:
    path = own / "tiny.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if 0 < left < 1 else int(left)])
    with pytest.raises(ArtefactError, match=r"tiny\.safetensors: "):
        checkpoint.load(path)


# 3 and 6: graphs.


def put(folder: Path, data: bytes) -> str:
    """Make `data` the step graph of a bundle, behind the right hash; its file."""
    manifest = read_manifest(folder)
    name = manifest.step_graph
    spec = replace(manifest.graphs[name], sha256=sha256(data))
    (folder / spec.file).write_bytes(data)
    replace(manifest, graphs={**manifest.graphs, name: spec}, for_cpu={}).write(folder)
    return spec.file


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
@pytest.mark.parametrize("place", ["../secret", "{folder}/secret", "link"])
def test_weights_outside_a_graph_are_not_read(
    place: str, provider: str, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    (own / "link").symlink_to(tmp_path / "secret")
    file = put(own, model(field(5, tensor(place.format(folder=tmp_path)))))
    with pytest.raises(ArtefactError, match=f"{file}: keeps a tensor outside the file"):
        draw(open_bundle(own, EngineOptions(provider, threads=1)))


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
@pytest.mark.parametrize("kind", ["none", "other", "cut", "missing", "altered"])
def test_a_graph_that_is_not_the_manifests_is_refused(kind: str, provider: str, own: Path) -> None:
    manifest = read_manifest(own)
    spec = manifest.graphs[manifest.step_graph]
    data = manifest.file_bytes(spec)
    if kind in ("none", "other", "cut"):
        others = next(s for n, s in manifest.graphs.items() if n != manifest.step_graph)
        put(own, {"none": b"x", "other": manifest.file_bytes(others), "cut": data[:-9]}[kind])
    else:
        for form in (spec, *manifest.for_cpu.values()):
            (own / form.file).unlink()
            if kind == "altered":
                (own / form.file).write_bytes(data[:-1] + b"!")
    with pytest.raises(ArtefactError, match=r"\.onnx: "):
        draw(open_bundle(own, EngineOptions(provider, threads=1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("interface"),
        lambda m: m["interface"].update(decoupled="yes"),
        lambda m: m["interface"].update(latent_channels=7),
        lambda m: m["schedule"].update(name="none"),
        lambda m: m.update(format=99),
        lambda m: next(iter(m["graphs"].values())).update(lifetime="ever"),
        lambda m: next(iter(m["graphs"].values())).update(file="../a.onnx"),
        lambda m: [own.update(lifetime="size") for own in m["graphs"].values()],
    ],
)
def test_a_manifest_that_was_edited_is_refused(
    change: Callable[[dict[str, Any]], object], own: Path
) -> None:
    path = own / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"manifest\.json: "):
        open_bundle(own)


# 4, 5 and 7: plans, on the simulated device.


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv(kernels.VARIABLE, "off")
    return simulate(monkeypatch)


def plan(folder: Path, **changes: Any) -> Path:
    """The bundle's step graph as a plan for sizes up to its default one."""
    manifest = read_manifest(folder)
    name = manifest.step_graph
    spec, least = manifest.graphs[name], manifest.interface.default_latent
    data = manifest.file_bytes(spec)
    sides = dict(zip(("height", "width"), least, strict=True))
    profile = {axis: (r.minimum, r.minimum, sides.get(axis, 8)) for axis, r in spec.ranges.items()}
    made = PlanSpec(
        file=f"{name}.plan",
        sha256=sha256(data),
        graph=name,
        precision="fp32",
        source_sha256=spec.sha256,
        flavour="tensorrt_rtx",
        version="9.9",
        targets=("sm89",),
        platform=tensorrt.platform_name(),
        profiles=(profile, profile),
        build_seconds=1.0,
        bytes=len(data),
    )
    (folder / made.file).write_bytes(data)
    replace(manifest, plans={made.file: replace(made, **changes)}).write(folder)
    return folder / made.file


def planned(path: Path) -> Bundle:
    return open_bundle(path, EngineOptions(threads=1, allow_fallback=True))


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[:-1], lambda d: d[:99] + bytes([d[99] ^ 1]) + d[100:], lambda d: b"", None],
)
def test_a_damaged_plan_never_reaches_the_deserialiser(
    damage: Callable[[bytes], bytes] | None, own: Path, library: Library
) -> None:
    path = plan(own)
    bundle = planned(path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtefactError, match=r"\.plan: "):
        draw(bundle)
    assert not library.opened


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": "8.8"}, IncompatibleError),
        ({"flavour": "tensorrt"}, IncompatibleError),
        ({"targets": ("sm86",)}, IncompatibleError),
        ({"platform": "plan9-vax"}, IncompatibleError),
        ({"source_sha256": "0" * 64}, ArtefactError),
    ],
)
def test_a_plan_of_another_machine_or_graph_is_refused(
    changes: dict[str, Any], error: type[ToolkitError], own: Path, library: Library
) -> None:
    with pytest.raises(error, match=r"\.plan: built .*export\.to_plan"):
        draw(planned(plan(own, **changes)))
    assert not library.opened


def test_a_request_outside_a_plans_profile_names_the_nearest(own: Path, library: Library) -> None:
    bundle = planned(plan(own))
    sides = bundle.interface.latent_sides
    larger = sides.nearest(4 * max(bundle.interface.default_latent))
    with pytest.raises(UsageError, match=r"outside its profiles.*nearest legal size"):
        draw(bundle, latent=(larger, larger))
    assert not library.opened


# 8: numbers that are none.


@pytest.mark.parametrize("step", [0, 1])
def test_nan_in_a_step_is_named_and_nothing_is_drawn(step: int, family_bundle: Path) -> None:
    bundle = open_bundle(family_bundle, ONE)
    graph = bundle.diffuser.step_graph
    engine, runs = bundle.engines.open(graph), [0]

    class Poisoned:
        provider = engine.provider

        def run(self, inputs: Mapping[str, Array], *more: Any) -> dict[str, Array]:
            found = {name: array.copy() for name, array in engine.run(inputs, *more).items()}
            if runs[0] == step:
                found["eps"][..., -1] = np.nan
            runs[0] += 1
            return found

    bundle.engines.opened[graph, "fp32"] = Poisoned()
    with pytest.raises(NumericalError, match=f"at step {step + 1} of 2"):
        draw(bundle)


# 9, 10 and 13: a machine that gives no more, and signals.


@LINUX
@pytest.mark.parametrize(
    ("limit", "most"), [(resource.RLIMIT_FSIZE, 100), (resource.RLIMIT_AS, 2 << 30)]
)
def test_a_machine_without_room_ends_with_5_and_the_old_file(
    limit: int, most: int, family_bundle: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "old.png").write_bytes(b"old")
    side = read_manifest(family_bundle).interface.latent_sides.nearest(8192)
    large = "--latent", f"{side}x{side}", "--noise", "independent"
    asked = ("--steps", 1, "--label", 1, "--threads", 1, "--out", "old.png")
    args = (*asked, *(large if limit == resource.RLIMIT_AS else ()))
    done = command(
        *("runtime.generate", "--engine", family_bundle, *args),
        preexec_fn=lambda: resource.setrlimit(limit, (most, most)),
    )
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"old.png"}
    assert (tmp_path / "old.png").read_bytes() == b"old"


@LINUX
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130_and_whole_files(
    sent: signal.Signals, family_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digit-{index}.png"
    line = [sys.executable, "-m", "runtime.generate", "--engine", family_bundle, "--out", out]
    line += ["--count", "2000", "--batch", "1", "--steps", "2", "--threads", "1"]
    with subprocess.Popen([*map(str, line)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as done:
        end = time.monotonic() + 120
        while not [*tmp_path.glob("digit-*.png")]:
            assert time.monotonic() < end and done.poll() is None
            time.sleep(0.02)
        done.send_signal(sent)
        said = done.communicate(timeout=60)[1]
    assert done.returncode == 130 and "interrupted" in said and "Traceback" not in said
    for path in tmp_path.iterdir():
        Image.open(path).load()


# 15: requests that cannot be.


@pytest.mark.parametrize(
    "wrong",
    [
        {"latent": (0, 0)},
        {"latent": (-1, 4)},
        {"latent": (10**9, 4)},
        {"latent": 128},
        {"guidance_scale": float("nan")},
        {"eta": float("inf")},
        {"steps": 0},
        {"seed": -1},
        {"labels": []},
        {"labels": [10]},
        {"labels": ["nothing"]},
        {"solver": "euler"},
        {"init": np.zeros((1, 1, 4, 4), np.float64)},
        {"init": np.full((1, 1, 64, 64), np.nan, np.float32)},
        {"mask": np.ones((1, 1, 4, 4), np.float32)},
    ],
)
def test_a_request_that_cannot_be_is_refused_before_any_engine(
    wrong: dict[str, Any], family_bundle: Path
) -> None:
    bundle = open_bundle(family_bundle, ONE)
    with pytest.raises(UsageError):
        bundle.generate(**{"labels": [1], "steps": 2, **wrong})
    assert not bundle.engines.opened


# 18: threads.


def test_eight_threads_draw_what_one_draws(family_bundle: Path) -> None:
    bundle = open_bundle(family_bundle, ONE)
    alone = [draw(bundle, seed).tobytes() for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda seed: draw(bundle, seed).tobytes(), range(8))]
    assert found == alone
