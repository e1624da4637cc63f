"""A step of a family that diffuses pixels beside PyTorch eager: python -m benchmarks.pixels

Per configuration, with random weights: seconds of a step, microseconds of a pixel, peak memory,
the error, and how many times as fast as the reference in PyTorch eager it is, on ONNX Runtime and
OpenVINO. By default SIID at 64×64 and S2ID at 128×128 pixels (published widths), HDiT (Flowers) at
64×64, 128×128 and 256×256 tokens. Each engine at each size in a process of its own, in turns, so
that ratios are of the same minutes; seconds are those of the fastest step.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import apart
from benchmarks.contenders import Contender, Prepared, Size, build, write_graph
from benchmarks.steps import measure
from runtime import cli
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import relative_error
from runtime.progress import Bar

CASES: dict[str, list[Size]] = {
    "siid-published": [(64, 64)],
    "s2id-published": [(128, 128)],
    "hdit-flowers": [(256, 256), (512, 512), (1024, 1024)],
}
EAGER = "torch eager"
CONTENDERS = {
    EAGER: Contender(EAGER, "torch", "published"),
    "cpu": Contender("ours, ORT", "cpu", "step.cpu"),
    "openvino": Contender("ours, OpenVINO", "openvino", "step"),
}
SECONDS = 2.0


def prepared(folder: Path, config: str, sizes: list[Size], branches: int) -> Iterator[Prepared]:
    """The step graph and inputs of it and of the reference; for a process of its own."""
    from benchmarks.forms import CHUNKS, every_input, step_sources
    from export.families import family_of
    from export.to_onnx import onnx_from_source

    models = build(config)
    step = step_sources(models)[-1]
    for size in sizes:
        known = {key: tensor.numpy() for key, tensor in every_input(models, size, branches)}
        own = {spec.name: known[spec.name] for spec in step.inputs}
        np.savez(folder / f"step-{size_name(size)}.npz", allow_pickle=False, **own)
        given = {"latent": known["latent"], "labels": known["condition"][:, None]}
        np.savez(folder / f"published-{size_name(size)}.npz", allow_pickle=False, **given)
    model = onnx_from_source(step, family_of(models).interface(models, ()).latent_sides)
    forms, sides = {"step": model, "step.cpu": model}, (step.inputs, step.outputs)
    for chunk in CHUNKS.values():  # as the runtime opens it on a processor
        forms["step.cpu"] = chunk(forms["step.cpu"]) or forms["step.cpu"]
    specs = {name: write_graph(folder, name, form, *sides) for name, form in forms.items()}
    yield Prepared(folder, config, specs, {})


def measured(made: Prepared, contender: Contender, size: Size, threads: int) -> Iterator[Any]:
    yield measure(made, contender, size, threads, SECONDS)


def compare(args: argparse.Namespace) -> None:
    """Every configuration in turn; what fails is a line with its reason."""
    cases = {args.config: args.sizes or CASES[args.config]} if args.config else CASES
    rows: list[list[object]] = [["", "size", "", "s", "µs/pixel", "peak MB", "× eager", "error"]]
    for config, sizes in cases.items():
        with tempfile.TemporaryDirectory() as name:
            (made,) = apart.items(prepared, Path(name), config, sizes, args.branches)
            if isinstance(made, apart.Failure):
                rows.append([config, made.reason])
                continue
            for size in Bar(sizes, desc=config, unit="size"):
                rows += rows_of(made, size, args)
    print(cli.table([[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]))


def rows_of(made: Prepared, size: Size, args: argparse.Namespace) -> Iterator[list[object]]:
    """A row per engine, its rounds in turns with the others'."""
    found: dict[str, list[Any]] = {engine: [] for engine in args.engines}
    for _ in range(args.rounds):
        for engine in args.engines:
            found[engine] += apart.items(measured, made, CONTENDERS[engine], size, args.threads)
    eager = [run for run in found.get(EAGER, []) if not isinstance(run, apart.Failure)]
    for engine, runs in found.items():
        start = [made.config, size_name(size), CONTENDERS[engine].name]
        failed = next((run for run in runs if isinstance(run, apart.Failure)), None)
        if failed is not None:
            yield [*start, failed.reason]
            continue
        seconds = fastest(runs)
        cells = [f"{seconds:.3f}", f"{seconds / size[0] / size[1] * 1e6:.2f}"]
        cells.append(f"{max(run.peak for run in runs) / 1e6:.0f}")
        if eager:
            wanted = eager[0].eps
            error = relative_error(runs[0].eps.reshape(wanted.shape), wanted)
            cells += [f"{fastest(eager) / seconds:.2f}", f"{error:.0e}"]
        yield [*start, *cells]


def fastest(runs: list[Any]) -> float:
    """Of all steps: what else a machine does only ever takes time away."""
    return float(min(second for run in runs for second in run.seconds))


def engines(text: str) -> list[str]:
    """`cpu,openvino`, or `torch` among them."""
    names = [EAGER if name == "torch" else name for name in text.split(",")]
    if not set(names) <= CONTENDERS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of torch,cpu,openvino")
    return names


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.pixels", __doc__)
    add = p.add_argument
    add("--config", choices=[*CASES], help="one of them (all)")
    add("--sizes", type=cli.sizes, help="HxW,… in pixels, of --config")
    add("--branches", type=cli.number(1, 2, int), default=2, help="conditions; 1: no guidance (2)")
    add("--engines", type=engines, default=[*CONTENDERS], help="(torch,cpu,openvino)")
    add("--rounds", type=cli.number(1, 100, int), default=3, help="processes of each (3)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="of each (2)")
    cli.run(compare, p)


if __name__ == "__main__":
    main()
