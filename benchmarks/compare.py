"""A guided denoising step, ours beside what a user could pick instead: python -m benchmarks.compare

Width, blocks and layout as published (192, 8 + 8 blocks), random weights, guidance pair, batch 1,
2 threads. Peers run the model in the layout of the published code (`benchmarks/published.py`),
coordinates passed in and nothing hoisted. In each round every contender runs in a process of its
own, one after the other, so that a noisy machine disturbs all alike and no thread pool disturbs its
neighbour; between them the machine's GEMM rate is measured. Errors are relative to torch eager's
largest value. Writes compare.json, time.png and memory.png.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import apart, report
from benchmarks.contenders import CONTENDERS, GEMMS, Contender, Prepared, Size, add_options, prepare
from benchmarks.steps import measure_all
from runtime import cli, doctor
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.errors import IncompatibleError
from runtime.progress import Bar

SIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (256, 256))
QUICK_SIZES = ((16, 16), (64, 64))
LEAST_SHARE = 1.0  # seconds, below which no process is worth its start
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
    with tempfile.TemporaryDirectory() as name:
        prepared = prepared_apart(Path(name), args.config, sizes, contenders)
        each = [c for _ in range(rounds) for c in (*GEMMS, *contenders)]
        turns = [(contender, [size]) for size in sizes for contender in each]
        runs, failed = run_turns(prepared, turns, args.threads, seconds)
        rates = {gemm.name: report.gemm_rates(prepared, runs, gemm.name) for gemm in GEMMS}
        rate = max(rates[GEMMS[0].name], default=None)
        rows = report.rows_of(prepared, runs, contenders, lambda _: rate)
    print(report.as_text(rows, rates, failed))
    found = {"gemm_flops_per_second": rates, **about(args, rounds)}
    report.write_json(args.out / "compare.json", rows, failed, found)
    limits = {f"limit: {rate / 1e9:.0f} GFLOP/s": report.limit(rows, rate)} if rate else {}
    seconds_panel = report.Panel("seconds per step (minimum)", lambda row: row.minimum, limits)
    report.draw(args.out / "time.png", rows, [seconds_panel])
    report.draw(args.out / "memory.png", rows, [report.memory_panel()])
    print(f"{args.out}: compare.json, time.png, memory.png")


def prepared_apart(
    folder: Path,
    config: str,
    sizes: list[Size],
    contenders: Iterable[Contender],
    seconds: float | None = None,
) -> Prepared:
    """Everything written to `folder` in a process of its own, so that this one stays small.

    Raises RuntimeError where it fails or takes longer than `seconds`.
    """
    forms = {c.graph for c in contenders if c.graph.startswith("r2id.")} - {"r2id.cpu"}
    with Bar(total=1, desc="export", unit="bundle") as bar:
        given = folder, config, sizes, sorted(forms)
        prepared, *_ = apart.items(prepare_one, *given, seconds=seconds)
        bar.update()
    if isinstance(prepared, apart.Failure):
        raise RuntimeError(f"the export failed: {prepared.reason}")
    assert isinstance(prepared, Prepared)
    return prepared


def prepare_one(
    folder: Path, config: str, sizes: list[Size], forms: Collection[str]
) -> list[Prepared]:
    return [prepare(folder, config, sizes, forms)]


Turn = tuple[Contender, list[Size]]


def run_turns(
    prepared: Prepared,
    turns: list[Turn],
    threads: int,
    seconds: float,
    device: str = "cpu",
    budget: float | None = None,
    on_turn: Callable[[report.Runs, list[report.Failed]], object] | None = None,
) -> tuple[report.Runs, list[report.Failed]]:
    """What each turn measured, in a process of its own, and which gave nothing and why.

    All turns together take at most `budget` seconds: a turn may use twice its even share of what is
    left, and what others leave is for those after them. `on_turn` gets all that is known so far.
    """
    runs: report.Runs = {size: {} for _, sizes in turns for size in sizes}
    failed: list[report.Failed] = []
    end = None if budget is None else time.monotonic() + budget
    with Bar(total=sum(len(sizes) for _, sizes in turns), unit="run") as bar:
        for number, (contender, sizes) in enumerate(turns):
            bar.set_postfix_str(f"{contender.name}, {' '.join(map(size_name, sizes))}")
            share = None if end is None else share_of(end - time.monotonic(), len(turns) - number)
            rest = [*sizes]
            given = prepared, contender, sizes, threads, seconds, device
            results: Iterable[Any] = [apart.Failure("left out: the time was used up")]
            if share is None or share >= LEAST_SHARE:
                results = apart.items(measure_all, *given, seconds=share)
            for found in results:
                if isinstance(found, apart.Failure):
                    failed.append(report.Failed(contender.name, (*rest,), found.reason))
                elif rest:
                    runs[rest.pop(0)].setdefault(contender.name, []).append(found)
                    bar.update()
            bar.update(len(rest))
            if on_turn is not None:
                on_turn(runs, failed)
    return runs, failed


def share_of(left: float, turns: int) -> float:
    """Seconds that a turn may take of those that are left for it and the turns after it."""
    return max(0.0, min(left, 2 * left / turns))


def about(args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        "processor": doctor.processor(),
        "platform": platform.platform(),
        "threads": args.threads,
        "config": args.config,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "openvino")},
        "memory": "bytes resident at the peak; own: less those before the model was loaded",
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
