"""The graphs' form for CPUs: the same numbers, the FFNs in chunks of tokens."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.chunk import FEWEST_ROWS, chunk_ffn
from export.graph_files import nodes_of, optimised
from runtime.bundle.manifest import Array, Manifest, read_manifest, relative_error
from runtime.engines import EngineOptions, open_engine


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


def load(manifest: Manifest, name: str) -> onnx.ModelProto:
    return onnx.load_from_string(manifest.file_bytes(manifest.graph(name)))


def inputs(manifest: Manifest, height: int, width: int) -> dict[str, Array]:
    random = np.random.default_rng(1)
    sizes = {"batch": 1, "conditions": 2, "height": height, "width": width}
    shapes = {t.name: t.shape(sizes) for t in manifest.graph("r2id").inputs}
    values = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    values["text_k"] = np.abs(values["text_k"])
    return {name: value.astype(np.float32) for name, value in values.items()}


@pytest.mark.parametrize(
    ("height", "width", "chunks"), [(64, 64, 16), (63, 65, 15), (4, 4, 1), (1, 521, 1), (1, 1, 1)]
)
def test_chunks_are_equal_and_not_too_small(
    manifest: Manifest, height: int, width: int, chunks: int
) -> None:
    model = chunk_ffn(load(manifest, "r2id"))
    assert model is not None
    model.graph.output.append(onnx.ValueInfoProto(name="chunk_count"))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = inputs(manifest, height, width)
    eps, count = session.run(None, feed)
    assert count == [chunks] and (chunks == 1 or height * width / chunks >= FEWEST_ROWS)
    plain = onnxruntime.InferenceSession(manifest.file_bytes(manifest.graph("r2id")))
    assert relative_error(eps, plain.run(None, feed)[0]) < 1e-5


def test_every_ffn_is_found(manifest: Manifest) -> None:
    blocks = {"r2id": 3, "r2ir_encode": 1, "r2ir_decode": 2, "r2ir_render": 2, "r2ir_response": 1}
    for name in manifest.graphs:
        model = chunk_ffn(load(manifest, name))
        found = sum(node.op_type == "Scan" for node in model.graph.node) if model else 0
        assert found == blocks.get(name, 0), name
    assert manifest.for_cpu.keys() == blocks.keys()


def test_only_fp32_on_the_cpu_runs_in_chunks(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        "runtime.engines.onnxruntime.OnnxRuntimeEngine",
        lambda spec, *_, optimised: opened.append((spec.file, optimised)),
    )
    open_engine(manifest, "r2id", EngineOptions())
    open_engine(manifest, "r2id", EngineOptions("cuda"))
    open_engine(manifest, "r2id_film", EngineOptions())
    assert opened == [("r2id.cpu.onnx", True), ("r2id.onnx", False), ("r2id_film.onnx", False)]


def test_the_form_for_cpus_is_what_the_library_would_make_of_it(manifest: Manifest) -> None:
    form = onnx.load_from_string(manifest.file_bytes(manifest.for_cpu["r2id"]))
    again, chunked = optimised(form), chunk_ffn(load(manifest, "r2id"))
    kinds = [node.op_type for node in nodes_of(form.graph)]
    assert kinds == [node.op_type for node in nodes_of(again.graph)]
    assert chunked is not None
    assert kinds != [node.op_type for node in nodes_of(chunked.graph)]
    feed = inputs(manifest, 9, 5)
    opened = open_engine(manifest, "r2id", EngineOptions())
    session = onnxruntime.InferenceSession(chunked.SerializeToString())
    assert np.array_equal(opened.run(feed)["eps"], session.run(None, feed)[0])
