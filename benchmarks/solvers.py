"""How near to the model's own ODE a solver draws in few steps: python -m benchmarks.solvers

Every solver draws the same pictures from the same noise; the measure is the PSNR of the decoded
pixels against the converged ODE (order 3, uniform in log-SNR over all of the schedule, 250
evaluations). `plain` solvers are as other toolkits have them: DDIM uniform in t, and the published
DPM-Solver++ 2M, uniform in t or in log-SNR. Writes solvers.json and solvers.png.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE, Array
from runtime.engines import EngineOptions
from runtime.generate import checkpoint_of
from runtime.images.pixels import psnr
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.progress import Bar
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVER, SOLVERS, SPACINGS
from runtime.sampling.guidance import guidance
from runtime.sampling.labels import Labels
from runtime.sampling.loop import sample
from runtime.sampling.noise import NoiseStreams
from runtime.sampling.schedule import Schedule, log_snr, read
from runtime.sampling.solvers import Table, expit

SIZES = [(8, 8), (16, 16), (9, 16)]
SCALES = (1.0, 2.0, 4.0)
EVALUATIONS = (6, 8, 10, 12, 15, 20)
MUST = {6: 23, 8: 27, 10: 31, 12: 33, 15: 36, 20: 42}  # dB that the default has to reach
SEED = 3
LAST = 1e-3  # t of the reference's last evaluation
BATCH_TOKENS = 4096  # latent cells drawn at once


def whole_range(schedule: Schedule, steps: int) -> np.ndarray:
    """Nodes alpha_bar `[steps + 1]`, even in log-SNR over all of a schedule, then 1."""
    first, last = log_snr(schedule.alpha_bar(np.array([1.0, LAST])))
    return np.append(expit(np.linspace(first, last, steps)), 1.0)


def reference(schedule: Schedule, steps: int) -> Table:
    """Order 3 with steps so short that no choice of grid matters."""
    nodes = whole_range(schedule, steps)
    return Table(nodes, np.array(solvers.rows(nodes, 3, 0.0)))


def plain_2m(nodes: np.ndarray) -> Table:
    """DPM-Solver++ 2M as published (arXiv 2211.01095, algorithm 2, midpoint form)."""
    logs = log_snr(nodes) / 2
    rows = []
    for step, (a, b) in enumerate(pairwise(nodes)):
        keep, gain = np.sqrt((1 - b) / (1 - a)), -np.sqrt(b) * np.expm1(logs[step] - logs[step + 1])
        back = 0.0
        if step and b < 1:
            back = gain / 2 * (logs[step + 1] - logs[step]) / (logs[step] - logs[step - 1])
        rows.append((a**-0.5, -np.sqrt((1 - a) / a), keep, gain + back, -back, 0.0, 0.0))
    return Table(nodes, np.array(rows))


def plain_2m_time(schedule: Schedule, steps: int) -> Table:
    """2M uniform in t from 1."""
    return plain_2m(np.append(schedule.alpha_bar(np.linspace(1, 0, steps + 1)[:-1]), 1.0))


def contenders() -> dict[str, Callable[[Schedule, int], Table]]:
    """Name -> the table of so many evaluations."""

    def ours(name: str, spacing: str) -> Callable[[Schedule, int], Table]:
        return lambda schedule, steps: solvers.table(name, schedule, steps, spacing)

    found = {f"{SOLVER}, {spacing}": ours(SOLVER, spacing) for spacing in SPACINGS}
    found["dpm++2m, logsnr"] = ours("dpm++2m", "logsnr")
    return found | {
        "plain DDIM, time": lambda schedule, steps: solvers.table("ddim", schedule, steps),
        "plain 2M, time": plain_2m_time,
        "plain 2M, logsnr": lambda schedule, steps: plain_2m(whole_range(schedule, steps)),
    }


def draw(bundle: Bundle, size: Size, scale: float, pictures: int, table: Table) -> Array:
    """Pixels `[pictures, c, h, w]` of a table at a latent size and guidance scale."""
    labels = Labels(bundle.interface.labels, bundle.interface.parts)
    conditions = [{labels.combination(labels.turn(i)): 1.0} for i in range(pictures)]
    shape = (bundle.interface.latent_channels, *size)
    made = []
    at_once = max(1, BATCH_TOKENS // (size[0] * size[1]))
    for first in range(0, pictures, at_once):
        own = range(first, min(first + at_once, pictures))
        each, still = [conditions[i] for i in own], np.zeros(len(table))
        weights = guidance(each, len(labels.names), scale, still)
        predict = bundle.diffuser.predictor(weights, size, table)
        x = sample(predict, NoiseStreams(SEED, own, shape).draw(), table)
        made.append(bundle.decode(np.asarray(x, np.float32), bundle.interface.image_size(size)))
    return np.concatenate(made)


def measure(
    bundle: Bundle, args: argparse.Namespace, chosen: dict[str, Any], evaluations: list[int]
) -> list[dict[str, Any]]:
    """A row per solver, number of evaluations, size and scale."""
    rows = []
    cases = [*product(args.sizes, args.guidance)]
    total = len(cases) * (args.reference + len(chosen) * sum(evaluations))
    with Bar(total=total, desc="solvers", unit="step") as bar:
        for size, scale in cases:
            schedule = read(bundle.manifest.schedule, size)
            given = (bundle, size, scale, args.pictures)
            wanted = draw(*given, reference(schedule, args.reference))
            bar.update(args.reference)
            for name, steps in product(chosen, evaluations):
                found = draw(*given, chosen[name](schedule, steps))
                bar.update(steps)
                row = {"solver": name, "evaluations": steps, "latent": size_name(size)}
                rows.append(row | {"guidance_scale": scale, "psnr_db": psnr(found, wanted)})
    return rows


def means(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Solver -> evaluations -> mean PSNR over sizes and scales."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        own = found.setdefault(row["solver"], {})
        own.setdefault(row["evaluations"], []).append(row["psnr_db"])
    return {
        name: {steps: float(np.mean(values)) for steps, values in own.items()}
        for name, own in found.items()
    }


def as_text(found: dict[str, dict[int, float]], evaluations: list[int]) -> str:
    """The table of means."""
    rows: list[list[object]] = [["dB after evaluations", *evaluations]]
    rows += [[name, *(f"{own[steps]:.1f}" for steps in evaluations)] for name, own in found.items()]
    rows.append(["must, of the default", *(MUST.get(steps, "") for steps in evaluations)])
    return cli.table(rows)


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    """PSNR over evaluations, a line per solver."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, own in found.items():
        style = "s--" if name.startswith("plain") else "o-"
        axes.plot([*own], [*own.values()], style, label=name, linewidth=1.4, markersize=4)
    axes.plot([*MUST], [*MUST.values()], "k:", label="must, of the default", linewidth=1.2)
    axes.set(xscale="log", xlabel="evaluations", ylabel="PSNR against the converged ODE, dB")
    ticks = sorted({steps for own in found.values() for steps in own})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def compare(args: argparse.Namespace) -> None:
    """Draw with every solver, report."""
    if args.quick:
        args.sizes, args.guidance = args.sizes[:1], [2.0]
        args.pictures, args.reference = min(args.pictures, 8), min(args.reference, 100)
    options = EngineOptions(args.provider, threads=args.threads)
    bundle = open_bundle(args.bundle, options)
    chosen, evaluations = contenders(), args.evaluations or [*EVALUATIONS]
    default = f"{SOLVER}, {SOLVERS[SOLVER].spacing}"
    if args.default:
        chosen = {default: chosen[default]}
    rows = measure(bundle, args, chosen, evaluations)
    found = means(rows)
    about = {
        "checkpoint": checkpoint_of(bundle),
        "provider": bundle.provider,
        "numpy": version("numpy"),
        "pictures": args.pictures,
        "reference_evaluations": args.reference,
        "default": default,
        "must_db": MUST,
        "mean_psnr_db": found,
        "rows": rows,
    }
    make_folder(args.out)
    with atomic_write(args.out / "solvers.json") as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")
    plot(found, args.out / "solvers.png")
    print(as_text(found, evaluations))
    print(f"{args.out}: solvers.json, solvers.png")


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.solvers", __doc__)
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="its folder")
    add("--sizes", type=cli.sizes, default=SIZES, help="latent sizes (8x8,16x16,9x16)")
    scales = "guidance scales (1 2 4)"
    add("--guidance", type=cli.number(-100, 100), nargs="+", default=SCALES, help=scales)
    add("--evaluations", type=cli.integers, help="how many, as in 6,8,10 (6 to 20)")
    add("--pictures", type=cli.number(1, 1000, int), default=20, help="per size and scale (20)")
    long = "evaluations of the converged ODE (250)"
    add("--reference", type=cli.number(2, 10_000, int), default=250, help=long)
    add("--default", action="store_true", help="the default solver alone")
    add("--provider", choices=("cpu", "openvino"), default="openvino")
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--quick", action="store_true", help="8 pictures of one size and scale")
    add("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    cli.run(compare, p)


if __name__ == "__main__":
    main()
