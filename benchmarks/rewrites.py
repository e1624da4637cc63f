"""What each rewrite of the step graph gains: python -m benchmarks.rewrites --config siid-published

The step graph with one rewrite of `export/families` undone (`benchmarks.forms`), beside the whole
one; all compute the same. Any configuration with random weights (R2's published one), guidance
pair, batch 1, 2 threads. In each round every form runs in a process of its own, one after the
other; a gain is the ratio of medians, above 1 where the rewrite pays. Prints a table and writes
rewrites.json.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.contenders import Contender, Prepared, Size, add_options, build, write_graph
from benchmarks.forms import WHOLE, every_input, forms
from benchmarks.steps import measure
from export.families import family_of
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import Array, relative_error
from runtime.progress import Bar

SIZES = [(16, 16), (64, 64)]
TOLERANCE = 1e-4  # of the largest eps: what every form must agree to
SECONDS = 2.0


def prepare(folder: Path, config: str, sizes: list[Size]) -> tuple[Prepared, dict[str, str]]:
    """Write every form's graph and inputs; the names of the graphs by that of their rewrite."""
    models, specs, files = build(config), {}, {}
    sides = family_of(models).interface(models, ()).latent_sides
    given = {size: dict(every_input(models, size)) for size in sizes}
    every = forms(models)
    whole = every[WHOLE].model(sides)
    for number, (name, form) in enumerate(every.items()):
        model = form.model(sides) if name != WHOLE else whole
        if form.without and model == whole:
            continue  # the graph has nothing that runs in chunks
        source, files[name] = form.source, f"form{number}"
        for size, known in given.items():
            arrays = {spec.name: known[spec.name].numpy() for spec in source.inputs}
            path = folder / f"{files[name]}-{size_name(size)}.npz"
            np.savez(path, allow_pickle=False, **arrays)
        own = folder, files[name], model, source.inputs, source.outputs
        specs[files[name]] = write_graph(*own)
    return Prepared(folder, config, specs, {}), files


def rewrites(args: argparse.Namespace) -> None:
    """Export every form, time them in turns, print and write what each rewrite gains."""
    make_folder(args.out)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    rows: list[list[str]] = [["rewrite", *map(size_name, args.sizes)]]
    gains: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, pool:
        prepared, files = pool.submit(prepare, Path(name), args.config, args.sizes).result()
        for size in args.sizes:
            times = timed(pool, prepared, files, size, args)
            own = {name: times[name] / times[WHOLE] for name in files if name != WHOLE}
            gains[size_name(size)] = {name: round(gain, 3) for name, gain in own.items()}
    for name in files:
        if name != WHOLE:
            rows.append([name, *(f"{own[name]:.2f}×" for own in gains.values())])
    print(cli.table(rows))
    with atomic_write(args.out / "rewrites.json") as file:
        file.write(json.dumps(gains, indent=1).encode() + b"\n")


def timed(
    pool: ProcessPoolExecutor,
    prepared: Prepared,
    files: dict[str, str],
    size: Size,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Median seconds of each form; raises RuntimeError for one that computes another eps."""
    seconds: dict[str, list[float]] = {name: [] for name in files}
    eps: Array | None = None
    turns = [*files.items()] * (args.rounds or 3)
    for name, kind in Bar(turns, desc=size_name(size), unit="run"):
        contender = Contender(name, "cpu", kind)
        found = pool.submit(measure, prepared, contender, size, args.threads, SECONDS).result()
        seconds[name] += found.seconds
        eps = found.eps if eps is None else eps
        if not relative_error(found.eps, eps) <= TOLERANCE:
            raise RuntimeError(f"{name}: eps differs by {relative_error(found.eps, eps):.1e}")
    return {name: statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.rewrites", __doc__)
    add = p.add_argument
    add("--sizes", type=cli.sizes, default=SIZES, help="HxW,… of the latent (16x16,64x64)")
    add_options(p)
    cli.run(rewrites, p)


if __name__ == "__main__":
    main()
