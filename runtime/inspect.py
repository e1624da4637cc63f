"""What a bundle holds, and whether its files are whole: python -m runtime.inspect build/mnist."""

import argparse
import json
import textwrap
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime import cli
from runtime.bundle.interface import size_name
from runtime.errors import ArtefactError, ResourceError

if TYPE_CHECKING:
    from runtime.bundle.interface import Interface
    from runtime.bundle.manifest import GraphSpec, Manifest, PlanSpec, Trajectory

WIDTH = 100
HEIGHT_WIDTH = ("height", "width")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.inspect", __doc__)
    add = p.add_argument
    cli.add_bundle(p)
    add("--parity", action="store_true", help="the difference from PyTorch at every size")
    add("--json", action="store_true", help="everything, for programs")
    add("--expect-sha256", help="refuse a manifest of any other SHA-256")
    return p


def inspect(args: argparse.Namespace) -> None:
    """Print the bundle; raises ArtefactError after that where a file of it is not whole."""
    from runtime.bundle.manifest import REBUILD, find_bundle, read_manifest

    manifest = read_manifest(find_bundle(args.bundle), args.expect_sha256)
    states = file_states(manifest)
    if args.json:
        print(as_json(manifest, states))
    else:
        print(cli.printable(as_text(manifest, states, args.parity)))
    bad = [f"{file} {state}" for file, state in states.items() if state != "ok"]
    if bad:
        raise ArtefactError(
            f"{manifest.folder}: {len(bad)} of {len(states)} files are not as the manifest says: "
            f"{', '.join(bad)}. {REBUILD}"
        )


def file_states(manifest: "Manifest") -> dict[str, str]:
    """ok, missing, altered or unreadable per file; a plan of another graph is outdated."""
    states = {spec.file: _state(manifest, spec) for _, spec in manifest.forms()}
    sources = {(name, spec.sha256) for name, spec in manifest.forms()}
    for file, plan in manifest.plans.items():
        states[file] = _state(manifest, plan)
        if states[file] == "ok" and (plan.graph, plan.source_sha256) not in sources:
            states[file] = "outdated"
    return states


def _state(manifest: "Manifest", spec: "GraphSpec | PlanSpec") -> str:
    if not (manifest.folder / spec.file).is_file():
        return "missing"
    try:
        manifest.file_bytes(spec)
    except ArtefactError:
        return "altered"
    except ResourceError:
        return "unreadable"
    return "ok"


def as_json(manifest: "Manifest", states: dict[str, str]) -> str:
    """The manifest with its folder, its own SHA-256 and the state of each file."""
    content = msgspec.to_builtins(manifest, enc_hook=str) | {"files": states}
    return json.dumps(content, indent=1)


def as_text(manifest: "Manifest", states: dict[str, str], every_size: bool) -> str:
    """Tables of at most 100 columns: the model, graphs, plans and differences from PyTorch."""
    sections = [_wrapped(heading(manifest)), graph_table(manifest, states)]
    if manifest.plans:
        sections.append(plan_table(manifest, states))
    sections.append(parity_table(manifest, every_size))
    return "\n\n".join(sections)


def heading(manifest: "Manifest") -> dict[str, str]:
    """What the bundle is and where it came from, in short."""
    interface, source = manifest.interface, manifest.checkpoint
    made: dict[str, Any] = {} if source is None else source.provenance
    seconds = made.get("seconds")
    if isinstance(seconds, dict) and all(isinstance(v, int | float) for v in seconds.values()):
        times = [f"{name} {value / 60:.0f} min" for name, value in seconds.items()]
        made = made | {"seconds": ", ".join(times)}
    shown = [str(made[key]) for key in ("command", "hardware", "seconds") if key in made]
    return {
        "bundle": str(manifest.folder),
        "manifest": f"SHA-256 {manifest.sha256}",
        "model": f"{interface.name}: {drawn_text(manifest)}",
        "sizes": sizes_text(manifest),
        "labels": labels_text(interface),
        "checkpoint": f"SHA-256 {source.sha256}" if source else "not recorded",
        "trained": "; ".join(shown) or "not recorded",
        "made with": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "trajectory": trajectory_text(manifest.trajectory),
    }


def drawn_text(manifest: "Manifest") -> str:
    """What is diffused, and what images are made of it."""
    interface = manifest.interface
    colours = f"images of {interface.color_channels} colour channels"
    if not interface.decoupled:
        return f"{colours}, diffused as pixels"
    return (
        f"{colours}, {interface.pixels_per_latent} pixels per latent cell; latents of "
        f"{interface.latent_channels} channels"
    )


def sizes_text(manifest: "Manifest") -> str:
    """The legal sizes and the default one."""
    interface = manifest.interface
    text = f"latent sides of {interface.latent_sides}, by default "
    text += size_name(interface.default_latent)
    if interface.decoupled:
        text += f"; image sides of {interface.image_sides}"
    if (trained := interface.trained) is not None:
        text += f"; trained on sides of {trained.shortest} to {trained.longest}"
        text += f", aspects up to {trained.aspect:g}"
    return text


def labels_text(interface: "Interface") -> str:
    """The names of the labels, with a line between their parts."""
    names = iter(interface.labels)
    parts = interface.parts or (len(interface.labels),)
    return " | ".join(", ".join(islice(names, count)) for count in parts) or "none"


def trajectory_text(trajectory: "Trajectory | None") -> str:
    """How far a whole trajectory through the graphs is from PyTorch's."""
    if trajectory is None:
        return "not recorded"
    size = size_name((trajectory.height, trajectory.width))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in trajectory.errors.items())
    return (
        f"{trajectory.steps} steps at {size}: differs from PyTorch by {errors} of the largest value"
    )


def graph_table(manifest: "Manifest", states: dict[str, str]) -> str:
    """Each graph's lifetime, precision, file and legal range of every axis."""
    rows = [["graph", "lifetime", "form", "file", "axes"]]
    for _, spec in manifest.forms():
        state, name = states[spec.file], Path(spec.file).stem
        file = _size(manifest.folder / spec.file) if state == "ok" else state
        ranges = {axis: (own.minimum, own.maximum) for axis, own in spec.ranges.items()}
        rows.append([name, spec.lifetime, spec.precision, file, axes_text(ranges)])
    return cli.table(rows)


def plan_table(manifest: "Manifest", states: dict[str, str]) -> str:
    """Each plan's origin and targets, and its profiles as minimum .. optimum .. maximum."""
    lines = []
    for file, plan in manifest.plans.items():
        size = cli.binary_size(plan.bytes)
        words = [
            f"{plan.graph} {plan.precision}, {plan.flavour} {plan.version} on {plan.platform}",
            f"for {', '.join(plan.targets)}, {size} in {plan.build_seconds:.0f} s",
        ]
        rows = [["plan", file, states[file]]]
        lines.append(cli.table(rows) + f"\n    {words[0]}\n    {words[1]}")
        for number, profile in enumerate(plan.profiles):
            lines.append(_fold(f"    profile {number}  ", axes_text(profile)))
    return "\n".join(lines)


def parity_table(manifest: "Manifest", every_size: bool) -> str:
    """Differences from PyTorch, or of other precisions from fp32: each graph's largest, or all."""
    rows: list[list[object]] = [["graph", "precision", "sizes", "difference", "at"]]
    for _, spec in manifest.forms():
        found = sorted(spec.parity, key=lambda row: -row.error)
        for row in spec.parity if every_size else found[:1]:
            count = 1 if every_size else len(found)
            rows.append(
                [
                    Path(spec.file).stem,
                    spec.precision,
                    count,
                    f"{row.error:.1e}",
                    axes_text(row.sizes),
                ]
            )
    if every_size:
        rows = [[*row[:2], *row[3:]] for row in rows]
    title = "difference from PyTorch (fp16, bf16: from fp32), of the largest value"
    return f"{title}, {'at every size' if every_size else 'where it is worst'}\n{cli.table(rows)}"


def axes_text(axes: Mapping[str, Any]) -> str:
    """Sizes, ranges or profiles in words, height and width together: `4x4..64x64, batch 1..8`."""

    def bounds(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else [value]

    words = []
    if all(axis in axes for axis in HEIGHT_WIDTH):
        pairs = zip(*(bounds(axes[axis]) for axis in HEIGHT_WIDTH), strict=True)
        words.append("..".join(f"{height}x{width}" for height, width in pairs))
    for axis in ("batch", "conditions", "steps", *axes):
        if axis in axes and axis not in HEIGHT_WIDTH and isinstance(axes[axis], int | list | tuple):
            text = f"{axis} {'..'.join(map(str, bounds(axes[axis])))}"
            words += [] if text in words else [text]
    return ", ".join(words)


def _wrapped(lines: dict[str, str]) -> str:
    return "\n".join(_fold(f"{name:12}", text) for name, text in lines.items())


def _fold(start: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )


def _size(path: Path) -> str:
    return cli.binary_size(path.stat().st_size) if path.is_file() else "-"


if __name__ == "__main__":
    cli.run(inspect, parser())
