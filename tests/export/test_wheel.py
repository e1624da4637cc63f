"""The wheel of the runtime alone: what it holds, that it draws outside of any clone."""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from export import wheel as wheels
from export.wheel import halved, slim
from runtime.bundle.manifest import read_manifest
from runtime.errors import ResourceError
from tests.conftest import ROOT, Command


@pytest.fixture(scope="module")
def wheel(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the tiny bundle inside."""
    out = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "export.wheel", str(tiny_bundle), "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_it_holds_the_runtime_and_a_bundle_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        own = next(name for name in names if name.endswith("METADATA"))
        described = file.read(own).decode()
        started = file.read(own.replace("METADATA", "entry_points.txt")).decode()
    assert {name.split("/")[0] for name in names} == {"runtime", own.split("/")[0]}
    assert "runtime/shipped/manifest.json" in names and "runtime/shipped/r2id.onnx" in names
    assert "torch" not in "".join(x for x in described.splitlines() if x.startswith("Requires"))
    assert "r2-edge = runtime.__main__:main" in started


def test_it_draws_the_same_pixels_outside_of_a_clone(
    wheel: Path, tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def run(*args: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "runtime", *args]
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(line, **options)  # type: ignore[call-overload]

    done = run("generate", "--label", "a,c", "--steps", "2", "--out", "a.png")
    assert done.returncode == 0, done.stderr
    same = ("--label", "a,c", "--steps", 2, "--out", "b.png")
    assert command("runtime.generate", "--engine", tiny_bundle, *same).returncode == 0
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(one, other)
    assert run("--version").stdout.startswith("r2-edge-runtime ")
    assert run("inspect").returncode == 0


def test_constants_are_halved_where_halves_hold_them(tiny_bundle: Path, tmp_path: Path) -> None:
    values = {
        "exact": np.arange(100, dtype=np.float32),
        "inexact": np.full(100, 0.1, np.float32),
        "large": np.full(100, 1e6, np.float32),
        "small": np.zeros(3, np.float32),
    }
    made = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = onnx.helper.make_graph([], "g", [], [], made)
    found = {t.name: t.data_type for t in halved(onnx.helper.make_model(graph)).graph.initializer}
    full, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert found == {"exact.half": half, "inexact": full, "large": full, "small": full}
    whole = slim(read_manifest(tiny_bundle), tmp_path / "whole", True)
    bare = slim(read_manifest(tiny_bundle), tmp_path / "bare", False)
    assert whole.for_cpu and not bare.for_cpu and read_manifest(tmp_path / "bare").graphs


def test_a_wheel_that_is_too_large_leaves_the_forms_for_processors_out(
    wheel: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "LARGEST", wheel.stat().st_size - 1)
    wheels.wheel(argparse.Namespace(bundle=tiny_bundle, out=tmp_path))
    names = {
        path: {name for name in zipfile.ZipFile(path).namelist() if name.endswith(".onnx")}
        for path in (wheel, *tmp_path.glob("*.whl"))
    }
    whole, bare = names.values()
    assert bare == {name for name in whole if not name.endswith(".cpu.onnx")} < whole


def test_a_wheel_that_is_too_large_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "LARGEST", 1000)
    with pytest.raises(ResourceError, match="expected at most 1000"):
        wheels.wheel(argparse.Namespace(bundle=tiny_bundle, out=tmp_path / "dist"))
    assert not list((tmp_path / "dist").iterdir())
