"""A graph that overflows is named, and nothing of what it gave is written."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.errors import NumericalError
from tests.conftest import Command


def spoil(bundle: Path, graph: str, value: float) -> None:
    """Make a bundle whose `graph` adds `value` to what it gives, behind the right hash."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["for_cpu"].pop(graph, None)
    spec = content["graphs"][graph]
    model = onnx.load_from_string((bundle / spec["file"]).read_bytes())
    added = np.array(value, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(added, "added"))
    for name in (tensor["name"] for tensor in spec["outputs"]):
        for node in model.graph.node:
            node.output[:] = [f"{name}_exact" if own == name else own for own in node.output]
            node.input[:] = [f"{name}_exact" if own == name else own for own in node.input]
        node = onnx.helper.make_node("Add", [f"{name}_exact", "added"], [name])
        model.graph.node.append(node)
    data = model.SerializeToString()
    (bundle / spec["file"]).write_bytes(data)
    spec["sha256"] = sha256(data)
    path.write_text(json.dumps(content))


LARGE = ("--image", "300x300", "--memory", "600MB")  # more than a sample: in tiles


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("graph", "options"),
    [
        ("r2ir_latent_summary", ()),
        ("r2ir_decode", ()),
        ("r2ir_decode", LARGE),
        ("r2ir_render", LARGE),
        ("r2ir_response", (*LARGE, "--exact")),
        ("r2id_film", ()),
    ],
)
def test_a_graph_that_overflows_while_drawing_is_named(
    graph: str,
    options: tuple[str, ...],
    value: float,
    own_bundle: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    spoil(own_bundle, graph, value)
    base = ("--engine", own_bundle, "--steps", 1, "--label", 1, "--state", "kept.npz")
    done = command("runtime.generate", *base, *options)
    assert done.returncode == 6, done.stderr
    assert f"{graph}.onnx: found NaN or infinity in " in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"bundle"}
    assert left <= {"kept.npz"}
    assert not left or graph not in ("r2ir_latent_summary", "r2id_film")


@pytest.mark.parametrize("graph", ["r2ir_image_summary", "r2ir_encode"])
def test_a_graph_that_overflows_while_reading_is_named(graph: str, own_bundle: Path) -> None:
    spoil(own_bundle, graph, np.nan)
    pixels = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(NumericalError, match=rf"{graph}\.onnx: found NaN or infinity in "):
        open_bundle(own_bundle).encode(pixels, (2, 2))


def test_one_evaluation_is_checked_too(own_bundle: Path) -> None:
    spoil(own_bundle, "r2id", np.inf)
    x, condition = np.zeros((1, 4, 3, 3), np.float32), np.zeros((1, 1, 10), np.float32)
    with pytest.raises(NumericalError, match=r"infinity in eps at alpha_bar 0\.5"):
        open_bundle(own_bundle).denoise(x, 0.5, condition)


def test_a_graph_that_is_given_no_numbers_says_so(tiny_bundle: Path) -> None:
    pixels = np.full((1, 1, 8, 8), np.nan, np.float32)
    with pytest.raises(NumericalError, match="pixels too"):
        open_bundle(tiny_bundle).resampler.encode(pixels, (2, 2))
