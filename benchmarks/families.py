"""Every shipped model side by side, by one judge: python -m benchmarks.families --data data/mnist

At the size that each was trained at, at half, 1.5, 2, 4 and 8 times of it, and at four aspects of
as many pixels: digits read right by the project's classifier, Fréchet distance and recall in its
features, with real digits brought to the same sizes beside them; seconds and peak memory of one
picture in a process of its own; GFLOP of its products; how much alike the digits of one seed are at
the trained size and at twice of it. A size that a model cannot draw gives way to the nearest legal
one, and the table says so. Large sizes are judged by fewer digits: compare rows of equal counts.

Stopped and started again with the same options, it goes on after what the report holds. Writes
families.json, families.md and families.png. --quick takes minutes.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import apart
from benchmarks.shipped import CASES, QUICK, SCALE, TRAINED, TWICE, Case, Model, picture
from runtime import cli, doctor
from runtime.bundle.files import Measures, atomic_write
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.engines import EngineOptions
from runtime.errors import ResourceError, UsageError
from runtime.images.pixels import to_uint8
from runtime.progress import Bar
from runtime.providers import PROVIDERS
from runtime.sampling.choices import SOLVER, SOLVERS

if TYPE_CHECKING:  # a picture's process, which reads this file too, has no PyTorch in its memory
    from reference.data import Images
    from reference.evaluation.judging import Judge

MODELS = {"mnist": "R2", "siid": "SIID", "s2id": "S2ID", "hdit": "HDiT", "sid2": "SiD2"}
SHOWN = (2, 5)  # digits of the picture


@dataclass(frozen=True)
class Table:
    """The measures, part by part, in a report that keeps what it holds."""

    args: argparse.Namespace
    models: list[Model]
    cases: list[Case]
    report: Measures
    train: "Images"
    judges: "dict[int, Judge]"  # by the side of training pictures

    def measure(self) -> None:
        """Everything that the report lacks, small sizes of all models first."""
        for model in self.models:
            known = self.report.found.get(model.name, {}).get("about", {}).get("sha256")
            if known not in (None, model.loaded.sha256):
                del self.report.found[model.name]
            self.report.take(model.name, "about", model.about)
        for case in Bar(sorted(self.cases, key=lambda c: c.area), desc="families", unit="size"):
            self.report.take("real", case.name, partial(self.real, case))
            for model in self.models:
                own = self.report.found[model.name]
                if not self.drawn(model, case).exists():
                    own.pop(f"judged {case.name}", None)
                self.report.take(
                    model.name, f"judged {case.name}", partial(self.judge, model, case)
                )
                self.report.take(model.name, f"cost {case.name}", partial(self.cost, model, case))
        if TRAINED in self.cases and TWICE in self.cases:
            for model in self.models:
                self.report.take(model.name, "likeness", partial(self.likeness, model))

    def drawn(self, model: Model, case: Case) -> Path:
        """The file of a model's digits at a size, uint8 `[n, h, w, c]`."""
        return self.args.out / "digits" / f"{model.name}-{case.name.replace(':', 'x')}.npy"

    def real(self, case: Case) -> dict[str, float]:
        """What the judge finds of real digits at a size."""
        from reference.evaluation.digits import balanced_indices, labels_of, shown

        chosen = balanced_indices(self.train)[: case.digits(self.args.digits)]
        side = self.train.side
        size = round(side * case.height), round(side * case.width)
        return self.judges[side](shown(self.train, chosen, size), labels_of(self.train, chosen))

    def judge(self, model: Model, case: Case) -> dict[str, Any]:
        """Digits of a size among real ones; the digits are kept."""
        from reference.evaluation.drawing import GraphDrawing, Sampling

        latent, image = case.sizes(model.interface)
        draw = GraphDrawing(model.opened, Sampling(self.args.solver, self.args.steps, SCALE))
        labels = draw.labels(case.digits(self.args.digits))
        images = draw(labels, latent, image).images
        with atomic_write(self.drawn(model, case)) as file:
            np.save(file, to_uint8(images.numpy()))
        sizes = {"asked": case.asked(model.interface), "latent": latent, "image": image}
        found = self.judges[model.side](images, labels)
        return {**sizes, "digits": len(labels), **found}

    def cost(self, model: Model, case: Case) -> dict[str, Any]:
        """Seconds, bytes and operations of one picture."""
        latent, image = case.sizes(model.interface)
        steps = self.args.steps or SOLVERS[self.args.solver].steps
        given = model.bundle, model.options, latent, image, self.args.solver, steps
        found = next(iter(apart.items(picture, *given)))
        if isinstance(found, apart.Failure):
            raise ResourceError(
                f"{model.name} at {size_name(image)}: {found.reason}. Choose others with --sizes"
            )
        return {**found, "flops": model.flops(case, steps)}

    def likeness(self, model: Model) -> dict[str, float]:
        """Digits of one seed at twice the trained size beside those at it."""
        import torch

        from reference.evaluation.likeness import judged

        pair = [self.drawn(model, case) for case in (TRAINED, TWICE)]
        first, twice = (torch.from_numpy(np.load(path)).movedim(-1, 1) / 127.5 - 1 for path in pair)
        count = min(len(first), len(twice))
        judge, labels = self.judges[model.side], torch.arange(count) % 10
        return judged(judge, twice[:count], labels, first[:count])


def as_markdown(found: dict[str, Any], models: list[str], cases: list[str]) -> str:
    """Two tables: a row per model, then a row per size and model, real digits above."""
    settings = found["settings"]
    lines = [
        f"{settings['evaluations']} evaluations of {settings['solver']}, guidance {SCALE:g}, "
        f"{settings['precision']} on {settings['provider']}, {settings['threads']} threads of "
        f"{settings['processor']['name']}; Fréchet distance and recall in the classifier's "
        "features; GFLOP, seconds and peak memory of one picture.",
        "",
        "| | parameters | checkpoint, MB | one seed at 1 and 2: correlation | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for name in models:
        about, alike = found[name]["about"], found[name].get("likeness")
        cells = [f"{alike['correlation']:.3f}", f"{alike['psnr']:.1f}"] if alike else ["", ""]
        own = [f"{about['parameters'] / 1e6:.2f} M", f"{about['bytes'] / 1e6:.1f}", *cells]
        lines.append(f"| {MODELS[name]} | {' | '.join(own)} |")
    names = ("size", "", "pixels", "digits", "read right", "Fréchet", "recall", "GFLOP", "s", "MB")
    lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case in cases:
        real = found["real"][case]
        lines.append(f"| {case} | real | | | {' | '.join(judged_cells(real))} | | | |")
        for name in models:
            judged, cost = found[name][f"judged {case}"], found[name][f"cost {case}"]
            drawn, asked = size_name(judged["image"]), size_name(judged["asked"])
            pixels = drawn if drawn == asked else f"{drawn} for {asked}"
            spent = f"{cost['flops'] / 1e9:.1f}", f"{cost['seconds']:.2f}"
            cells = [MODELS[name], pixels, f"{judged['digits']}", *judged_cells(judged), *spent]
            lines.append(f"| {case} | {' | '.join(cells)} | {cost['peak_bytes'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def judged_cells(found: dict[str, float]) -> list[str]:
    return [f"{found['read_right']:.1%}", f"{found['frechet']:.0f}", f"{found['recall']:.2f}"]


def plot(table: Table, path: Path) -> None:
    """The digits of one seed, pixel by pixel: a column per size, rows for each model."""
    from matplotlib.figure import Figure

    rows = [(model, digit) for model in table.models for digit in SHOWN]
    columns = table.cases
    figure = Figure(figsize=(1.1 * len(columns) + 0.6, 1.1 * len(rows) + 0.4), layout="constrained")
    each = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (model, digit) in zip(each, rows, strict=True):
        for axes, case in zip(line, columns, strict=True):
            axes.imshow(
                np.load(table.drawn(model, case))[digit].squeeze(), "gray", vmin=0, vmax=255
            )
            axes.set(xticks=[], yticks=[])
            size = size_name(case.sizes(model.interface)[1])
            if digit == SHOWN[0]:
                axes.set_title(f"{case.name}: {size}", fontsize=6)
        line[0].set_ylabel(MODELS[model.name], fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def models_of(args: argparse.Namespace) -> list[Model]:
    """The models asked for; without --models all whose weights are there, others named."""
    options = EngineOptions(args.provider, threads=args.threads, precision=args.precision)
    found, missing = [], []
    for name in args.models or MODELS:
        path = args.weights / f"{name}.safetensors"
        if path.exists() or args.models:
            found.append(Model(name, path, args.bundles / name, options))
        else:
            missing.append(f"{path}")
    if missing:
        print(f"left out, since they are not there: {', '.join(missing)}")
    if not found:
        raise UsageError(f"--weights {args.weights}: holds none of {[*MODELS]}.safetensors")
    return found


def benchmark(args: argparse.Namespace) -> None:
    """Measure what is not yet measured, print, write and draw."""
    from reference.classifier import trained_classifier
    from reference.data import load_mnist
    from reference.evaluation.judging import Judge

    models = models_of(args)
    cases = [CASES[name] for name in args.sizes or (QUICK if args.quick else CASES)]
    args.digits = args.digits or (20 if args.quick else 200)
    train, test = load_mnist(args.data), load_mnist(args.data, "t10k")
    sides = {train.side, *(model.side for model in models)}
    make_folder(args.out / "digits")
    classifier = trained_classifier(train, args.classifier or args.out / "classifier.safetensors")
    judges = {side: Judge.of(classifier, test.cropped(side)) for side in sides}
    settings = {
        "digits": args.digits,
        "solver": args.solver,
        "evaluations": args.steps or SOLVERS[args.solver].steps,
        "guidance_scale": SCALE,
        "provider": args.provider,
        "precision": args.precision,
        "threads": args.threads,
        "processor": doctor.processor(),
    }
    report = Measures(args.out / "families.json", settings)
    table = Table(args, models, cases, report, train, judges)
    table.measure()
    text = as_markdown(
        report.found, [model.name for model in models], [case.name for case in cases]
    )
    print(text)
    with atomic_write(args.out / "families.md") as file:
        file.write(text.encode())
    plot(table, args.out / "families.png")
    print(f"{args.out}: families.json, families.md, families.png")


def some_of(known: tuple[str, ...]) -> Any:
    """A converter for argparse: some of `known`, separated by commas."""

    def convert(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}; expected some of {','.join(known)}")
        return found

    return convert


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.families", __doc__)
    add = p.add_argument
    add("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    add("--out", type=Path, default=Path("build/families"), help="folder of the report")
    add("--quick", action="store_true", help="20 digits, six sizes: minutes")
    add("--models", type=some_of((*MODELS,)), help="mnist,siid,… (those whose weights are there)")
    add("--sizes", type=some_of((*CASES,)), help=f"{','.join(CASES)} (all, --quick six)")
    few = "at the trained size and below; fewer at larger ones (200, --quick 20)"
    add("--digits", type=cli.number(10, 10_000, int), help=few)
    add("--solver", choices=tuple(SOLVERS), default=SOLVER, help=f"how steps are made ({SOLVER})")
    add("--steps", type=cli.number(1, 10_000, int), help="evaluations (the solver's)")
    add("--precision", default="fp32", choices=cli.PRECISIONS, help="of the graphs (fp32)")
    add("--provider", choices=tuple(PROVIDERS), default="cpu", help="what runs them (cpu)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="(2)")
    add("--weights", type=Path, default=Path("reference/weights"), help="folder of checkpoints")
    add("--bundles", type=Path, default=Path("build"), help="folder of their bundles")
    add("--classifier", type=Path, help="its weights, made if need be (in --out)")
    cli.run(benchmark, p)


if __name__ == "__main__":
    main()
