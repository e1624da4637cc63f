"""What all endpoints share: the loaded models, the queue, what was drawn and can be fetched."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from runtime.images.png import Rows
from serving.asked import Asked
from serving.encode import Format, encode
from serving.jobs import Job, Workshop
from serving.limits import Limits
from serving.metrics import Metrics
from serving.pictures import Model, Picture, write_size

KEPT_BYTES, KEPT_SECONDS = 64 << 20, 3600.0


class Shelf:
    """Files that clients fetch by an address that nobody can guess; the oldest go first."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes, kind: str) -> str:
        """Keep a file of a media type; gives its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind.partition('/')[2]}"
        self._files[name] = time.monotonic(), data, kind
        self._bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A file and its media type; None where it was dropped, or never was."""
        self._forget()
        found = self._files.get(name)
        return None if found is None else found[1:]

    def _forget(self) -> None:
        old = time.monotonic() - KEPT_SECONDS
        while self._files:
            name, (since, data, _) = next(iter(self._files.items()))
            if since > old and (self._bytes <= KEPT_BYTES or len(self._files) == 1):
                break
            del self._files[name]
            self._bytes -= len(data)


class Service:
    """Models by name, limits, and the workshop that draws."""

    def __init__(self, models: Sequence[Model], limits: Limits, workers: int = 1):
        self.models = {model.name: model for model in models}
        self.limits, self.metrics, self.shelf = limits, Metrics(), Shelf()
        self.workshop = Workshop(limits, self.metrics, workers)
        self.begun = int(time.time())

    def submit(self, asked: Asked, previews: int = 0) -> Job:
        """Check what is asked for and queue it; raises UsageError and ApiError."""
        job = Job(asked.pictures(self.models, self.limits), self.limits.seconds, previews)
        self.workshop.submit(job)
        return job

    def file(
        self, pixels: Rows, picture: Picture, form: Format = "png", quality: int | None = None
    ) -> bytes:
        """A drawn picture with what it takes to draw it again."""
        with self.metrics.seconds.labels("encode").time():
            return encode(pixels, form, picture.metadata, quality)

    def described(self, name: str) -> dict[str, Any]:
        """A model as `GET /v1/models` lists it, with what a page needs to know of it."""
        interface = self.models[name].interface
        latent, sides = interface.default_latent, interface.latent_sides
        return {
            "id": name,
            "object": "model",
            "created": self.begun,
            "owned_by": "local",
            "labels": interface.labels,
            "parts": interface.parts or [len(interface.labels)],
            "decoupled": interface.decoupled,
            "latent": write_size(latent),
            "size": write_size(interface.image_size(latent)),
            "pixels_per_latent": interface.pixels_per_latent,
            "latent_sides": [sides.minimum, sides.maximum, sides.multiple],
            "guidance_scale": interface.guidance_scale,
            "trained": msgspec.to_builtins(interface.trained),
            "color_channels": interface.color_channels,
            "limits": asdict(self.limits),
        }
