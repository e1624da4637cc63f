"""A guided denoising step, ours beside what a user could pick instead: python -m benchmarks.compare

Width, blocks and layout as published (192, 8 + 8 blocks), random weights, guidance pair, batch 1,
2 threads. Peers run the model in the layout of the published code (`benchmarks/published.py`),
coordinates passed in and nothing hoisted. In each round every contender runs in a process of its
own, one after the other, so that a noisy machine disturbs all alike and no thread pool disturbs its
neighbour; between them the machine's GEMM rate is measured. Errors are relative to torch eager's
largest value. Writes compare.json, time.png and memory.png.
"""

import argparse
import multiprocessing
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import (
    CONTENDERS,
    GEMMS,
    Contender,
    Prepared,
    Size,
    add_options,
    measure,
    prepare,
)
from runtime import cli, doctor
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.errors import IncompatibleError

SIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (256, 256))
QUICK_SIZES = ((16, 16), (64, 64))
MODULES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "matplotlib")


def compare(args: argparse.Namespace) -> None:
    """Export once, run every contender in turns, report."""
    missing = [module for module in MODULES if find_spec(module) is None]
    if missing:
        raise IncompatibleError(
            f"{', '.join(missing)} cannot be imported; expected all that is compared. "
            "Install it with: python -m pip install '.[export,bench]'"
        )
    quick = args.quick
    sizes = args.sizes or [*(QUICK_SIZES if quick else SIZES)]
    rounds, seconds = args.rounds or (1 if quick else 3), 1.0 if quick else 4.0
    contenders = [c for c in CONTENDERS if not (quick and c.slow)]
    make_folder(args.out)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as name, pool:
        with tqdm(total=1, desc="export", unit="bundle") as bar:
            prepared = pool.submit(prepare, Path(name), args.config, sizes).result()
            bar.update()
        runs: report.Runs = {}
        turns = [c for _ in range(rounds) for c in (*GEMMS, *contenders)]
        for size in sizes:
            runs[size] = run_all(pool, prepared, turns, size, args.threads, seconds)
        rows = report.rows_of(prepared, runs)
    rates = {gemm.name: report.gemm_rates(prepared, runs, gemm.name) for gemm in GEMMS}
    print(report.as_text(rows, rates))
    report.write_json(args.out / "compare.json", rows, rates, about(args, rounds))
    report.draw(args.out, rows, max(rates[GEMMS[0].name]))
    print(f"{args.out}: compare.json, time.png, memory.png")


def run_all(
    pool: ProcessPoolExecutor,
    prepared: Prepared,
    turns: list[Contender],
    size: Size,
    threads: int,
    seconds: float,
) -> dict[str, list[Any]]:
    """What each contender measured in its turns at one size."""
    found: dict[str, list[Any]] = {contender.name: [] for contender in turns}
    with tqdm(total=len(turns), desc=size_name(size), unit="run") as bar:
        for contender in turns:
            first = contender.engine == "torch.compile" and not found[contender.name]
            bar.set_postfix_str(contender.name + " (compiling: a minute)" * first)
            task = pool.submit(measure, prepared, contender, size, threads, seconds)
            found[contender.name].append(task.result())
            bar.update()
    return found


def about(args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        "processor": doctor.processor(),
        "platform": platform.platform(),
        "threads": args.threads,
        "config": args.config,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "openvino")},
    }


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.compare", __doc__)
    add = p.add_argument
    add(
        "--quick",
        action="store_true",
        help="two sizes, one round, neither torch.compile nor int8",
    )
    add("--sizes", type=cli.sizes, help="HxW,HxW,… of the latent (16x16 to 256x256)")
    add_options(p)
    cli.run(compare, p)


if __name__ == "__main__":
    main()
