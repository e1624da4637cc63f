"""Measure and draw a checkpoint: python -m reference.evaluate --data DIR --out build/evaluation.

Writes `report.json`, sheets and charts. Per size, sizes that training did not see marked as such:
the share of digits that a small classifier reads as the label that was asked for, and Fréchet
distance, precision and recall in its features, real digits' figures beside them. Then errors of
the models by themselves (reconstruction, eps over t, decodes of one latent at many scales, x0 on
the way) and how much alike the digits of one seed are at different sizes.

With --bundle the digits are drawn by the graphs exported from the checkpoint: what users run, and
faster on a CPU; it also measures what it costs to change the latent's size on the way. A model that
diffuses pixels needs one, for its schedule, and parts that need a resampler are left out. Stopped
and started again with the same options, it goes on after what the report holds. --quick measures
less of everything, into `quick.json`; --only one part, into a file of its name.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from reference import checkpoint
from reference.checkpoint import SHIPPED, Checkpoint
from reference.classifier import Classifier, accuracy, trained_classifier
from reference.data import Images, load_mnist, load_painted_mnist
from reference.evaluation import curves
from reference.evaluation.digits import Size
from reference.evaluation.drawing import Drawing, GraphDrawing, Sampling, TorchDrawing
from reference.evaluation.extent import FULL, QUICK, SQUARE, Extent
from reference.evaluation.judging import Judge, balanced, judged, trained_on
from reference.evaluation.likeness import continued, same_picture
from reference.evaluation.report import print_report
from reference.evaluation.sheets import Sheets, save_chart
from reference.families import FAMILIES, R2
from reference.provenance import picture_side
from runtime import cli
from runtime.bundle.files import Measures
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.pipeline.bundle import open_bundle
from runtime.providers import PROVIDERS
from runtime.sampling.choices import SOLVER, SOLVERS, WHOLE
from runtime.sampling.noise import COHERENT, KINDS


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint that is measured part by part, into a report that keeps what it holds."""

    loaded: Checkpoint
    draw: Drawing
    extent: Extent
    train: Images
    test: Images
    classifier: Classifier
    report: Measures
    out: Path

    @cached_property
    def judge(self) -> Judge:
        return Judge.of(self.classifier, self.test)

    @property
    def itself(self) -> TorchDrawing:
        """Drawing by the models themselves, whose estimates on the way can be seen."""
        given = self.loaded.models, self.draw.sampling, self.test.parts
        if isinstance(self.draw, GraphDrawing):
            return TorchDrawing(*given, self.draw.pipeline.manifest.schedule)
        return TorchDrawing(*given)

    def reconstruction(self) -> None:
        """What R2IR loses, per latent size."""
        models, images = self.loaded.models, min(self.extent.images, len(self.test))
        for size in self.extent.reconstructed:
            error = partial(curves.reconstruction, models, self.test, size, images)
            self.report.take("reconstruction_mse", size_name(size), error)

    def eps(self) -> None:
        """The denoiser's loss over t."""
        images = min(self.extent.images, curves.SCRAPE_IMAGES)
        for size in self.extent.scraped:
            scrape = partial(curves.eps_over_t, self.itself, self.test, size, images)
            self.report.take("eps_mse_over_t", size_name(size), scrape)
        labels = ("t (0 clean, 1 noise)", "eps MSE")
        self._chart("eps-over-t", "eps_mse_over_t", labels, "y")

    def generation(self) -> None:
        """Digits of every size among real ones."""
        self.report.take(
            "classifier_accuracy", "test_images", partial(accuracy, self.classifier, self.test)
        )
        count = self.extent.digits
        self.report.take("real_digits", "train", lambda: self.judge(*balanced(self.train, count)))
        guided = self.draw.sampling.guidance_scale
        rows: list[tuple[Size, float, Size | None]]
        rows = [(size, 1.0, None) for size in self.extent.unguided if guided != 1]
        rows += [(size, guided, None) for size in self.extent.sizes]
        rows += [(SQUARE, guided, image) for image in self.extent.decoded]
        for row in rows:
            size, scale, image = row
            name = size_name(size) + (f" as {size_name(image)}" if image else "")
            self.report.take(
                "generation", f"{name} at guidance {scale:g}", partial(self._row, *row)
            )

    def _row(self, latent: Size, scale: float, image: Size | None) -> dict[str, Any]:
        seen = trained_on(latent, self.loaded.provenance) and image is None
        found = judged(self.draw, self.judge, latent, self.extent.digits, scale, image)
        return {"trained_on": seen, **found}

    def scale(self) -> None:
        """Large decodes against small ones."""
        size, digits = self.extent.scaled

        def measure() -> curves.Curve:
            latents = self.draw(self.draw.labels(digits), size).latents
            return curves.scale_consistency(self.draw.decode, latents, self.extent.factors)

        self.report.take("scale_consistency", size_name(size), measure)
        for kind, label in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
            labels = (f"k: decodes at k · {curves.SCALED_SIDE} reduced by area", label)
            keys = ("factor", kind)
            self._chart(f"scale-{kind}", "scale_consistency", labels, "x", keys, first=1)

    def early_stop(self) -> None:
        """What can be read in x0 on the way."""
        sizes, digits = self.extent.stopped
        for size in sizes:
            stop = partial(curves.early_stop, self.itself, self.judge, size, digits)
            self.report.take("early_stop", size_name(size), stop)
        self._chart("early-stop", "early_stop", ("evaluations", "share read right in x0"))

    def likeness(self) -> None:
        """One seed at several sizes, by either kind of noise and with a change of size."""
        sizes, digits = self.extent.alike, self.extent.alike_digits
        for kind in KINDS:
            alike = partial(same_picture, self.draw, self.judge, kind, sizes, digits)
            self.report.take("same_picture", kind, alike)
        if isinstance(self.draw, GraphDrawing):
            names = " then ".join(map(size_name, self.extent.continued))
            cost = partial(continued, self.draw, self.judge, self.extent.continued, digits)
            self.report.take("continued", names, cost)

    def sheets(self) -> None:
        """Pictures for the eye."""
        sheets = Sheets(self.out, self.draw, self.test)
        for size in self.extent.sheets:
            self.report.take("sheets", size_name(size), partial(sheets.digits, size))
        for image in self.extent.decoded:
            name = f"{size_name(SQUARE)} as {size_name(image)}"
            self.report.take("sheets", name, partial(sheets.digits, SQUARE, image))
        self.report.take("sheets", "one seed", partial(sheets.seeds, self.extent.seeds))
        if self.draw.decoupled:
            self.report.take("sheets", "latent channels", sheets.channels)
            again = partial(sheets.reconstructions, self.loaded.models)
            self.report.take("sheets", "reconstructions", again)

    def _chart(
        self,
        name: str,
        kind: str,
        labels: tuple[str, str],
        log: str = "",
        keys: tuple[str, ...] = (),
        first: int = 0,
    ) -> None:
        """The curves of a kind, all their lists or `keys` alone, from their point `first` on."""
        found = self.report.found[kind]
        chosen = {size: {k: c[k][first:] for k in keys or c} for size, c in found.items()}
        save_chart(self.out / f"{name}.png", chosen, labels, log)


PARTS: dict[str, Callable[[Evaluation], None]] = {
    "reconstruction": Evaluation.reconstruction,
    "eps": Evaluation.eps,
    "sheets": Evaluation.sheets,
    "generation": Evaluation.generation,
    "scale": Evaluation.scale,
    "early-stop": Evaluation.early_stop,
    "likeness": Evaluation.likeness,
}


RESAMPLED = ("reconstruction", "scale")  # parts that need a resampler


def real_digits(args: argparse.Namespace, loaded: Checkpoint) -> tuple[Images, Images]:
    """Training and test digits, painted where a checkpoint draws colours; UsageError for others."""
    config = loaded.models.config
    load = load_mnist if config.channels == 1 else load_painted_mnist
    train, test = load(args.data), load(args.data, "t10k")
    if config.labels != len(train.names):
        raise UsageError(
            f"{args.checkpoint}: draws {config.labels} labels; expected the "
            f"{len(train.names)} of MNIST's digits, which is what can be judged"
        )
    return train, test


def drawing(args: argparse.Namespace, loaded: Checkpoint, parts: tuple[int, ...]) -> Drawing:
    """By the bundle of --bundle or by the models; UsageError for a bundle of another checkpoint."""

    def sampling(own: float) -> Sampling:
        scale = own if args.guidance is None else args.guidance
        return Sampling(args.solver, args.steps, scale, args.guidance_interval)

    if args.bundle is None:
        if loaded.family is not FAMILIES[R2]:
            raise UsageError(
                f"{args.checkpoint}: {loaded.family.name} diffuses pixels over a schedule that its "
                "bundle's manifest describes; pass --bundle. Make one with: python -m export "
                f"--checkpoint {args.checkpoint} --out build/{loaded.family.name}"
            )
        config = loaded.models.config
        return TorchDrawing(loaded.models, sampling(config.guidance_scale), parts)
    graphs = open_bundle(args.bundle, EngineOptions(args.provider, precision=args.precision))
    source = graphs.manifest.checkpoint
    found = None if source is None else source.sha256
    if found != loaded.sha256:
        raise UsageError(
            f"{args.bundle}: made from checkpoint {found}; expected {loaded.sha256}. Make it "
            f"again with: python -m export --checkpoint {args.checkpoint} --out {args.bundle}"
        )
    return GraphDrawing(graphs, sampling(graphs.interface.guidance_scale), parts)


def extent(args: argparse.Namespace, draw: Drawing) -> Extent:
    """What the options ask for."""
    found = QUICK if args.quick else FULL
    if isinstance(draw, GraphDrawing) and not draw.decoupled:
        found = found.in_pixels(draw.pipeline.interface)
    if args.images is not None:
        found = replace(found, images=args.images)
    if args.digits is not None:
        found = replace(found, digits=args.digits)
    if args.sizes is not None:
        found = replace(found, sizes=args.sizes, unguided=args.sizes, decoded=(), sheets=args.sizes)
    return found


def parts_of(args: argparse.Namespace, draw: Drawing) -> list[str]:
    """The parts to measure, those left out named with the reason; UsageError for such an --only."""
    parts = [args.only] if args.only else [*PARTS]
    if not isinstance(draw, GraphDrawing) or draw.decoupled:
        return parts
    why = draw.pipeline.interface.why_coupled
    left = [part for part in parts if part not in RESAMPLED]
    if not left:
        raise UsageError(
            f"--only {args.only}: {why}; expected one of {[p for p in PARTS if p not in RESAMPLED]}"
        )
    if not args.only:
        print(f"left out: {', '.join(RESAMPLED)} ({why})")
    return left


def evaluate(args: argparse.Namespace) -> None:
    """Measure and draw what was asked for, the report growing with each part."""
    loaded = checkpoint.load(args.checkpoint)
    train, test = real_digits(args, loaded)
    draw = drawing(args, loaded, train.parts)
    own, parts = extent(args, draw), parts_of(args, draw)
    make_folder(args.out)
    classifier = trained_classifier(train, args.classifier or args.out / "classifier.safetensors")
    side = min(picture_side(loaded.provenance) or train.side, train.side)
    train, test = train.cropped(side), test.cropped(side)
    graphs = f"graphs in {args.precision} on {args.provider}"
    settings = {
        "checkpoint": loaded.sha256,
        "drawn_by": graphs if args.bundle else "PyTorch",
        "solver": args.solver,
        "steps": draw.sampling.count,
        "guidance_scale": draw.sampling.guidance_scale,
        "guidance_interval": [*args.guidance_interval],
        "noise": COHERENT,
        "digits_per_size": own.digits,
        "test_images": own.images,
    }
    name = args.only or ("quick" if args.quick else "report")
    report = Measures(args.out / f"{name}.json", settings)
    evaluation = Evaluation(loaded, draw, own, train, test, classifier, report, args.out)
    with torch.inference_mode():
        for part in parts:
            PARTS[part](evaluation)
    print_report(report.found)
    print(f"\nreport and pictures: {args.out}")


def main() -> None:
    """The command line."""
    p = cli.parser("reference.evaluate", __doc__)
    add = p.add_argument
    add("--checkpoint", type=Path, default=SHIPPED)
    add("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    add("--out", type=Path, default=Path("build/evaluation"))
    add("--quick", action="store_true", help="fewer sizes and digits: minutes")
    add("--only", choices=PARTS, help="one part of it")
    add("--sizes", type=cli.sizes, help="latents to draw, at guidance 1 too, instead of all")
    add("--digits", type=cli.number(10, 100_000, int), help="per row (1000, --quick 100)")
    add("--images", type=cli.number(10, 10_000, int), help="of the test set (10000, --quick 200)")
    add("--solver", choices=tuple(SOLVERS), default=SOLVER, help=f"how steps are made ({SOLVER})")
    add("--steps", type=cli.number(1, 10_000, int), help="evaluations (the solver's)")
    add("--guidance", type=cli.number(-100, 100), help="scale (the checkpoint's, mostly 2)")
    interval = "t within which it counts (0..1)"
    add("--guidance-interval", type=cli.interval, default=WHOLE, metavar="LOW..HIGH", help=interval)
    add("--bundle", type=Path, help="draw with this bundle's graphs")
    add("--precision", default="fp32", choices=cli.PRECISIONS, help="of the graphs (fp32)")
    add("--provider", choices=tuple(PROVIDERS), default="cpu", help="what runs them (cpu)")
    add("--classifier", type=Path, help="its weights, made if need be (in --out)")
    cli.run(evaluate, p)


if __name__ == "__main__":
    main()
