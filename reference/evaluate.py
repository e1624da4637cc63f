"""Measure and draw a checkpoint: python -m reference.evaluate --data DIR --out build/evaluation.

Writes `report.json` and pictures: reconstruction error per latent size, eps loss over t, sheets
over sizes and aspect ratios, latent channels, and the share of generated digits that a small
classifier reads as the label that was asked for.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from tqdm import tqdm

from reference import checkpoint
from reference.checkpoint import Models
from reference.data import Images, fit, load_mnist
from reference.train import canvas
from runtime import cli, ddim, schedule
from runtime.files import atomic_write, sha256
from runtime.images import contact_sheet, save_png, to_uint8
from runtime.noise import NoiseStreams

SHIPPED = Path(__file__).parent / "weights" / "mnist.safetensors"
IMAGE_SIDE = 32  # shorter side of every decoded image
RECONSTRUCTION_SIZES = ((4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (6, 9), (16, 9))
GENERATION_SIZES = (
    *((8, 8), (4, 4), (6, 6), (12, 12), (16, 16)),
    *((9, 6), (6, 9), (16, 9), (9, 16)),
)
SHEET_SIZES = ((4, 4), (8, 8), (16, 16), (9, 6), (6, 9), (16, 9), (9, 16), (24, 24))
SCRAPE_POINTS = 20
CLASSIFIER_STEPS = 1500
TOKENS_AT_ONCE = 4000
SEED = 1234

Size = tuple[int, int]


class Classifier(nn.Module):
    """Reads a 32 × 32 digit in [-1, 1]: three convolutions, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        head = [nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1, 32, 32]` -> logits `[B, 10]`."""
        logits: Tensor = self.layers(x)
        return logits


def trained_classifier(train: Images, cache: Path) -> Classifier:
    """The classifier, from `cache` where this code and data have made it before."""
    torch.manual_seed(SEED)
    model = Classifier()
    fingerprint = sha256(f"{model} {CLASSIFIER_STEPS} {len(train)}".encode())
    if cache.exists():
        data = cache.read_bytes()
        if checkpoint.read_metadata(data, cache).get("fingerprint") == fingerprint:
            model.load_state_dict(load_safetensors(data))
            return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=CLASSIFIER_STEPS)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="classifier", unit="step"):
        chosen = torch.randint(len(train), (128,))
        loss = F.cross_entropy(model(augmented(train.pixels[chosen])), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with atomic_write(cache) as file:
        file.write(save_safetensors(model.state_dict(), {"fingerprint": fingerprint}))
    return model.eval()


def augmented(pixels: Tensor) -> Tensor:
    """uint8 digits slightly shifted, scaled and turned: `[B, 1, 32, 32]` in [-1, 1]."""
    x = fit(pixels, IMAGE_SIDE, IMAGE_SIDE, pad=True)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1) + 0.1 * torch.randn(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # what comes in is ground


def middle(images: Tensor) -> Tensor:
    """The middle square of `[B, c, h, w]`, whose side is the shorter one."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def batches(count: int, size: Size) -> list[slice]:
    """Slices whose tokens at a latent size fit in a processor's cache."""
    step = max(10, TOKENS_AT_ONCE // (size[0] * size[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def reconstruction(models: Models, test: Images, limit: int) -> dict[str, float]:
    """MSE of images through latents of each size and back, at the latent's aspect ratio."""
    errors = {}
    for size in tqdm(RECONSTRUCTION_SIZES, desc="reconstruction", unit="size"):
        shape = canvas(size, IMAGE_SIDE)
        total = 0.0
        for part in batches(limit, (8, 8)):
            images = fit(test.pixels[part], *shape, test.pad)
            found = models.r2ir.decode(models.r2ir.encode(images, size), shape)
            total += F.mse_loss(found, images).item() * len(images)
        errors[name_of(size)] = total / limit
    return errors


def name_of(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def t_scrape(models: Models, test: Images, size: Size, limit: int) -> dict[str, list[float]]:
    """eps MSE over t at latent `size`, under the null and under the true condition."""
    generator = torch.Generator().manual_seed(SEED)
    images = fit(test.pixels[:limit], *canvas(size, IMAGE_SIDE), test.pad)
    latent = models.r2ir.encode(images, size)
    one_hot = F.one_hot(test.labels[:limit], models.config.condition.labels).float()
    text = models.condition(torch.stack([torch.zeros_like(one_hot), one_hot]))
    times = [(i + 0.5) / SCRAPE_POINTS for i in range(SCRAPE_POINTS)]
    found: dict[str, list[float]] = {"t": times, "null": [], "label": []}
    for t in tqdm(times, desc=f"t-scrape {name_of(size)}", unit="t"):
        a = float(schedule.alpha_bar(np.array(t)))
        eps = torch.randn(latent.shape, generator=generator)
        noisy = a**0.5 * latent + (1 - a) ** 0.5 * eps
        null, label = models.r2id(noisy, torch.full((limit,), a), text)
        found["null"].append(F.mse_loss(null, eps).item())
        found["label"].append(F.mse_loss(label, eps).item())
    return found


def generated(
    models: Models, labels: Tensor, size: Size, args: argparse.Namespace, desc: str
) -> tuple[Tensor, Tensor]:
    """One digit per label: images `[B, c, h, w]` of the latent's aspect, latents `[B, C, H, W]`."""
    images, latents = [], []
    one_hot = F.one_hot(labels, models.config.condition.labels).float()
    channels = models.config.r2id.latent_channels
    parts = batches(len(labels), size)
    with tqdm(total=len(parts) * args.steps, desc=desc, unit="step") as bar:
        for part in parts:
            own = one_hot[part]
            streams = NoiseStreams(SEED, range(part.start, part.stop), (channels, *size))
            weights = (1 - args.guidance, args.guidance)
            denoise = models.denoiser(torch.stack([torch.zeros_like(own), own]), args.steps)
            start = torch.from_numpy(streams.draw())
            made = ddim.sample(
                denoise, start, args.steps, weights, on_step=lambda step: bar.update()
            )
            latents.append(made.x)
            images.append(models.r2ir.decode(made.x, canvas(size, IMAGE_SIDE)))
    return torch.cat(images), torch.cat(latents)


def digits_read(
    models: Models, classifier: Classifier, args: argparse.Namespace
) -> dict[str, float]:
    """Share of `args.digits` generated digits per latent size that are read as their label."""
    labels = torch.arange(args.digits) % 10
    shares = {}
    for size in GENERATION_SIZES:
        images, _ = generated(models, labels, size, args, f"digits {name_of(size)}")
        shares[name_of(size)] = (read(classifier, images) == labels).float().mean().item()
        tqdm.write(f"  {name_of(size)}: {shares[name_of(size)]:.1%} read right")
    return shares


def read(classifier: Classifier, images: Tensor) -> Tensor:
    """The label that the classifier reads in the middle of each image."""
    square = F.interpolate(middle(images), (IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")
    found: Tensor = classifier(square).argmax(1)
    return found


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


def draw_sheets(models: Models, test: Images, args: argparse.Namespace) -> None:
    """Digits at each size, reconstructions under their originals, and latent channels."""
    for size in SHEET_SIZES:
        name = name_of(size)
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
    """Measure everything, then write the report."""
    test = load_mnist(args.data, "t10k")
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = checkpoint.load(args.checkpoint)
    models, limit = loaded.models, min(args.images, len(test))
    report: dict[str, Any] = {
        "checkpoint": loaded.sha256,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "digits_per_size": args.digits,
        "test_images": limit,
    }
    report["reconstruction_mse"] = reconstruction(models, test, limit)
    scrapes = {
        name_of(size): t_scrape(models, test, size, min(limit, 500)) for size in ((4, 4), (8, 8))
    }
    report["eps_mse_over_t"] = scrapes
    draw_scrapes(scrapes, args.out / "eps-over-t.png")
    draw_sheets(models, test, args)
    with torch.inference_mode(False), torch.enable_grad():
        train = load_mnist(args.data)
        classifier = trained_classifier(train, args.out / "classifier.safetensors")
    square = fit(test.pixels, IMAGE_SIDE, IMAGE_SIDE, test.pad)
    right = read(classifier, square) == test.labels
    report["classifier_accuracy"] = right.float().mean().item()
    report["digits_read_right"] = digits_read(models, classifier, args)
    with atomic_write(args.out / "report.json") as file:
        file.write(json.dumps(report, indent=1).encode() + b"\n")
    print_report(report)
    print(f"report and pictures: {args.out}")


def print_report(report: dict[str, Any]) -> None:
    """The report's two tables."""
    print(f"\nR2IR reconstruction, {report['test_images']} test images")
    for size, error in report["reconstruction_mse"].items():
        print(f"  {size:>6}  MSE {error:.4f}")
    print(
        f"digits read right, {report['digits_per_size']} a size, {report['steps']} steps, guidance "
        f"{report['guidance_scale']:g} (test images: {report['classifier_accuracy']:.1%})"
    )
    for size, share in report["digits_read_right"].items():
        print(f"  {size:>6}  {share:.1%}")


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m reference.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--checkpoint", type=Path, default=SHIPPED)
    p.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    p.add_argument("--out", type=Path, default=Path("build/evaluation"))
    p.add_argument("--images", type=cli.number(10, 10_000, int), default=10_000)
    p.add_argument("--digits", type=cli.number(10, 100_000, int), default=500, help="per size")
    p.add_argument("--steps", type=cli.number(1, 10_000, int), default=50, help="DDIM steps")
    p.add_argument("--guidance", type=cli.number(-100, 100), default=2.0)
    cli.run(evaluate, p)


if __name__ == "__main__":
    main()
