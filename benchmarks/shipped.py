"""A shipped model at the sizes that it is compared at: its digits' sizes, and what one costs.

Nothing here imports PyTorch before it is needed: a picture's process has none in its memory.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.interface import Interface, Size
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.memory import peak_resident
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.sampling.request import Request

LEAST = 20  # digits of a size
LONG = 20.0  # seconds of a first picture beyond which what it does once counts little
SCALE = 2.0  # of guidance


@dataclass(frozen=True)
class Case:
    """A size: how many times the trained height and width."""

    name: str
    height: float
    width: float

    @property
    def area(self) -> float:
        return self.height * self.width

    def asked(self, interface: Interface) -> Size:
        """The image's size."""
        height, width = interface.image_size(interface.default_latent)
        return round(height * self.height), round(width * self.width)

    def sizes(self, interface: Interface) -> tuple[Size, Size]:
        """The latent and the image that are drawn: as asked, or the nearest legal ones."""
        asked = self.asked(interface)
        latent = interface.latent_size(asked)
        return latent, asked if interface.decoupled else latent

    def digits(self, count: int) -> int:
        """How many digits are judged, where `count` are at the trained size."""
        return max(min(LEAST, count), int(count / max(1.0, self.area)) // 10 * 10)


TRAINED, TWICE = Case("1", 1, 1), Case("2", 2, 2)
ASPECTS = ((2, 3), (3, 2), (9, 16), (16, 9))
SQUARES = (
    Case("½", 0.5, 0.5),
    TRAINED,
    Case("1½", 1.5, 1.5),
    TWICE,
    Case("4", 4, 4),
    Case("8", 8, 8),
)
WIDE = tuple(Case(f"{h}:{w}", math.sqrt(h / w), math.sqrt(w / h)) for h, w in ASPECTS)
CASES = {case.name: case for case in (*SQUARES, *WIDE)}
QUICK = ("½", "1", "1½", "2", "2:3", "16:9")


@dataclass(frozen=True)
class Model:
    """A checkpoint and its bundle."""

    name: str
    checkpoint: Path
    bundle: Path
    options: EngineOptions

    @cached_property
    def opened(self) -> Bundle:
        return open_bundle(self.bundle, self.options)

    @property
    def interface(self) -> Interface:
        return self.opened.interface

    @cached_property
    def loaded(self) -> Any:
        """The checkpoint; raises UsageError where the bundle was made of another."""
        from reference import checkpoint

        loaded = checkpoint.load(self.checkpoint)
        source = self.opened.manifest.checkpoint
        if source is None or source.sha256 != loaded.sha256:
            raise UsageError(
                f"{self.bundle}: not made of {self.checkpoint}. Make it again with: python -m "
                f"export --checkpoint {self.checkpoint} --out {self.bundle}"
            )
        return loaded

    @property
    def side(self) -> int:
        """Pixels a side of a digit's picture in training, of those that the classifier reads."""
        from reference.classifier import IMAGE_SIDE
        from reference.provenance import picture_side

        return min(picture_side(self.loaded.provenance) or IMAGE_SIDE, IMAGE_SIDE)

    def about(self) -> dict[str, Any]:
        """What does not depend on a size."""
        models = self.loaded.models
        return {
            "family": self.loaded.family.name,
            "sha256": self.loaded.sha256,
            "parameters": sum(p.numel() for p in models.parameters()),
            "bytes": self.checkpoint.stat().st_size,
        }

    def flops(self, case: Case, steps: int) -> int:
        """Products of the reference's guided evaluations and of its decode, for one picture."""
        import torch

        from benchmarks.contenders import count_flops

        models, (latent, image) = self.loaded.models, case.sizes(self.interface)
        labels = torch.zeros(2, 1, len(self.interface.labels))
        labels[1, 0, 0] = 1
        denoise = models.denoiser(labels, np.array([0.5]))
        x = torch.zeros(1, self.interface.latent_channels, *latent)
        found = steps * count_flops(lambda x: denoise(x, 0), {"x": x})
        if self.interface.decoupled:
            found += count_flops(lambda x: models.r2ir.decode(x, image), {"x": x})
        return found


def picture(
    bundle: Path, options: EngineOptions, latent: Size, image: Size, solver: str, steps: int
) -> Iterator[dict[str, float]]:
    """Seconds and peak bytes of one guided picture; for a process of its own."""
    opened = open_bundle(bundle, options)
    for seed in (0, 1):
        start = time.perf_counter()
        own = Request([0], latent, image, steps, SCALE, seed=seed, solver=solver)
        opened.check(own)
        opened.decode(opened.diffuse(own), image)
        seconds = time.perf_counter() - start
        if seconds > LONG:
            break
    yield {"seconds": seconds, "peak_bytes": peak_resident()}
