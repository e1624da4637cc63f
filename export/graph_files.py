"""One graph of a bundle: its files, their specs and their parity with PyTorch."""

from pathlib import Path

import onnx
from msgspec.structs import replace

from export.chunk import chunk_ffn
from export.chunk_attention import chunk_attention
from export.to_onnx import GraphSource, onnx_from_source
from export.verify import parity
from runtime.bundle.files import sha256
from runtime.bundle.interface import Interface, Range
from runtime.bundle.manifest import GraphSpec

LARGEST = {"batch": 4096, "conditions": 64, "steps": 10_001}


def make_graph(
    source: GraphSource, folder: Path, interface: Interface
) -> tuple[GraphSpec, GraphSpec | None]:
    """A graph's spec and that of its form for ONNX Runtime on a CPU, if it has one."""
    model = onnx_from_source(source, sides_of(source, interface))
    spec = write_graph(source, model, folder / f"{source.name}.onnx", interface)
    chunked = chunk_ffn(model)
    chunked = chunk_attention(chunked or model) or chunked
    if chunked is None:
        return spec, None
    return spec, write_graph(source, chunked, folder / f"{source.name}.cpu.onnx", interface)


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
