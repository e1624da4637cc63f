"""One graph of a bundle: its files, their specs and their parity with PyTorch."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
from msgspec.structs import replace

from export.chunk import chunk_ffn
from export.chunk_attention import chunk_attention
from export.chunk_axial import chunk_axial
from export.to_onnx import GraphSource, onnx_from_source
from export.verify import parity
from runtime.bundle.files import sha256
from runtime.bundle.interface import Interface, Range
from runtime.bundle.manifest import GraphSpec

CHUNKS = (chunk_axial, chunk_ffn, chunk_attention)  # each leaves the rest to the next
LARGEST = {"batch": 4096, "conditions": 64, "steps": 10_001}


def make_graph(
    source: GraphSource, folder: Path, interface: Interface
) -> tuple[GraphSpec, GraphSpec | None]:
    """A graph's spec and that of its form for ONNX Runtime on a CPU, if it has one."""
    model = onnx_from_source(source, sides_of(source, interface))
    spec = write_graph(source, model, folder / f"{source.name}.onnx", interface)
    own = for_cpu(model)
    if own is None:
        return spec, None
    return spec, write_graph(source, own, folder / f"{source.name}.cpu.onnx", interface)


def for_cpu(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A graph's form for ONNX Runtime on a CPU; None where it has nothing to run in chunks."""
    chunked: onnx.ModelProto | None = None
    for chunk in CHUNKS:
        chunked = chunk(chunked or model) or chunked
    return None if chunked is None else optimised(chunked)


def optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph as it opens it: the half of its time that need not recur.

    Up to the level whose ops are the same on every processor.
    """
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        settings.optimized_model_filepath = str(path)
        data, providers = model.SerializeToString(), ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(data, settings, providers=providers)
        made = onnx.load_model(path)
    used = {node.domain for node in nodes_of(made.graph)}
    named = [entry for entry in made.opset_import if entry.domain in used]
    del made.opset_import[:]  # the library names all that it knows
    made.opset_import.extend(named)
    onnx.checker.check_model(made)
    return made


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def write_graph(
    source: GraphSource, model: onnx.ModelProto, path: Path, interface: Interface
) -> GraphSpec:
    """A graph's file in a folder of ours, its spec and its parity on ONNX Runtime."""
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    spec = spec_of(source, data, path.name, interface)
    return replace(spec, parity=parity(source, data, sides_of(source, interface)))


def spec_of(source: GraphSource, data: bytes, file: str, interface: Interface) -> GraphSpec:
    """A graph's entry in a manifest, but for its parity."""
    sides = sides_of(source, interface)
    ranges = {axis: Range(1, most) for axis, most in LARGEST.items()}
    ranges |= {"height": sides, "width": sides}
    return GraphSpec(
        file=file,
        sha256=sha256(data),
        precision="fp32",
        lifetime=source.lifetime,
        inputs=source.inputs,
        outputs=source.outputs,
        ranges={axis: legal for axis, legal in ranges.items() if axis in source.axes},
        floats_per_pixel=source.floats_per_pixel,
    )


def sides_of(source: GraphSource, interface: Interface) -> Range:
    """The legal sides of a graph's height and width: those of the image, or of the latent."""
    image = source.lifetime in ("image", "tile")
    return interface.image_sides if image else interface.latent_sides
