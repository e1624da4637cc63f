"""Build TensorRT plans of a bundle: python -m export.to_plan build/mnist --target sm120,sm89.

TensorRT for RTX builds for GPUs that are not there; standard TensorRT for the one at hand.
"""

import argparse
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from export.plans import Job, PlanBuilder, check_targets, plan_file
from export.profiles import Ranges, SizeRange, explain
from runtime import cli
from runtime.bundle.commit import commit, editing
from runtime.bundle.manifest import DEFAULT_BUNDLE, Manifest, find_bundle, read_manifest
from runtime.bundle.profiles import Cost
from runtime.engines.cuda import device_target
from runtime.engines.onnx_file import check_self_contained
from runtime.engines.tensorrt import FLAVOURS, installed, load_library
from runtime.errors import IncompatibleError, UsageError
from runtime.progress import Bar

BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"


def build(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then build every plan, the manifest last."""
    folder = find_bundle(args.bundle)
    manifest = read_manifest(folder)
    ranges = Ranges(
        latent=SizeRange(args.latent[0], args.latent[1], args.aspect),
        image=SizeRange(args.image[0], args.image[1], args.aspect),
        batch=args.batch,
        conditions=args.conditions,
        steps=args.steps,
        profiles=args.profiles,
        cost=Cost(fixed=args.fixed_tokens),
    )
    names = chosen(manifest, args.graphs, args.precision)
    wanted = {
        name: ranges.of_graph(manifest.graph(name, args.precision), len(manifest.interface.labels))
        for name in names
    }
    if args.explain is not None:
        explain(ranges, args.explain)
        return
    flavour = args.flavour or default_flavour()
    library = load_library(flavour)
    targets = resolve_targets(library, flavour, args.target)
    with editing(folder) as (manifest, scratch):
        jobs = []
        for name in names:
            spec = manifest.graph(name, args.precision)
            data = manifest.file_bytes(spec)
            check_self_contained(data, spec.file)
            jobs.append(Job(name, spec, data, tuple(wanted[name])))
            check_targets(jobs[-1], targets)
        build_all(manifest, jobs, library, flavour, targets, scratch)


def build_all(
    manifest: Manifest,
    jobs: list[Job],
    library: Any,
    flavour: str,
    targets: tuple[str, ...],
    scratch: Path,
) -> None:
    """Build into `scratch`, then move all plans to their place and write the manifest."""
    folder, plans = manifest.folder, dict(manifest.plans)
    started = time.perf_counter()
    with Bar(total=float(len(jobs)), desc="plans", bar_format=BAR) as bar:
        for number, job in enumerate(jobs):
            bar.set_postfix_str(job.name)
            builder = PlanBuilder(library, flavour, targets, folder, bar, number)
            data, spec = builder.plan(job)
            (scratch / spec.file).write_bytes(data)
            plans[spec.file] = spec
    commit(replace(manifest, plans=plans), folder, scratch)
    size = sum(plans[plan_file(job.spec)].bytes for job in jobs)
    print(
        f"plans: {folder} ({len(jobs)} for {', '.join(targets)}, {size / 1e6:.1f} MB, "
        f"{time.perf_counter() - started:.0f} s)"
    )


def chosen(manifest: Manifest, graphs: list[str] | None, precision: str) -> list[str]:
    """The graphs to build, all by default; raises UsageError for an unknown one or precision."""
    unknown = [name for name in graphs or () if name not in manifest.graphs]
    if unknown:
        raise UsageError(f"--graphs {','.join(unknown)}: expected some of {[*manifest.graphs]}")
    manifest.check_precision(precision)
    return graphs or [*manifest.graphs]


def default_flavour() -> str:
    """The flavour that is installed; TensorRT for RTX, which builds for any target, of both."""
    found = installed()
    if not found:
        raise IncompatibleError(
            "no TensorRT is installed here; expected one to build plans with. Install it with: "
            f"{FLAVOURS['tensorrt_rtx'].install} (GeForce and RTX cards), or "
            f"{FLAVOURS['tensorrt'].install}"
        )
    return found[-1]


def resolve_targets(library: Any, flavour: str, target: str) -> tuple[str, ...]:
    """Compute capabilities such as `sm89`; `current` is that of the GPU at hand.

    Raises UsageError for one that the library cannot build for, IncompatibleError for no GPU.
    """
    version = f"{flavour} {library.__version__}"
    if target == "current":
        target = device_target()
        if not FLAVOURS[flavour].ahead:
            return (target,)
    if not FLAVOURS[flavour].ahead:
        raise UsageError(
            f"--target {target}: {version} builds for the GPU at hand only; expected current, or "
            "--flavour tensorrt_rtx, which builds for GPUs that are not there"
        )
    known = [n.lower() for n in library.ComputeCapability.__members__ if n.startswith("SM")]
    targets = tuple(dict.fromkeys(target.lower().split(",")))
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise UsageError(
            f"--target {','.join(unknown)}: no target of {version}; expected current or some of "
            f"{', '.join(sorted(known, key=lambda name: int(name[2:])))}"
        )
    return targets


def span(text: str) -> tuple[int, int]:
    """`LOW..HIGH`, or one number for both."""
    match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; expected one as in 1..8 or 4")
    return low, high


def size_span(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """`HxW..HxW`, or one size, as (heights, widths)."""
    first, _, last = text.partition("..")
    low, high = cli.size(first), cli.size(last or first)
    if low[0] > high[0] or low[1] > high[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of sizes; expected the smaller size first, as in 4x4..256x256"
        )
    return (low[0], high[0]), (low[1], high[1])


def aspect(text: str) -> Fraction:
    """`3`, `1.5` or `16:9`: the longer side over the shorter one, at least 1."""
    try:
        value = Fraction(text.replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no aspect; expected 1 or more, as in 16:9")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("export.to_plan", __doc__)
    add: Callable[..., Any] = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="folder of the bundle")
    add("--target", default="current", help="sm120,sm89,… or current, the GPU at hand (current)")
    add("--flavour", choices=[*FLAVOURS], help="the library (the installed one; of both, RTX)")
    add("--precision", default="fp32", help="fp32, or a precision that the bundle has graphs in")
    add("--graphs", type=lambda text: text.split(","), help="names of graphs (all)")
    add("--latent", type=size_span, default="4x4..256x256", help="HxW..HxW (4x4..256x256)")
    add("--image", type=size_span, default="16x16..2048x2048", help="HxW..HxW (16x16..2048x2048)")
    add("--aspect", type=aspect, help="most the longer side may be of the shorter, as in 3 or 16:9")
    add("--batch", type=span, default="1..8", help="images at once (1..8)")
    add("--conditions", type=span, default="1..4", help="guidance branches, 2 for a label (1..4)")
    add("--steps", type=span, default="1..1000", help="DDIM steps (1..1000)")
    add("--profiles", type=cli.number(1, 16, int), default=3, help="most profiles per plan (3)")
    add(
        "--fixed-tokens",
        type=cli.number(0, 1e9),
        default=Cost.fixed,
        help=f"a run's fixed time in tokens, for the cost ({Cost.fixed})",
    )
    add(
        "--explain",
        type=Path,
        nargs="?",
        const=Path("profiles.png"),
        metavar="PNG",
        help="print and draw the profiles, build nothing",
    )
    return p


def main() -> None:
    """The command line."""
    cli.run(build, parser())


if __name__ == "__main__":
    main()
