"""What one request may ask of the server; given when it starts."""

import argparse
from dataclasses import dataclass

from runtime import cli
from runtime.bundle.interface import Size, size_name
from runtime.errors import UsageError

# Limits in whole numbers by their option: the name, the most that can be asked for, what it is of.
LIMITS = {
    "--queue": ("queue", 100_000, "pictures that may wait"),
    "--batch": ("batch", 4096, "pictures diffused at once, at most"),
    "--max-images": ("images", 10_000, "pictures of one request"),
    "--max-pixels": ("pixels", 1 << 30, "pixels of a picture"),
    "--max-cells": ("cells", 1 << 24, "latent cells of a picture"),
    "--max-steps": ("steps", 10_000, "steps of a picture"),
}


@dataclass(frozen=True)
class Limits:
    """Bounds of a request: `pixels` and latent `cells` of a picture, `steps`, `images`, `body`.

    `body` is in bytes; `seconds` is the time from a request's arrival to its last picture; `queue`
    is how many pictures may wait; `batch` how many are diffused at once.
    """

    pixels: int = 1 << 22
    cells: int = 1 << 12
    steps: int = 100
    images: int = 16
    body: int = 32_000_000
    seconds: float = 120.0
    queue: int = 64
    batch: int = 8

    def check(self, images: int, image: Size, latent: Size, steps: int) -> None:
        """Raise UsageError, naming the option of the server, for what exceeds a limit."""
        if steps < 1:
            raise UsageError(f"steps is {steps}; expected 1 to {self.steps}")
        found = {
            "--max-images": (f"{images} pictures are asked for", images, self.images),
            "--max-pixels": (f"a picture of {size_name(image)} pixels", _area(image), self.pixels),
            "--max-cells": (f"a latent of {size_name(latent)} cells", _area(latent), self.cells),
            "--max-steps": (f"{steps} steps are asked for", steps, self.steps),
        }
        for option, (what, value, most) in found.items():
            if value > most:
                raise UsageError(
                    f"{what}; expected at most {most} in all. Ask for less, or start the server "
                    f"with a larger {option}"
                )

    def check_pixels(self, name: str, size: Size) -> None:
        """Raise UsageError for a picture that was sent and is larger than one that is drawn."""
        if _area(size) > self.pixels:
            raise UsageError(
                f"{name} has {size_name(size)} pixels; expected at most {self.pixels} in all. Send "
                "a smaller one, or start the server with a larger --max-pixels"
            )


def _area(size: Size) -> int:
    return size[0] * size[1]


def add_limits(parser: argparse.ArgumentParser, *options: str) -> None:
    """These of LIMITS on a command line, with their defaults."""
    for option in options:
        name, most, text = LIMITS[option]
        value = getattr(Limits(), name)
        kind = cli.number(1, most, int)
        parser.add_argument(option, type=kind, default=value, help=f"{text} ({value})")
