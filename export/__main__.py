"""Export a checkpoint into a bundle: python -m export --checkpoint C --out build/mnist."""

import argparse
import platform
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import torch
from tqdm import tqdm

from export.chunk import chunk_ffn
from export.to_onnx import OPSET, GraphSource, onnx_from_source, sources
from export.verify import parity, trajectory_parity
from reference import checkpoint
from runtime import cli
from runtime.bundle.files import sha256, staging
from runtime.bundle.manifest import DEFAULT_BUNDLE, GraphSpec, Manifest
from runtime.sampling.schedule import COSINE

LARGEST = {"batch": 4096, "conditions": 64, "height": 65536, "width": 65536, "steps": 10_001}


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
    config = loaded.models.config
    bar = tqdm(sources(loaded.models), desc="export", unit="graph")
    specs, for_cpu = {}, {}
    for source in bar:
        bar.set_postfix_str(source.name)
        model = onnx_from_source(source)
        specs[source.name] = write_graph(source, model, folder / f"{source.name}.onnx")
        chunked = chunk_ffn(model)
        if chunked is not None:
            path = folder / f"{source.name}.cpu.onnx"
            for_cpu[source.name] = write_graph(source, chunked, path)
    names = loaded.provenance.get("labels") or map(str, range(config.condition.labels))
    manifest = Manifest(
        model=config,
        labels=tuple(names),
        checkpoint={"sha256": loaded.sha256, "provenance": loaded.provenance},
        versions={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            "opset": str(OPSET),
        },
        schedule=COSINE.to_json(),
        trajectory={},
        graphs=specs,
        for_cpu=for_cpu,
        folder=folder,
    )
    return replace(manifest, trajectory=trajectory_parity(loaded.models, manifest))


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


def worst(manifest: Manifest) -> str:
    """The largest error of any graph at any size, in words."""
    error, name = max((row["error"], n) for n, spec in manifest.forms() for row in spec.parity)
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
