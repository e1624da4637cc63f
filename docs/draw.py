"""Draw the README's figures from a bundle: python docs/draw.py BUNDLE FOLDER.

`models.png` shows both models, `noise.png` the pictures of one seed at several sizes.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from runtime import open_bundle
from runtime.bundle.files import atomic_write
from runtime.generate import PREVIEW_STEPS
from runtime.sampling.loop import sample
from runtime.sampling.request import Request

LABEL, LATENT, SEED, STEPS = 7, (8, 8), 4, 50
SHOWN_STEPS = (0, 25, 38, 50)
BOX = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "linewidth": 1.2}
BLUE, ORANGE, INK = "#dbe7f5", "#fbe3cf", "#333333"


def box(axes: Any, x: float, y: float, text: str, color: str, width: float = 1.5) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.28), width, 0.56, facecolor=color, edgecolor=INK, **BOX
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=1)
    )


def picture(axes: Any, image: np.ndarray, x: float, y: float, text: str, side: float = 0.9) -> None:
    height, width = image.shape
    half_w, half_h = side * width / height / 2, side / 2
    extent = (x - half_w, x + half_w, y - half_h, y + half_h)
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, extent=extent, interpolation="nearest")
    axes.text(x, y - half_h - 0.08, text, ha="center", va="top", fontsize=7, color=INK)


def trajectory(pipeline: Any) -> list[np.ndarray]:
    """The latent at the shown steps."""
    request = Request([LABEL], LATENT, steps=STEPS, guidance_scale=3.0, seed=SEED, solver="ddim")
    diffuser = pipeline.diffuser
    table = request.table(diffuser.schedule)
    predict = diffuser.predictor(diffuser.guidance(request, table), LATENT, table)
    seen: list[np.ndarray] = []

    def watch(x: np.ndarray, step: int) -> np.ndarray:
        seen.append(x)
        eps: np.ndarray = predict(x, step)
        return eps

    start = diffuser.noise(request, LATENT).draw()
    seen.append(sample(watch, start, table))
    return [seen[step] for step in SHOWN_STEPS]


def draw(bundle: Path, out: Path) -> None:
    pipeline = open_bundle(bundle)
    latents = trajectory(pipeline)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.7, 10.2), ylim=(-0.85, 4.5), aspect="equal")
    axes.axis("off")

    axes.text(-0.6, 4.3, "R2ID: noise becomes a latent", fontsize=10, weight="bold", va="center")
    for index, (latent, step) in enumerate(zip(latents, SHOWN_STEPS, strict=True)):
        x = 0.1 + 3.2 * index
        shown = np.clip(latent[0, :3].mean(0), -1, 1)
        picture(axes, shown, x, 3.3, f"latent 8 × 8, step {step}")
        if index:
            box(axes, x - 1.6, 3.3, "R2ID\npredicts ε", BLUE)
            arrow(axes, (x - 2.65, 3.3), (x - 2.37, 3.3))
            arrow(axes, (x - 0.82, 3.3), (x - 0.55, 3.3))
    axes.text(5.0, 2.35, "label, t and coordinates go into every step", fontsize=7, ha="center")

    axes.text(
        -0.6,
        1.75,
        "R2IR: one latent becomes an image of any size",
        fontsize=10,
        weight="bold",
        va="center",
    )
    final = latents[-1]
    picture(axes, np.clip(final[0, :3].mean(0), -1, 1), 0.1, 0.75, "latent 8 × 8")
    arrow(axes, (0.65, 0.75), (0.95, 0.75))
    box(axes, 1.75, 0.75, "R2IR\ndecodes", ORANGE)
    arrow(axes, (2.55, 0.75), (2.85, 0.75))
    sizes = ((16, 16, 0.7), (32, 32, 1.0), (256, 256, 1.4), (48, 27, 1.4), (27, 48, 0.85))
    x = 3.4
    for height, width, side in sizes:
        image = pipeline.decode(final, (height, width))[0, 0]
        half = side * width / height / 2
        picture(axes, image, x + half - 0.35, 0.75, f"{height} × {width}", side)
        x += 2 * half + 0.35
    with atomic_write(out) as png:
        figure.savefig(png, format="png", dpi=140)


def draw_noise(bundle: Path, out: Path) -> None:
    """A column per seed; rows of sizes by either kind of noise, and of a change of size."""
    pipeline = open_bundle(bundle)
    square: dict[str, Any] = {"image": (32, 32)}
    coherent = square | {"noise": "coherent"}
    larger = {"latent": (8, 8), "continue_at": (16, 16)}
    rows = [
        *(
            (f"{side} × {side}", {"latent": (side, side)} | square | {"noise": "independent"})
            for side in (8, 12, 16)
        ),
        *((f"{side} × {side}", {"latent": (side, side)} | coherent) for side in (8, 12, 16)),
        ("preview", {"latent": (8, 8), "steps": PREVIEW_STEPS} | coherent),
        ("8 × 8, then\n16 × 16", larger | coherent),
    ]
    figure = Figure(figsize=(8, 0.75 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for row, (name, options) in zip(axes, rows, strict=True):
        images = pipeline.generate(list(range(10)), seed=SEED, **options).images
        padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1)), constant_values=0.0)
        strip = np.concatenate(padded[:, 0], 1)
        row.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        row.set_xticks([])
        row.set_yticks([])
        row.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for first, title in ((0, "--noise independent"), (3, "--noise coherent")):
        axes[first].set_title(title, fontsize=9, loc="left")
    with atomic_write(out) as png:
        figure.savefig(png, format="png", dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]) / "models.png")
    draw_noise(Path(sys.argv[1]), Path(sys.argv[2]) / "noise.png")
