"""Export a checkpoint into a bundle: python -m export --checkpoint C --out build/mnist."""

import argparse
import platform
from pathlib import Path

import onnx
import onnxruntime
import torch
from msgspec.structs import replace
from tqdm import tqdm

from export.chunk import chunk_ffn
from export.families import family_of
from export.to_onnx import OPSET, GraphSource, onnx_from_source
from export.verify import parity, trajectory_parity
from reference import checkpoint
from runtime import cli
from runtime.bundle.files import sha256, staging
from runtime.bundle.interface import Interface, Range
from runtime.bundle.manifest import DEFAULT_BUNDLE, GraphSpec, Manifest, Source

LARGEST = {"batch": 4096, "conditions": 64, "steps": 10_001}


def export(args: argparse.Namespace) -> None:
    """Make a bundle in a folder beside its place, check it whole, then put it there."""
    loaded = checkpoint.load(args.checkpoint)
    out: Path = args.out
    with staging(out) as scratch:
        manifest = make_bundle(loaded, scratch)
        for _, spec in manifest.forms():
            (scratch / spec.file).replace(out / spec.file)
        manifest.write(out)
    print(f"bundle: {out} ({len(manifest.graphs)} graphs, {worst(manifest)})")


def make_bundle(loaded: checkpoint.Checkpoint, folder: Path) -> Manifest:
    """Write every graph into `folder`, each checked against PyTorch, and check a trajectory."""
    models = loaded.models
    family = family_of(models)
    interface = family.interface(models, tuple(loaded.provenance.get("labels") or ()))
    bar = tqdm(family.sources(models), desc="export", unit="graph")
    specs, for_cpu = {}, {}
    for source in bar:
        bar.set_postfix_str(source.name)
        model = onnx_from_source(source)
        path = folder / f"{source.name}.onnx"
        specs[source.name] = write_graph(source, model, path, interface)
        chunked = chunk_ffn(model)
        if chunked is not None:
            path = path.with_suffix(".cpu.onnx")
            for_cpu[source.name] = write_graph(source, chunked, path, interface)
    manifest = Manifest(
        interface=interface,
        schedule=family.schedule(models),
        checkpoint=Source(loaded.sha256, loaded.provenance),
        versions={
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            "opset": str(OPSET),
        },
        trajectory=None,
        graphs=specs,
        for_cpu=for_cpu,
        folder=folder,
    )
    return replace(manifest, trajectory=trajectory_parity(family, models, manifest))


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


def worst(manifest: Manifest) -> str:
    """The largest error of any graph at any size, in words."""
    error, name = max((row.error, n) for n, spec in manifest.forms() for row in spec.parity)
    return f"largest difference from PyTorch {error:.1e} in {name}"


def main() -> None:
    """The command line."""
    parser = cli.parser("export", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=checkpoint.SHIPPED, help="a .safetensors file")
    add("--out", type=Path, default=DEFAULT_BUNDLE, help="folder of the bundle")
    cli.run(export, parser)


if __name__ == "__main__":
    main()
