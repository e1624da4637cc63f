"""What pictures are asked for, by bundles' names, and how they are drawn together.

Sizes are (height, width) everywhere; HTTP's WIDTHxHEIGHT is read and written here alone.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.errors import StoppedError, UsageError
from runtime.generate import DEFAULTS, describe, resolve, settings
from runtime.images.png import Rows
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.diffuser import OnStep
from runtime.render import Drawing
from runtime.sampling.labels import Label, Labels
from runtime.sampling.request import Request
from serving.edits import Edit

# Latent cells that are diffused at once: beyond these a step's products fill a processor's caches
# by themselves, and a batch is no faster than one picture after another; see docs/serving.md.
BATCH_CELLS = 512
SIZE = re.compile(r"(\d{1,7})x(\d{1,7})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # a file's or folder's on any system


def read_size(name: str, text: str) -> Size:
    """WIDTHxHEIGHT, as HTTP's clients write sizes, as (height, width); raises UsageError."""
    match = SIZE.fullmatch(text.strip().lower())
    if not match or 0 in (size := (int(match[2]), int(match[1]))):
        raise UsageError(f"{name} is {text!r}; expected WIDTHxHEIGHT, as in 512x256, or auto")
    return size


def write_size(size: Size) -> str:
    """(height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def check_name(what: str, name: str) -> None:
    """Raise UsageError for what, as the name of a file or folder, some system would refuse."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{what} is {name!r}; expected up to 100 of A-Z a-z 0-9 . _ -, a letter or digit first"
        )


@dataclass(frozen=True)
class Settings:
    """What pictures of one batch share, image aside; `spacing` is the solver's own."""

    latent: Size
    image: Size
    steps: int
    guidance_scale: float
    eta: float = 0.0
    solver: str = DEFAULTS["solver"]
    noise: str = DEFAULTS["noise"]
    edit: Edit | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a bundle: its label by numbers, and (seed, index) of its noise."""

    model: "Model"
    settings: Settings
    label: Label
    seed: int
    index: int

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The request as `runtime.generate` writes it into a PNG."""
        own = self.settings
        wanted = DEFAULTS | {
            "label": [self.label],
            "latent": own.latent,
            "image": own.image,
            "steps": own.steps,
            "guidance": own.guidance_scale,
            "eta": own.eta,
            "solver": own.solver,
            "noise": own.noise,
            "seed": self.seed,
            "first_index": self.index,
        }
        if own.edit is not None:
            wanted |= own.edit.recipe
        resolve(self.model.bundle, wanted, self.pixels)
        return wanted

    @property
    def pixels(self) -> dict[str, Any]:
        """What a `Request` takes of an edit."""
        return self.settings.edit.pixels if self.settings.edit else {}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What a PNG of this picture holds."""
        return describe(self.model.bundle, self.recipe)

    @cached_property
    def together(self) -> tuple[Any, ...]:
        """Pictures for which this is equal may be diffused as one batch.

        Among them are as many conditions, since each image of a batch pays for the most that one
        of them has.
        """
        labels = self.model.labels.read(self.label)
        return id(self.model), replace(self.settings, image=self.settings.latent), len(labels)


class Model:
    """A bundle under the name that requests give."""

    def __init__(self, name: str, bundle: Bundle):
        self.name, self.bundle = name, bundle
        self.interface = bundle.interface
        self.labels = Labels(self.interface.labels, self.interface.parts)
        self._most: dict[tuple[Any, ...], int] = {}

    def request(self, pictures: Sequence[Picture]) -> Request:
        """One batch of pictures for which `together` is equal."""
        first = pictures[0]
        keys = [(picture.seed, picture.index) for picture in pictures]
        labels = [picture.label for picture in pictures]
        return Request(labels, **settings(first.recipe), **first.pixels, keys=keys)

    def open(self) -> None:
        """Open the graphs of a picture of default size, so that the first request finds them."""
        with self.bundle.opening(Request([None], self.interface.default_latent)):
            pass

    def check(self, picture: Picture) -> None:
        """Raise UsageError for a picture that the bundle cannot draw."""
        self.bundle.check(self.request([picture]))

    def most(self, picture: Picture, limit: int) -> int:
        """How many pictures like this one are diffused at once, `limit` at most.

        As many as is faster than one by one, and as a plan's profile holds.
        """
        key = picture.together
        if key not in self._most:
            most = max(1, min(limit, BATCH_CELLS // math.prod(picture.settings.latent)))
            while most > 1 and not self._fits([picture] * most):
                most //= 2
            self._most[key] = most
        return self._most[key]

    def _fits(self, pictures: Sequence[Picture]) -> bool:
        try:
            self.bundle.check(self.request(pictures))
        except UsageError:
            return False
        return True

    def diffuse(self, pictures: Sequence[Picture], on_step: OnStep) -> NDArray[np.float32]:
        """The latents `[B, C, H, W]` of a batch; raises StoppedError where `on_step` says so."""
        return self.bundle.diffuse(self.request(pictures), on_step)

    def draw(
        self,
        picture: Picture,
        latent: NDArray[np.float32],
        size: Size,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Rows:
        """A picture's latent `[1, C, H, W]` at a size, as uint8 `[h, w, c]`.

        Raises StoppedError between two bands.
        """
        kept = self.bundle.kept(self.request([picture]), size)
        drawing = Drawing(self.bundle, picture.settings.latent, size, None, False, None, kept)
        bands = []
        for band in drawing.bands(self.bundle.state(latent)):
            if stopped():
                raise StoppedError("stopped while the picture was decoded")
            bands.append(band)
        return np.concatenate(bands)


def batches(pictures: Sequence[Picture], limit: int) -> Iterator[list[Picture]]:
    """Neighbours that are diffused together, in their order; `limit` at most."""
    for _, group in groupby(pictures, lambda picture: picture.together):
        alike = [*group]
        most = alike[0].model.most(alike[0], limit)
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def preview_steps(steps: int, previews: int) -> set[int]:
    """The steps after which a picture of so many is previewed."""
    return {round(steps * i / (previews + 1)) for i in range(1, previews + 1)}


def preview_size(picture: Picture) -> Size:
    """The size of a picture's previews: no more pixels than the training's ratio has."""
    height, width = picture.settings.image
    trained = picture.model.interface.image_size(picture.settings.latent)
    return min(height, trained[0]), min(width, trained[1])
