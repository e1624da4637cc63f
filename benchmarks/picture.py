"""From a command to a PNG on disk, part by part, at equal quality: python -m benchmarks.picture

Ours beside the published layout in PyTorch, eager and compiled, with DDIM and with plain
DPM-Solver++ 2M. Each draws with the fewest evaluations whose pixels are 30 dB from the converged
ODE, found once per model and latent (of 16x16 at most) by the graphs that all of them agree with.

Parts, each contender in a process of its own: interpreter and imports; manifest and hashes (of
PyTorch the checkpoint); compile; film and position; steps; decode; PNG. `fresh` is all of them: for
ours a command's wall time, for PyTorch their sum, its steps timed for --steps of them. `open` is a
second picture of an open bundle (PyTorch: steps, decode and PNG). The published width has random
weights. Writes picture.json and picture.png; stopped and started again, or with other models, cases
and rounds, it goes on after what picture-measures.json holds.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import about
from benchmarks.decode import export_published, published
from benchmarks.solvers import draw, plain_2m_time, reference
from runtime import cli, open_bundle
from runtime.bundle.files import Measures, atomic_write
from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE, read_manifest
from runtime.coordinates import grid
from runtime.engines import EngineOptions
from runtime.images.pixels import psnr, save_png, save_rows, to_uint8
from runtime.progress import Bar
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVER
from runtime.sampling.request import Request
from runtime.sampling.schedule import Schedule, read
from runtime.sampling.solvers import Table

Case = tuple[Size, Size]  # latent, image
CASES: tuple[Case, ...] = (((8, 8), (256, 256)), ((16, 16), (1024, 1024)), ((64, 64), (1024, 1024)))
PARTS = ("imports", "manifest", "compile", "film", "steps", "decode", "png")
WANTED = 30.0  # dB
SEARCHED = 16  # the latent's longest side where evaluations are counted
TRIED = (6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400)
CONVERGED, QUICKLY_CONVERGED = 250, 100  # evaluations of the ODE
PICTURES = 4
LABEL, SCALE = 7, 2.0
TABLES: dict[str, Callable[[Schedule, int], Table]] = {
    "ours": partial(solvers.table, SOLVER),
    "2M": plain_2m_time,
    "DDIM": partial(solvers.table, "ddim"),
}
OURS = "import runtime.generate, runtime.images.pixels, runtime.pipeline.bundle, {}"
THEIRS = "import torch, numpy, PIL.Image, reference.checkpoint, benchmarks.published"
LIBRARIES = {"cpu": "onnxruntime", "openvino": "openvino"}


def evaluations(bundle: Path, latent: Size, converged: int) -> dict[str, tuple[int, float]]:
    """Per kind of table, the fewest evaluations that reach WANTED, and the PSNR they reach."""
    opened = open_bundle(bundle)
    own = min(latent[0], SEARCHED), min(latent[1], SEARCHED)
    schedule = read(opened.manifest.schedule, own)
    given = (opened, own, SCALE, PICTURES)
    wanted = draw(*given, reference(schedule, converged))
    found: dict[str, tuple[int, float]] = {}
    for name, table in TABLES.items():
        for steps in TRIED:
            found[name] = steps, psnr(draw(*given, table(schedule, steps)), wanted)
            if found[name][1] >= WANTED:
                break
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def command(*line: str) -> float:
    """Wall seconds of a fresh interpreter."""
    run = partial(subprocess.run, [sys.executable, *line], check=True, capture_output=True)
    return seconds(run)[0]


def our_parts(
    bundle: Path, options: EngineOptions, latent: Size, image: Size, steps: int, png: Path
) -> dict[str, float]:
    """Seconds of each part but the imports, and of a second picture; for a process of its own."""
    request = Request([LABEL], latent, image=image, steps=steps, guidance_scale=SCALE)
    found: dict[str, float] = {}

    def read() -> Any:
        opened = open_bundle(bundle, options)
        for spec in opened.manifest.graphs.values():
            opened.manifest.file_bytes(spec)
        return opened

    found["manifest"], opened = seconds(read)
    resampler = opened.resampler

    def compiled() -> None:
        with opened.opening(request):
            pass

    def bands(x: np.ndarray) -> Any:
        return map(to_uint8, resampler.draw(opened.state(x), image))

    shape = (*image, opened.interface.color_channels)
    found["compile"], _ = seconds(compiled)
    found["film"], _ = seconds(lambda: opened.diffuser.prepare(request, latent))
    found["steps"], x = seconds(lambda: opened.diffuse(request))
    found["decode"], drawn = seconds(lambda: list(bands(x)))
    found["png"], _ = seconds(lambda: save_rows(png, drawn, shape, {}))
    again = Request([LABEL], latent, image=image, steps=steps, guidance_scale=SCALE, seed=1)
    found["open"], _ = seconds(lambda: save_rows(png, bands(opened.diffuse(again)), shape, {}))
    return found


def torch_parts(
    shipped: bool, kind: str, compiled: bool, case: Case, steps: int, timed: int, threads: int
) -> dict[str, float]:
    """Seconds of each part but the imports, of the published layout; for a process of its own."""
    import torch

    from benchmarks.published import PublishedR2ID
    from reference.checkpoint import SHIPPED, load
    from runtime.sampling.guidance import guide
    from runtime.sampling.loop import sample
    from runtime.sampling.schedule import COSINE

    torch.set_num_threads(threads)
    (latent, image), table = case, TABLES[kind](COSINE, steps)
    found: dict[str, float] = {"film": 0.0, "compile": 0.0}
    read = (lambda: load(SHIPPED).models.eval()) if shipped else published
    found["manifest"], models = seconds(read)
    labels = torch.zeros(2, 1, models.config.condition.labels)
    labels[1, 0, LABEL] = 1
    step = PublishedR2ID(models)
    run: Any = torch.compile(step) if compiled else step
    alpha_bar = torch.from_numpy(table.alpha_bar).float()
    coordinates = torch.from_numpy(grid(*latent))

    def predict(x: torch.Tensor, index: int) -> torch.Tensor:
        eps = run(x, coordinates, alpha_bar[index : index + 1], labels)
        return torch.as_tensor(guide(eps.unsqueeze(1), (1 - SCALE, SCALE)))

    x = torch.randn(1, models.config.r2id.latent_channels, *latent)
    last = min(timed, steps)
    with torch.inference_mode():
        warm, _ = seconds(lambda: predict(x, 0))
        taken, x = seconds(lambda: sample(predict, x, table, last=last))
        found["steps"] = taken / last * steps
        found["compile"] = max(0.0, warm - taken / last)
        found["decode"], pixels = seconds(lambda: models.r2ir.decode(x.clamp(-1, 1), image))
    with tempfile.TemporaryDirectory() as folder:
        drawn = to_uint8(pixels.numpy())[0]
        found["png"], _ = seconds(lambda: save_png(Path(folder) / "a.png", drawn, {}))
    found["open"] = found["steps"] + found["decode"] + found["png"]
    return found


def alone(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work).result()


def our_row(
    args: argparse.Namespace, bundle: Path, provider: str, case: Case, steps: int, png: Path
) -> dict[str, float]:
    """Every part of ours, and the whole as a command."""
    latent, image = case
    options = EngineOptions(provider, threads=args.threads, precision=args.precision)
    found: dict[str, float] = alone(partial(our_parts, bundle, options, latent, image, steps, png))
    found["imports"] = command("-c", OURS.format(LIBRARIES[provider]))
    line = ["-m", "runtime.generate", "--engine", str(bundle), "--provider", provider]
    line += ["--precision", args.precision, "--threads", str(args.threads)]
    line += ["--latent", size_name(latent), "--image", size_name(image), "--label", str(LABEL)]
    line += ["--steps", str(steps), "--guidance", str(SCALE), "--out", str(png)]
    return found | {"fresh": command(*line)}


def torch_row(
    args: argparse.Namespace, shipped: bool, kind: str, compiled: bool, case: Case, steps: int
) -> dict[str, float]:
    """Every part of the published layout, and their sum."""
    work = partial(torch_parts, shipped, kind, compiled, case, steps, args.steps, args.threads)
    found: dict[str, float] = alone(work)
    found["imports"] = command("-c", THEIRS)
    return found | {"fresh": sum(found[part] for part in PARTS)}


def measures_of(args: argparse.Namespace) -> Measures:
    """What was measured before with the same options and libraries."""
    settings = {
        "precision": args.precision,
        "timed_steps": args.steps,
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", *LIBRARIES.values())},
    }
    return Measures(args.out / "picture-measures.json", settings)


def measure(args: argparse.Namespace, bundles: dict[str, Path], png: Path) -> list[dict[str, Any]]:
    """A row per model, case and contender: medians over the rounds, in which all take turns."""
    kinds = ["eager"] if args.quick else ["eager", "compile"]
    converged = QUICKLY_CONVERGED if args.quick else CONVERGED
    rows, measures = [], measures_of(args)
    for (model, bundle), case in product(bundles.items(), args.cases):
        where = f"{model} {size_name(case[0])} -> {size_name(case[1])}"
        made_of = read_manifest(bundle).checkpoint
        kind = where if made_of is None else f"{where}, checkpoint {made_of.sha256}"
        count = partial(alone, partial(evaluations, bundle, case[0], converged))
        fewest = measures.take(kind, f"evaluations, {converged} converged", count)
        works: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {}
        for provider in args.providers:
            steps = fewest["ours"][0]
            name = f"ours, {LIBRARIES[provider]}"
            works[name] = "ours", partial(our_row, args, bundle, provider, case, steps, png)
        for mode, table in product(kinds, ("DDIM", "2M")):
            own = (args, model == "shipped", table, mode == "compile", case, fewest[table][0])
            works[f"torch {mode}, {table}"] = table, partial(torch_row, *own)
        turns = [*product(range(1, args.rounds + 1), works)]
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in works}
        for number, name in Bar(turns, desc=where, unit="run"):
            taken[name].append(measures.take(kind, f"{name}, round {number}", works[name][1]))
        for name, runs in taken.items():
            count, quality = fewest[works[name][0]]
            row = {"model": model, "latent": size_name(case[0]), "image": size_name(case[1])}
            row |= {"contender": name, "evaluations": count, "psnr_db": quality}
            rows.append(row | {key: float(np.median([r[key] for r in runs])) for key in runs[0]})
    return rows


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each model and case."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"{row['model']}, {row['latent']} -> {row['image']}", []).append(row)
    return found


def as_text(rows: list[dict[str, Any]]) -> str:
    """A table per model and case: seconds of each part, and how many times ours is as fast."""
    lines = []
    for name, own in grouped(rows).items():
        ours = [row for row in own if row["contender"].startswith("ours")]
        best = {key: min(row[key] for row in ours) for key in ("fresh", "open")}
        heading = ["", "evaluations", "dB", *PARTS, *best]
        table: list[list[object]] = [[*heading, *(f"ours is faster, {key}" for key in best)]]
        for row in own:
            shown = [f"{row[key]:.3f}" for key in (*PARTS, *best)]
            faster = [f"{row[key] / least:.1f}×" for key, least in best.items()]
            quality = [row["evaluations"], f"{row['psnr_db']:.1f}"]
            table.append([row["contender"], *quality, *shown, *faster])
        lines += [name, cli.table(table), ""]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar per contender, its parts one after the other; a chart per model and case."""
    from matplotlib.figure import Figure

    groups = grouped(rows)
    figure = Figure(figsize=(8, 0.6 + 2.2 * len(groups)), layout="constrained")
    each = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (name, own) in zip(each, groups.items(), strict=True):
        names = [row["contender"] for row in own]
        left = np.zeros(len(own))
        for number, part in enumerate(PARTS):
            values = np.array([row[part] for row in own])
            axes.barh(names, values, left=left, color=f"C{number}", label=part)
            left += values
        axes.invert_yaxis()
        axes.set(title=name, xlabel="seconds from the command to the PNG, by part")
    handles, labels = each[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=len(PARTS))
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def compare(args: argparse.Namespace) -> None:
    """Draw with every contender, report."""
    if args.quick:
        args.models, args.cases, args.rounds = args.models[:1], args.cases[:1], 1
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = {}
        for model in args.models:
            bundles[model] = args.bundle if model == "shipped" else folder / model
            if model == "published":
                bundles[model].mkdir()
                alone(partial(export_published, bundles[model]))
        rows = measure(args, bundles, folder / "picture.png")
    print(as_text(rows))
    args.config = ",".join(args.models)
    content = about(args, args.rounds) | {"precision": args.precision, "rows": rows}
    with atomic_write(args.out / "picture.json") as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    plot(rows, args.out / "picture.png")
    print(f"{args.out}: picture.json, picture.png")


def case(text: str) -> Case:
    """LATENT:IMAGE, two sizes."""
    latent, _, image = text.partition(":")
    return cli.size(latent), cli.size(image)


def cases(text: str) -> list[Case]:
    """Cases separated by commas."""
    return [case(part) for part in text.split(",")]


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A converter for argparse: some of `known`, separated by commas."""

    def convert(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}; expected some of {','.join(known)}")
        return found

    return convert


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.picture", __doc__)
    add = p.add_argument
    models, providers = ("shipped", "published"), ("cpu", "openvino")
    add("--quick", action="store_true", help="the first model and case, once, not compiled")
    add("--models", type=names(models), default=[*models], help="shipped,published")
    add("--cases", type=cases, default=[*CASES], help="LATENT:IMAGE,…, as in 8x8:256x256")
    add("--providers", type=names(providers), default=[*providers], help="of ours (both)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours (fp32)")
    add("--rounds", type=cli.number(1, 100, int), default=3, help="(3)")
    add("--steps", type=cli.number(1, 1000, int), default=5, help="of PyTorch that are timed (5)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="(2)")
    add("--bundle", type=Path, default=DEFAULT_BUNDLE, help="of the shipped model")
    add("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    cli.run(compare, p)


if __name__ == "__main__":
    main()
