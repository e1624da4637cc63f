"""The whole picture in one ONNX file, on engines that import nothing of ours."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from export import picture_graph, single_file
from export.picture_graph import request_rows
from runtime import Bundle, open_bundle
from runtime.engines import EngineOptions
from runtime.errors import ArtefactError, ResourceError, UsageError
from runtime.sampling.request import Request
from tests.conftest import ROOT
from tests.runtime.invented import write_bundle

# What any program does, with nothing but an engine.
PROGRAM = """
import sys
import numpy as np
engine, model, given, out = sys.argv[1:]
feeds = dict(np.load(given))
if engine == "onnxruntime":
    import onnxruntime
    session = onnxruntime.InferenceSession(model)
    pixels = session.run(["pixels"], feeds)[0]
else:
    import openvino
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    pixels = openvino.compile_model(model, "CPU", exact)(feeds)["pixels"]
np.save(out, pixels)
ours = {"runtime", "export", "reference"} & set(sys.modules)
sys.exit(f"imported {ours}" if ours else 0)
"""
# Latent and picture, none of which was traced: wide, high, of one pixel a cell, of fewer.
SIZES = (((5, 9), (47, 81)), ((9, 4), (13, 23)), ((7, 7), (64, 56)), ((1, 1), (9, 9)))


@pytest.fixture(scope="module")
def bundle(mnist_bundle: Path) -> Bundle:
    return open_bundle(mnist_bundle, EngineOptions(threads=2))


def written(bundle: Path, out: Path, *options: str) -> Path:
    """The file that the command makes."""
    line = [sys.executable, "-m", "export.single_file", str(bundle), str(out), *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "furthest from the runtime's pictures by" in done.stdout
    return out


@pytest.fixture(scope="module")
def file(mnist_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as one file."""
    return written(mnist_bundle, tmp_path_factory.mktemp("single") / "picture.onnx")


def drawn(engine: str, model: Path, feeds: dict[str, Any], folder: Path) -> NDArray[np.float32]:
    """Pixels in [0, 1] by a program that imports nothing of ours."""
    np.savez(folder / "given.npz", **feeds)
    line = [sys.executable, "-I", "-c", PROGRAM, engine, str(model)]
    done = subprocess.run(
        [*line, "given.npz", "out.npy"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(np.load(folder / "out.npy"))


def wanted(bundle: Bundle, request: Request) -> NDArray[np.float32]:
    """The runtime's pixels in [0, 1], which are not all black or white."""
    assert request.image is not None
    pixels = (bundle.decode(bundle.diffuse(request), request.image) + 1) / 2
    assert ((pixels > 0.01) & (pixels < 0.99)).mean() > 0.05
    return np.asarray(pixels)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_draws_what_the_runtime_does(
    engine: str, bundle: Bundle, file: Path, tmp_path: Path
) -> None:
    for (latent, image), scale in zip(SIZES, (2.0, 1.0, -0.5, 3.0), strict=True):
        request = Request([3, None, 9], latent, image, guidance_scale=scale, seed=3)
        feeds = single_file.inputs(bundle, request)
        found = drawn(engine, file, feeds, tmp_path)
        assert found.shape == (3, 1, *image) and found.dtype == np.float32
        assert np.abs(found - wanted(bundle, request)).max() <= 1e-3, (latent, image)


def test_it_has_standard_operators_alone_and_says_what_it_is(file: Path) -> None:
    model = onnx.load(file)
    assert [own.domain for own in model.opset_import] == [""] and not model.functions
    bodies, loops = [model.graph], []
    while bodies:
        graph = bodies.pop()
        assert not {node.domain for node in graph.node} - {""}
        loops += [node for node in graph.node if node.op_type == "Loop"]
        bodies += [own.g for node in graph.node for own in node.attribute if own.HasField("g")]
    assert len(loops) == 1
    known = {own.key: own.value for own in model.metadata_props}
    assert '"labels":["0","1"' in known["interface"] and '"steps":12' in known["table"]


def test_half_weights_are_smaller_and_draw_the_same(
    bundle: Bundle, file: Path, mnist_bundle: Path, tmp_path: Path
) -> None:
    halves = written(mnist_bundle, tmp_path / "half.onnx", "--half")
    assert halves.stat().st_size < 0.7 * file.stat().st_size
    request = Request([5], (8, 9), (70, 70), guidance_scale=2.0)
    feeds = single_file.inputs(bundle, request)
    found = drawn("onnxruntime", halves, feeds, tmp_path)
    np.testing.assert_allclose(found, drawn("onnxruntime", file, feeds, tmp_path), atol=1e-5)
    assert np.abs(found - wanted(bundle, request)).max() <= 1e-3


def test_a_table_can_be_given(
    bundle: Bundle, file: Path, mnist_bundle: Path, tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"solver": "ddim", "steps": 6, "guidance_interval": (0.2, 0.6)}
    request = Request([8], (8, 7), (64, 50), **steps)
    feeds = single_file.inputs(bundle, request)
    own = request_rows(request, bundle.manifest.schedule)
    assert own.shape == (6, 9) and {*own[:, -1]} == {0.0, 1.0}
    found = drawn("onnxruntime", file, feeds | {"table": own}, tmp_path)
    assert np.abs(found - wanted(bundle, request)).max() <= 1e-3
    other = drawn("onnxruntime", file, feeds, tmp_path)
    assert np.abs(found - other).max() > 1e-2
    opened = written(mnist_bundle, tmp_path / "open.onnx", "--open-table")
    assert "table" in {value.name for value in onnxruntime.InferenceSession(opened).get_inputs()}
    found = drawn("openvino", opened, feeds | {"table": own}, tmp_path)
    assert np.abs(found - wanted(bundle, request)).max() <= 1e-3
    options = ("--solver", "ddim", "--steps", "6", "--guidance-interval", "0.2..0.6")
    inside = written(mnist_bundle, tmp_path / "inside.onnx", *options)
    found = drawn("openvino", inside, feeds, tmp_path)
    assert np.abs(found - wanted(bundle, request)).max() <= 1e-3


def test_a_family_of_pixels_by_its_manifest_alone(tmp_path: Path) -> None:
    folder = tmp_path / "invented"
    folder.mkdir()
    made = open_bundle(write_bundle(folder), EngineOptions(threads=1))
    model = written(folder, tmp_path / "invented.onnx")
    request = Request(["noon", "dusk"], (12, 21), (12, 21), seed=1)
    feeds = single_file.inputs(made, request)
    del feeds["size"]
    found = drawn("onnxruntime", model, feeds, tmp_path)
    assert np.abs(found - wanted(made, request)).max() <= 1e-3


def test_what_cannot_be_made_is_said_and_leaves_what_was_there(
    mnist_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")

    def make(*more: str) -> None:
        single_file.single_file(
            single_file.parser().parse_args([str(mnist_bundle), str(out), *more])
        )

    with pytest.raises(argparse.ArgumentTypeError, match="a name that ends in"):
        single_file.onnx_name("out.pb")
    with pytest.raises(UsageError, match="expected sides of 1 to"):
        make("--latent", "70000x3")
    with monkeypatch.context() as patched, pytest.raises(ResourceError, match="Pass --half"):
        patched.setattr(picture_graph, "LARGEST", 1000)
        make()
    with monkeypatch.context() as patched, pytest.raises(ArtefactError, match="differs from the"):
        patched.setattr(single_file, "TOLERANCE", 1e-12)
        make()
    assert out.read_bytes() == b"before"
