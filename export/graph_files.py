"""One graph of a bundle: its files, their specs and their parity with PyTorch."""

from dataclasses import replace
from pathlib import Path

import onnx

from export.chunk import chunk_ffn
from export.to_onnx import GraphSource, onnx_from_source
from export.verify import parity
from runtime.bundle.files import sha256
from runtime.bundle.manifest import GraphSpec

LARGEST = {"batch": 4096, "conditions": 64, "height": 65536, "width": 65536, "steps": 10_001}


def make_graph(source: GraphSource, folder: Path) -> tuple[GraphSpec, GraphSpec | None]:
    """A graph's spec and that of its form for ONNX Runtime on a CPU, if it has one."""
    model = onnx_from_source(source)
    spec = write_graph(source, model, folder / f"{source.name}.onnx")
    chunked = chunk_ffn(model)
    if chunked is None:
        return spec, None
    return spec, write_graph(source, chunked, folder / f"{source.name}.cpu.onnx")


def write_graph(source: GraphSource, model: onnx.ModelProto, path: Path) -> GraphSpec:
    """A graph's file in a folder of ours, its spec and its parity on ONNX Runtime."""
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    axes = {axis for spec in source.inputs for axis in spec.axes if isinstance(axis, str)}
    spec = GraphSpec(
        file=path.name,
        sha256=sha256(data),
        precision="fp32",
        inputs=source.inputs,
        outputs=source.outputs,
        ranges={axis: (1, high) for axis, high in LARGEST.items() if axis in axes},
    )
    return replace(spec, parity=parity(source, data))
