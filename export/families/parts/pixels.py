"""What families have in common that diffuse pixels: the image is the latent."""

from typing import Any

from torch import Tensor

from runtime.bundle.interface import Interface, Range, Trained
from runtime.bundle.manifest import Axis

LARGEST_SIDE = 65536


def interface(models: Any, labels: tuple[str, ...]) -> Interface:
    """As `export.families.Family` has it: sides by the configuration's multiple and minimum."""
    config = models.config
    shortest, longest = sorted(config.default_size)
    largest = LARGEST_SIDE // config.multiple * config.multiple
    sides = Range(config.minimum, largest, config.multiple)
    return Interface(
        name=config.name,
        color_channels=config.channels,
        latent_channels=config.channels,
        labels=labels or tuple(map(str, range(config.labels))),
        default_latent=config.default_size,
        pixels_per_latent=1,
        latent_sides=sides,
        image_sides=sides,
        decoupled=False,
        trained=Trained(shortest, longest, longest / shortest),
    )


def cells(height: int, width: int) -> tuple[Axis, Axis]:
    """The axes of a grid whose cells are height × width pixels."""
    sides = zip(("height", "width"), (height, width), strict=True)
    tall, wide = (axis if side == 1 else f"{axis}/{side}" for axis, side in sides)
    return tall, wide


def decode(models: Any, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """As `export.families.Family` has it: nothing to decode."""
    return latent.clamp(-1, 1)
