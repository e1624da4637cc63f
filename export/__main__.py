"""Export a checkpoint into a bundle: python -m export --checkpoint C --out build/mnist."""

import argparse
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from msgspec.structs import replace

from export.families import family_of
from export.graph_files import make_graph
from export.processes import in_processes
from export.to_onnx import OPSET, GraphSource
from export.verify import trajectory_parity
from reference import checkpoint
from reference.provenance import label_parts, trained_range
from runtime import cli
from runtime.bundle.commit import commit
from runtime.bundle.folders import staging
from runtime.bundle.interface import Interface
from runtime.bundle.manifest import DEFAULT_BUNDLE, Manifest, Source
from runtime.progress import Bar


def export(args: argparse.Namespace) -> None:
    """Make a bundle in a folder beside its place, check it whole, then put it there."""
    loaded = checkpoint.load(args.checkpoint)
    out: Path = args.out
    with staging(out) as scratch:
        commit(manifest := make_bundle(loaded, scratch), out, scratch)
    print(f"bundle: {out} ({len(manifest.graphs)} graphs, {worst(manifest)})")


def make_bundle(loaded: checkpoint.Checkpoint, folder: Path) -> Manifest:
    """Write every graph into `folder`, each checked against PyTorch, and check a trajectory."""
    models = loaded.models
    family = family_of(models)
    interface = interface_of(loaded)
    graphs = family.sources(models)
    # The largest graph takes longest: begun last, it would be waited for alone.
    ordered = sorted(graphs, key=lambda source: -len(list(source.module.modules())))
    made = {}
    work = partial(make_graph, folder=folder, interface=interface)
    with Bar(total=len(ordered), desc="export", unit="graph") as bar:

        def busy(sources: Sequence[GraphSource]) -> None:
            bar.set_postfix_str(", ".join(source.name for source in sources))

        for source, specs in in_processes(work, ordered, busy):
            made[source.name] = specs
            bar.update()
    by_name = {source.name: made[source.name] for source in graphs}
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
        graphs={name: spec for name, (spec, _) in by_name.items()},
        for_cpu={name: spec for name, (_, spec) in by_name.items() if spec is not None},
        folder=folder,
    )
    if not Bar.quiet:
        Bar.write("export: a guided run beside PyTorch's", sys.stderr)
    return replace(manifest, trajectory=trajectory_parity(family, models, manifest))


def interface_of(loaded: checkpoint.Checkpoint) -> Interface:
    """The family's interface, with what the checkpoint's training says of labels and sizes.

    Labels that the training's data had no name for keep their numbers.
    """
    made = loaded.provenance
    interface = family_of(loaded.models).interface(loaded.models, ())
    named = tuple(made.get("labels") or ())
    labels = named + interface.labels[len(named) :]
    seen = trained_range(made) or interface.trained
    return replace(interface, labels=labels, parts=label_parts(made), trained=seen)


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
