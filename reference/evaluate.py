"""Measure and draw a checkpoint: python -m reference.evaluate --data DIR --out build/evaluation.

Writes `report.json` and pictures: reconstruction error per latent size, eps loss over t, sheets
over sizes and aspect ratios, latent channels, the share of generated digits that a small
classifier reads as the label that was asked for, and how much alike the digits of one seed are at
different sizes by either kind of noise. With --bundle the digits are drawn by the graphs exported
from the checkpoint, in any of their precisions: what users run, and faster on a CPU; it also
measures what it costs to change the latent's size on the way. Stopped and started again with the
same options, it goes on after what the report holds.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference import checkpoint
from reference.checkpoint import SHIPPED
from reference.classifier import (
    IMAGE_SIDE,
    SEED,
    Classifier,
    accuracy,
    middle,
    read,
    trained_classifier,
)
from reference.data import Images, fit, load_mnist
from reference.families.r2.model import R2Models
from reference.families.r2.training import canvas
from runtime import cli
from runtime.bundle.files import Measures, atomic_write
from runtime.bundle.interface import size_name
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.images.pixels import contact_sheet, save_png, to_uint8
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVER, SOLVERS
from runtime.sampling.guidance import guided
from runtime.sampling.loop import sample
from runtime.sampling.noise import COHERENT, KINDS, NoiseStreams
from runtime.sampling.schedule import COSINE

RECONSTRUCTION_SIZES = ((4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (6, 9), (16, 9))
GENERATION_SIZES = (
    *((8, 8), (4, 4), (6, 6), (12, 12), (16, 16)),
    *((9, 6), (6, 9), (16, 9), (9, 16)),
)
SCRAPE_SIZES = ((4, 4), (8, 8))
# The first is what the digits of the others are compared with.
NOISE_SIZES = ((8, 8), (6, 6), (12, 12), (16, 16), (9, 16))
NOISE_DIGITS = 100  # at most: enough for a mean over pairs of pictures
CONTINUED = ((8, 8), (16, 16))
CONTINUED_FROM = (0, 0.25, 0.5, 0.75, 1)  # shares of the steps at the smaller latent
SHEET_SIZES = ((4, 4), (8, 8), (16, 16), (9, 6), (6, 9), (16, 9), (9, 16), (24, 24))
SCRAPE_POINTS = 20
TOKENS_AT_ONCE = 4000

Size = tuple[int, int]


def batches(count: int, size: Size) -> list[slice]:
    """Slices whose tokens at a latent size fit in a processor's cache."""
    step = max(10, TOKENS_AT_ONCE // (size[0] * size[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def reconstruction(models: R2Models, test: Images, size: Size, limit: int) -> float:
    """MSE of images through latents of a size and back, at the latent's aspect ratio."""
    shape = canvas(size, IMAGE_SIDE)
    total = 0.0
    for part in tqdm(
        batches(limit, (8, 8)), desc=f"reconstruction {size_name(size)}", unit="batch"
    ):
        images = fit(test.pixels[part], *shape, test.pad)
        found = models.r2ir.decode(models.r2ir.encode(images, size), shape)
        total += F.mse_loss(found, images).item() * len(images)
    return total / limit


def t_scrape(models: R2Models, test: Images, size: Size, limit: int) -> dict[str, list[float]]:
    """eps MSE over t at latent `size`, under the null and under the true condition."""
    generator = torch.Generator().manual_seed(SEED)
    images = fit(test.pixels[:limit], *canvas(size, IMAGE_SIDE), test.pad)
    latent = models.r2ir.encode(images, size)
    one_hot = F.one_hot(test.labels[:limit], models.config.condition.labels).float()
    text = models.condition(torch.stack([torch.zeros_like(one_hot), one_hot]))
    times = [(i + 0.5) / SCRAPE_POINTS for i in range(SCRAPE_POINTS)]
    found: dict[str, list[float]] = {"t": times, "null": [], "label": []}
    for t in tqdm(times, desc=f"t-scrape {size_name(size)}", unit="t"):
        a = float(COSINE.alpha_bar(np.array(t)))
        eps = torch.randn(latent.shape, generator=generator)
        noisy = a**0.5 * latent + (1 - a) ** 0.5 * eps
        null, label = models.r2id(noisy, torch.full((limit,), a), text)
        found["null"].append(F.mse_loss(null, eps).item())
        found["label"].append(F.mse_loss(label, eps).item())
    return found


def generated(
    models: R2Models,
    labels: Tensor,
    size: Size,
    args: argparse.Namespace,
    desc: str,
    kind: str = COHERENT,
) -> tuple[Tensor, Tensor]:
    """One digit per label: images `[B, c, h, w]` of the latent's aspect, latents `[B, C, H, W]`."""
    parts = batches(len(labels), size)
    made = []
    with tqdm(total=len(parts) * args.steps, desc=desc, unit="step") as bar:

        def on_step(*progress: object) -> None:
            bar.update()

        for part in parts:
            if args.graphs:
                own = request(labels, part, args) | {"latent": size, "noise": kind}
                drawn = args.graphs.generate(**own, image=canvas(size, IMAGE_SIDE), on_step=on_step)
                made.append((torch.from_numpy(drawn.images), torch.from_numpy(drawn.latents)))
            else:
                made.append(draw_with_torch(models, labels, part, size, kind, args, on_step))
    images, latents = zip(*made, strict=True)
    return torch.cat(images), torch.cat(latents)


def draw_with_torch(
    models: R2Models,
    labels: Tensor,
    part: slice,
    size: Size,
    kind: str,
    args: argparse.Namespace,
    on_step: Callable[..., object],
) -> tuple[Tensor, Tensor]:
    """Images and latents of `labels[part]`, by the models themselves."""
    own = F.one_hot(labels[part], models.config.condition.labels).float()
    shape = (models.config.r2id.latent_channels, *size)
    streams = NoiseStreams(SEED, range(part.start, part.stop), shape, kind)
    table = solvers.table(args.solver, COSINE, args.steps)
    labels = torch.stack([torch.zeros_like(own), own])
    denoise = models.denoiser(labels, table.alpha_bar)
    predict = guided(denoise, (1 - args.guidance, args.guidance))
    latent = sample(predict, torch.from_numpy(streams.draw()), table, on_step=on_step)
    return models.r2ir.decode(latent, canvas(size, IMAGE_SIDE)), latent


def request(labels: Tensor, part: slice, args: argparse.Namespace) -> dict[str, Any]:
    """What `Bundle.generate` draws `labels[part]` with, at any size."""
    return {
        "labels": labels[part].tolist(),
        "solver": args.solver,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "seed": SEED,
        "first_index": part.start,
    }


def open_graphs(args: argparse.Namespace, checkpoint_sha256: str) -> Bundle | None:
    """The bundle of --bundle; raises UsageError where it is of another checkpoint."""
    if args.bundle is None:
        return None
    graphs = open_bundle(args.bundle, EngineOptions(precision=args.precision))
    source = graphs.manifest.checkpoint
    found = None if source is None else source.sha256
    if found != checkpoint_sha256:
        raise UsageError(
            f"{args.bundle}: made from checkpoint {found}; expected {checkpoint_sha256}. Make it "
            f"again with: python -m export --checkpoint {args.checkpoint} --out {args.bundle}"
        )
    return graphs


def digits_read(models: R2Models, classifier: Classifier, size: Size, args: Any) -> float:
    """Share of `args.digits` generated digits at a latent size that are read as their label."""
    labels = torch.arange(args.digits) % 10
    images, _ = generated(models, labels, size, args, f"digits {size_name(size)}")
    share = (read(classifier, images) == labels).float().mean().item()
    tqdm.write(f"  {size_name(size)}: {share:.1%} read right")
    return share


def judged(
    classifier: Classifier, images: Tensor, labels: Tensor, others: Tensor
) -> dict[str, float]:
    """The share read as their label; PSNR and correlation of each with the other image's middle.

    PSNR in dB is of the mean squared error over all images; pixels are in [-1, 1]. The correlation
    is the mean over images, 0 for a blank one.
    """
    right = (read(classifier, images) == labels).float().mean().item()
    a, b = (middle(x).clamp(-1, 1).flatten(1) for x in (images, others))
    error = F.mse_loss(a, b).item()
    alike = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))
    return {
        "read_right": right,
        "psnr": 10 * math.log10(4 / max(error, 1e-10)),
        "correlation": alike.mean().item(),
    }


def same_picture(
    models: R2Models, classifier: Classifier, kind: str, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """What `judged` finds of digits of noise `kind` per size, against the first size's."""
    labels = torch.arange(min(args.digits, NOISE_DIGITS)) % 10
    drawn = {
        name: generated(models, labels, size, args, f"{kind} {name}", kind)[0]
        for name, size in ((size_name(size), size) for size in NOISE_SIZES)
    }
    first = drawn[size_name(NOISE_SIZES[0])]
    return {name: judged(classifier, images, labels, first) for name, images in drawn.items()}


def continued(classifier: Classifier, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Digits whose first steps run at a smaller latent, by the step at which the larger goes on.

    Beside what `judged` finds (against the larger latent alone) the seconds per digit. By the
    graphs alone, which is where the change of size is made.
    """
    labels = torch.arange(min(args.digits, NOISE_DIGITS)) % 10
    found: dict[str, dict[str, float]] = {}
    stops = sorted({round(share * args.steps) for share in CONTINUED_FROM})
    for stop in tqdm(stops, desc="continued", unit="size"):
        started = time.perf_counter()
        parts = batches(len(labels), CONTINUED[1])
        images = torch.cat([continued_at(labels, part, stop, args) for part in parts])
        seconds = (time.perf_counter() - started) / len(labels)
        if not found:
            whole = images
        measures = judged(classifier, images, labels, whole)
        found[str(stop)] = measures | {"seconds": seconds}
    return found


def continued_at(labels: Tensor, part: slice, stop: int, args: argparse.Namespace) -> Tensor:
    """Images `[B, c, h, w]`: steps up to `stop` at `CONTINUED[0]`, the rest at `CONTINUED[1]`."""
    small, large = CONTINUED
    if 0 < stop < args.steps:
        sizes: dict[str, Any] = {"latent": small, "continue_at": large, "continue_from": stop}
    else:
        sizes = {"latent": small if stop else large}
    wanted = request(labels, part, args) | sizes
    made = args.graphs.generate(**wanted, image=canvas(large, IMAGE_SIDE))
    return torch.from_numpy(made.images)


def draw_scrapes(scrapes: dict[str, dict[str, list[float]]], path: Path) -> None:
    """eps loss over t, a line per condition and size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for size, scrape in scrapes.items():
        for condition, style in (("null", "--"), ("label", "-")):
            axes.plot(scrape["t"], scrape[condition], style, label=f"{size} {condition}")
    axes.set(xlabel="t (0 clean, 1 noise)", ylabel="eps MSE", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with atomic_write(path) as png:
        figure.savefig(png, format="png", dpi=120)


def draw_sheets(models: R2Models, test: Images, args: argparse.Namespace) -> None:
    """Digits at each size, reconstructions under their originals, and latent channels."""
    for size in SHEET_SIZES:
        name = size_name(size)
        images, latents = generated(models, torch.arange(10), size, args, f"sheet {name}")
        sheet = contact_sheet(to_uint8(images.numpy()), 10)
        save_png(args.out / f"digits-{name}.png", sheet, {"size": name})
        if size == (8, 8):
            channels = latents[:4].flatten(0, 1).unsqueeze(1)  # [4·C, 1, H, W]
            large = F.interpolate(channels, scale_factor=4, mode="nearest").clamp(-1, 1)
            tiles = contact_sheet(to_uint8(large.numpy()), latents.shape[1])
            save_png(args.out / "latent-channels.png", tiles, {"size": name})
    rows = [fit(test.pixels[:10], IMAGE_SIDE, IMAGE_SIDE, test.pad)]
    rows += [
        models.r2ir.decode(models.r2ir.encode(rows[0], size), (IMAGE_SIDE, IMAGE_SIDE))
        for size in ((4, 4), (8, 8), (16, 16))
    ]
    sheet = contact_sheet(to_uint8(torch.cat(rows).numpy()), 10)
    save_png(args.out / "reconstructions.png", sheet, {"rows": "original, 4x4, 8x8, 16x16"})


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Measure and draw everything, the report growing with each part."""
    test = load_mnist(args.data, "t10k")
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = checkpoint.load(args.checkpoint)
    args.steps = args.steps or SOLVERS[args.solver].steps
    models, limit = loaded.models, min(args.images, len(test))
    args.graphs = open_graphs(args, loaded.sha256)
    settings = {
        "checkpoint": loaded.sha256,
        "drawn_by": f"graphs in {args.precision}" if args.graphs else "PyTorch",
        "solver": args.solver,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "noise": COHERENT,
        "digits_per_size": args.digits,
        "test_images": limit,
    }
    report = Measures(args.out / "report.json", settings)
    for size in RECONSTRUCTION_SIZES:
        error = partial(reconstruction, models, test, size, limit)
        report.take("reconstruction_mse", size_name(size), error)
    for size in SCRAPE_SIZES:
        scrape = partial(t_scrape, models, test, size, min(limit, 500))
        report.take("eps_mse_over_t", size_name(size), scrape)
    draw_scrapes(report.found["eps_mse_over_t"], args.out / "eps-over-t.png")
    draw_sheets(models, test, args)
    with torch.inference_mode(False), torch.enable_grad():
        train = load_mnist(args.data)
        classifier = trained_classifier(train, args.out / "classifier.safetensors")
    report.take("classifier_accuracy", "test_images", partial(accuracy, classifier, test))
    for size in GENERATION_SIZES:
        share = partial(digits_read, models, classifier, size, args)
        report.take("digits_read_right", size_name(size), share)
    for kind in KINDS:
        report.take("same_picture", kind, partial(same_picture, models, classifier, kind, args))
    if args.graphs:
        names = " then ".join(map(size_name, CONTINUED))
        report.take("continued", names, partial(continued, classifier, args))
    print_report(report.found)
    print(f"report and pictures: {args.out}")


def print_report(report: dict[str, Any]) -> None:
    """The report's tables."""
    settings, accuracy = report["settings"], report["classifier_accuracy"]["test_images"]
    print(f"\nR2IR reconstruction, {settings['test_images']} test images")
    for size, error in report["reconstruction_mse"].items():
        print(f"  {size:>6}  MSE {error:.4f}")
    print(
        f"digits read right, {settings['digits_per_size']} a size, {settings['steps']} steps of "
        f"{settings['solver']}, "
        f"guidance {settings['guidance_scale']:g}, by {settings['drawn_by']} "
        f"(test images: {accuracy:.1%})"
    )
    for size, share in report["digits_read_right"].items():
        print(f"  {size:>6}  {share:.1%}")
    print(f"likeness to the digits of the same seeds at {size_name(NOISE_SIZES[0])}")
    for kind, sizes in report["same_picture"].items():
        for size, found in sizes.items():
            print(f"  {size:>6}  {kind:11}  {likeness(found)}")
    for sizes, stops in report.get("continued", {}).items():
        print(f"steps at the first of {sizes}, and likeness to the second alone")
        for stop, found in stops.items():
            print(f"  {stop:>6}  {likeness(found)}, {found['seconds']:.3f} s a digit")


def likeness(found: dict[str, float]) -> str:
    return (
        f"correlation {found['correlation']:.3f}, PSNR {found['psnr']:.1f} dB, "
        f"{found['read_right']:.1%} read right"
    )


def main() -> None:
    """The command line."""
    p = cli.parser("reference.evaluate", __doc__)
    p.add_argument("--checkpoint", type=Path, default=SHIPPED)
    p.add_argument("--bundle", type=Path, help="draw the digits with this bundle's graphs")
    p.add_argument("--precision", default="fp32", help="of the bundle's graphs (fp32)")
    p.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    p.add_argument("--out", type=Path, default=Path("build/evaluation"))
    p.add_argument("--images", type=cli.number(10, 10_000, int), default=10_000)
    p.add_argument("--digits", type=cli.number(10, 100_000, int), default=500, help="per size")
    p.add_argument("--solver", choices=tuple(SOLVERS), default=SOLVER)
    p.add_argument("--steps", type=cli.number(1, 10_000, int), help="evaluations (the solver's)")
    p.add_argument("--guidance", type=cli.number(-100, 100), default=2.0)
    cli.run(evaluate, p)


if __name__ == "__main__":
    main()
