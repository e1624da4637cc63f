"""For the eye: sheets of digits under real ones, one seed at several sizes, curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.classifier import IMAGE_SIDE, middle
from reference.data import Images
from reference.evaluation.curves import Curve
from reference.evaluation.digits import Size, balanced_indices, shown
from reference.evaluation.drawing import Drawing, shape
from reference.families.r2.model import R2Models
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import size_name
from runtime.images.pixels import contact_sheet, save_png, to_uint8

COLUMNS = 10  # a digit each
ROWS = 4  # of drawn digits
SEED_IMAGE = (64, 64)
RECONSTRUCTED = ((4, 4), (8, 8), (16, 16))


@dataclass(frozen=True)
class Sheets:
    """Draws pictures into `folder`, real digits of `test` above the drawn ones."""

    folder: Path
    draw: Drawing
    test: Images

    def real(self, shape: Size) -> Tensor:
        """A row of real digits `[10, c, *shape]`, 0 to 9."""
        return shown(self.test, balanced_indices(self.test)[:COLUMNS], shape)

    def save(self, name: str, images: Tensor, columns: int = COLUMNS, **metadata: str) -> str:
        """Write a PNG and give its name."""
        sheet = contact_sheet(to_uint8(images.numpy()), columns)
        save_png(self.folder / f"{name}.png", sheet, metadata)
        return f"{name}.png"

    def digits(self, latent: Size, image: Size | None = None) -> str:
        """`ROWS` rows of digits; with `image` those of the latents decoded to that size."""
        size = image or shape(self.draw, latent)
        drawn = self.draw(self.draw.labels(ROWS * COLUMNS), latent, size).images
        name = size_name(latent) + (f"-as-{size_name(image)}" if image else "")
        return self.save(f"digits-{name}", torch.cat([self.real(size), drawn]), latent=name)

    def seeds(self, sizes: Sequence[Size]) -> str:
        """A row per latent size, each of the same seeds, real digits above."""
        labels = self.draw.labels(COLUMNS)
        own = SEED_IMAGE if self.draw.decoupled else None
        drawn = [self.draw(labels, size, own).images for size in sizes]
        # Where pixels are diffused, a square of as many pixels for each as it has.
        rows = [F.interpolate(middle(images), SEED_IMAGE, mode="nearest") for images in drawn]
        names = ", ".join(map(size_name, sizes))
        return self.save(
            "one-seed", torch.cat([self.real(SEED_IMAGE), *rows]), rows=f"real, {names}"
        )

    def channels(self, latent: Size = (8, 8)) -> str:
        """The channels of the latents of 0 to 3, a row each."""
        latents = self.draw(self.draw.labels(4), latent).latents
        channels = latents.flatten(0, 1).unsqueeze(1)  # [4·C, 1, H, W]
        large = F.interpolate(channels, scale_factor=4, mode="nearest").clamp(-1, 1)
        return self.save("latent-channels", large, latents.shape[1], latent=size_name(latent))

    def reconstructions(self, models: R2Models) -> str:
        """Real digits and below them what latents of several sizes hold of them."""
        rows = [self.real((IMAGE_SIDE, IMAGE_SIDE))]
        rows += [
            models.r2ir.decode(models.r2ir.encode(rows[0], s), (IMAGE_SIDE,) * 2)
            for s in RECONSTRUCTED
        ]
        names = ", ".join(map(size_name, RECONSTRUCTED))
        return self.save("reconstructions", torch.cat(rows), rows=f"real, {names}")


def save_chart(
    path: Path, curves: Mapping[str, Curve], labels: tuple[str, str], log: str = ""
) -> None:
    """A PNG of lines: of each curve the first list is x, the others are lines of their own.

    `labels` of the axes x and y; `log` names the axes that are logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":")
    for name, curve in curves.items():
        (_, x), *lines = curve.items()
        for (kind, y), style in zip(lines, styles, strict=False):
            axes.plot(x, y, style, label=f"{name} {kind}" if len(lines) > 1 else name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with atomic_write(path) as png:
        figure.savefig(png, format="png", dpi=120)
