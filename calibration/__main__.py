"""8-bit graphs beside a bundle's fp32 ones, and what they cost: python -m calibration build/mnist.

Calibration data are drawn with the bundle's own fp32 graphs and kept beside it, layers are chosen
by measured error, and each graph is checked at every size. The report is `calibration.report`'s.
"""

import argparse
from pathlib import Path

from calibration.choices import (
    BUDGETS,
    PERCENTILES,
    Choices,
    choice_file,
    quantize_graph,
    read_choices,
    write_variant,
)
from calibration.half import put_variants
from calibration.quantize import FORMS
from calibration.samples import (
    Sample,
    Samples,
    Settings,
    calibration_set,
    coverage,
    default_sizes,
    fingerprint,
    heavy,
    load,
)
from runtime import cli
from runtime.bundle.commit import editing
from runtime.bundle.manifest import DEFAULT_BUNDLE, GraphSpec, Manifest, find_bundle, read_manifest
from runtime.errors import UsageError
from runtime.progress import Bar


def calibrate(args: argparse.Namespace) -> None:
    """Make every form beside its place, then put all there, the manifest last."""
    manifest = read_manifest(find_bundle(args.bundle))
    given = read_choices(args.choice, manifest) if args.choice else None
    precisions = args.precision
    if given is not None:
        if precisions not in ([*FORMS], [given.precision]):
            raise UsageError(
                f"--precision {','.join(precisions)}: {args.choice} is for {given.precision}. "
                "Leave --precision out"
            )
        precisions = [given.precision]
    sizes = tuple(args.sizes or default_sizes(manifest.interface))
    settings = Settings(sizes, args.guidance, args.steps, args.every, args.pictures, args.seed)
    with editing(manifest.folder) as (manifest, scratch):
        if args.samples:
            samples = load(args.samples, manifest)
        else:
            samples = calibration_set(manifest, settings, manifest.folder, scratch, args.data)
        print(coverage_text(samples))
        made, choices = {}, {}
        for precision in precisions:
            made[precision], choices[precision] = make_variant(
                manifest, precision, samples, args, scratch, given
            )
        notes = {precision: choice_file(precision) for precision in choices}
        for precision, own in choices.items():
            own.write(scratch / notes[precision])
        put_variants(manifest, made, scratch, notes)
    for precision, own in choices.items():
        print(choices_text(manifest, own, made[precision]))


def make_variant(
    manifest: Manifest,
    precision: str,
    samples: list[Sample],
    args: argparse.Namespace,
    folder: Path,
    given: Choices | None,
) -> tuple[dict[str, GraphSpec], Choices]:
    """Every heavy graph in one precision in `folder`, checked; the choice that it was made by."""
    step, resampler = (args.budget, args.budget) if args.budget else BUDGETS[precision]
    percentiles = [args.percentile] if args.percentile else PERCENTILES
    replay = (args.choice, given) if given else None
    fp32 = Samples(manifest)
    specs, choices = {}, {}
    with Bar(heavy(manifest), desc=precision, unit="graph") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            budget = step if name == manifest.step_graph else resampler
            work = quantize_graph(manifest, name, precision, samples, budget, percentiles, replay)
            specs[name] = write_variant(work, name, precision, folder, fp32)
            choices[name] = work.choice
    made = Choices(fingerprint(manifest), precision, choices)
    return specs, made


def coverage_text(samples: list[Sample]) -> str:
    """What the samples cover, in words."""
    found = coverage(samples)
    rows = [["graph", "samples per size"]]
    for name, sizes in found["sizes"].items():
        rows.append([name, ", ".join(f"{size} {count}" for size, count in sizes.items())])
    times, scales = found["t"], found["guidance_scale"]
    return (
        f"samples\n{cli.table(rows)}\n"
        f"  t: {len(times)} from {min(times)} to {max(times)}, each {min(times.values())} times\n"
        f"  guidance scales: {', '.join(scales)}"
    )


def choices_text(manifest: Manifest, choices: Choices, specs: dict[str, GraphSpec]) -> str:
    """Layers, errors and files of one precision."""
    rows: list[list[object]] = [["graph", "8-bit layers", "error", "fp32 layers", "file"]]
    for name, choice in choices.graphs.items():
        size = (manifest.folder / specs[name].file).stat().st_size
        share = size / (manifest.folder / manifest.graphs[name].file).stat().st_size
        total = len(choice.quantized) + len(choice.fp32)
        left = ", ".join(choice.fp32) or "none"
        count = f"{len(choice.quantized)} of {total}"
        rows.append([name, count, f"{choice.error:.1e}", left, f"{share:.2f}×"])
    return f"{choices.precision}\n{cli.table(rows)}"


def precisions(text: str) -> list[str]:
    """`int8`, or several separated by commas."""
    found = [part.strip() for part in text.split(",")]
    if not set(found) <= FORMS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}; expected one or more of {','.join(FORMS)}")
    return [precision for precision in FORMS if precision in found]


def scales(text: str) -> tuple[float, ...]:
    """Guidance scales separated by commas."""
    return tuple(cli.number(-100, 100)(part) for part in text.split(","))


def main() -> None:
    """The command line."""
    default = Settings(())
    p = cli.parser(
        "calibration", "8-bit forms of a bundle's graphs, their layers chosen by measured error"
    )
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="its folder")
    add("--precision", type=precisions, default=[*FORMS], help="which ones (int8,int8w,fp8)")
    add("--budget", type=cli.number(1e-6, 10), help="largest error of a graph's output (by form)")
    add("--percentile", type=cli.number(90, 100), help="of tokens; 100 is MinMax (the best of 5)")
    add("--choice", type=Path, help="a choice file to replay instead of measuring layers")
    add("--samples", type=Path, help="calibration data to use instead of drawing them")
    add("--data", type=Path, help="MNIST's IDX files, whose pictures go through a resampler")
    add("--sizes", type=cli.sizes, help="latent sizes of the samples (around the default one)")
    add("--guidance", type=scales, default=default.guidance_scales, help="their guidance scales")
    add("--steps", type=cli.number(1, 1000, int), default=default.steps, help="DDIM steps (50)")
    add("--every", type=cli.number(1, 1000, int), default=default.every, help="n-th one kept (5)")
    add("--pictures", type=cli.number(1, 64, int), default=default.pictures, help="per run (2)")
    add("--seed", type=cli.number(0, (1 << 63) - 1, int), default=0, help="of noise and pictures")
    cli.run(calibrate, p)


if __name__ == "__main__":
    main()
