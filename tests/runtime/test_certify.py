"""runtime.certify: what it measures, what it refuses, and faults that it must find."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import helper, numpy_helper
from PIL import Image

from runtime.bundle.files import sha256
from runtime.bundle.manifest import read_manifest
from runtime.certificate import size_classes
from runtime.certify import alone
from tests.conftest import Command
from tests.runtime.invented import write_bundle

FEW = ("--provider", "cpu", "--sizes", "12x9", "--steps", "3", "--quick")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundle of a family that nobody has."""
    (tmp_path / "invented").mkdir()
    return write_bundle(tmp_path / "invented")


def add_fp16(bundle: Path, gain: float) -> None:
    """A form of the step graph whose eps is `gain` times as large, under a right hash."""
    model = onnx.load(bundle / "brush.onnx")
    model.graph.node[-1].output[0] = "before_gain"
    factor = np.array(gain, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(factor, "gain_of_eps"))
    model.graph.node.append(helper.make_node("Mul", ["before_gain", "gain_of_eps"], ["eps"]))
    data = model.SerializeToString()
    (bundle / "brush.fp16.onnx").write_bytes(data)
    manifest = read_manifest(bundle)
    name, digest = "brush.fp16.onnx", sha256(data)
    spec = replace(manifest.graphs["brush"], file=name, sha256=digest, precision="fp16")
    replace(manifest, variants={"fp16": {"brush": spec}}).write(bundle)


def test_a_whole_bundle_passes(bundle: Path, command: Command, tmp_path: Path) -> None:
    add_fp16(bundle, 1.0001)
    done = command("runtime.certify", bundle, *FEW)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert found["passes"] and [row["precision"] for row in found["rows"]] == ["fp32", "fp16"]
    exact, half = found["rows"]
    assert exact["parity"]["eps"] == 0 and 5e-5 < half["parity"]["eps"] < 2e-4
    assert half["drift"] > 0 and all(seconds > 0 for seconds in half["seconds"])
    files = found["bundle"]["files"]
    assert files["brush.fp16.onnx"] == sha256((bundle / "brush.fp16.onnx").read_bytes())
    assert found["machine"]["libraries"]["onnxruntime"]["packages"]
    picture = np.asarray(Image.open(tmp_path / "certificate" / "certificate.png"))
    assert picture.shape[2] == 3 and len(np.unique(picture)) > 10
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(("gain", "words"), [(1.2, "eps differs"), (float("nan"), "step 1")])
def test_a_faulty_form_breaks_its_bound(
    bundle: Path, command: Command, tmp_path: Path, gain: float, words: str
) -> None:
    add_fp16(bundle, gain)
    done = command("runtime.certify", bundle, *FEW)
    assert done.returncode == 6 and "cpu fp16" in done.stderr and words in done.stdout
    found = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert not found["passes"] and [bool(row["broken"]) for row in found["rows"]] == [False, True]


def test_a_damaged_file_is_named_beside_what_passes(bundle: Path, command: Command) -> None:
    add_fp16(bundle, 1.0)
    (bundle / "brush.fp16.onnx").write_bytes(b"damaged")
    done = command("runtime.certify", bundle, *FEW)
    assert done.returncode == 3 and "SHA-256" in done.stderr
    assert "passes" in done.stdout and "FAILED" in done.stdout


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--precision", "int8"), 2),
        (("--provider", "plans"), 2),
        (("--sizes", "4x4"), 2),
        (("--provider", "tensorrt", "--sizes", "3x3", "--steps", "1"), 4),
        (("--out", "missing.txt/certificate"), 5),
    ],
)
def test_what_cannot_be_is_refused(
    bundle: Path, command: Command, tmp_path: Path, args: tuple[str, ...], code: int
) -> None:
    (tmp_path / "missing.txt").write_text("a file")
    done = command("runtime.certify", bundle, *args)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_sizes_are_legal_for_a_family_with_a_rule(bundle: Path) -> None:
    interface = read_manifest(bundle).interface
    found = {own.name: own.latent for own in size_classes(interface)}
    assert found["usual"] == (12, 9) and found["wide"] == (12, 24) and found["beyond"] == (48, 48)
    assert all(side in interface.latent_sides for size in found.values() for side in size)
    assert len(size_classes(interface, quick=True)) == 3


def test_an_engine_that_crashes_is_a_row() -> None:
    assert alone(os.abort)["exit_code"] == 5
