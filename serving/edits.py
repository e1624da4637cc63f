"""Pictures that clients send to be edited, out of their bytes: no request names a file."""

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import parsing, sha256
from runtime.edited import BLACK
from runtime.errors import ArtefactError, UsageError
from runtime.images.picture import WHITE, ImageFile, opened, transparent, with_alpha
from runtime.images.pixels import png_bytes
from serving.errors import ApiError
from serving.limits import Limits

# What is handed on to a decoder at all: among what Pillow reads are formats that run programs.
KINDS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WebP": b"RIFF"}


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture, what of it is drawn anew and how strongly, as `Request` takes them.

    pixels: `init` float32 `[1, c, h, w]` and perhaps `mask` `[1, 1, h, w]`; hashes: SHA-256 of
    their files, by the same names.
    """

    pixels: dict[str, NDArray[np.float32]]
    hashes: dict[str, str]
    strength: float | None = None
    seam: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What a picture's metadata says of the edit."""
        return self.hashes | {"strength": self.strength, "seam": self.seam, "ground": WHITE}


def read_edit(
    image: bytes,
    mask: bytes | None,
    channels: int,
    limits: Limits,
    strength: float | None = None,
    seam: int | None = None,
    alpha: bool = True,
) -> Edit:
    """An edit of a model with so many channels; raises ApiError for what cannot be read.

    `alpha`: a mask with transparency is drawn anew where it is transparent, as OpenAI has it; any
    other is where it is white.
    """
    pixels = {"init": decoded("image", image, channels, limits)}
    hashes = {"init": sha256(image)}
    if mask is not None:
        pixels["mask"] = (decoded("mask", mask, 1, limits) + 1) / np.float32(2)
        hashes["mask"] = sha256(mask)
        if alpha and (clear := transparency(mask)) is not None:
            pixels["mask"] = clear[None, None].astype(np.float32) / np.float32(255)
            hashes["mask"] = sha256(png_bytes(clear[..., None]))
    return Edit(pixels, hashes, strength, seam)


def decoded(name: str, data: bytes, channels: int, limits: Limits) -> NDArray[np.float32]:
    """Pixels `[1, c, h, w]` in [-1, 1] of a file's bytes; raises ApiError, naming the field."""
    if not data.startswith(tuple(KINDS.values())):
        raise ApiError(400, "invalid_image", f"{name} is no {', '.join(KINDS)}; expected one")
    try:
        with ImageFile(Path(name), channels, BLACK if name == "mask" else WHITE, data) as image:
            limits.check_pixels(name, image.size)
            return image.whole()
    except ArtefactError as error:
        raise ApiError(400, "invalid_image", str(error)) from None


def transparency(data: bytes) -> NDArray[np.uint8] | None:
    """How transparent a picture is, uint8 `[h, w]`; None where it is opaque, alpha or not.

    Raises ApiError for one whose pixels are damaged.
    """
    try:
        with parsing(Path("mask"), "picture", "Save it again"):
            picture = opened(io.BytesIO(data))
            if not transparent(picture):
                return None
            clear = 255 - np.asarray(with_alpha(picture).getchannel("A"))
    except ArtefactError as error:
        raise ApiError(400, "invalid_image", str(error)) from None
    return clear if clear.any() else None


def from_base64(name: str, text: str) -> bytes:
    """The bytes of a field in base64, perhaps as a data URL; raises UsageError."""
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name} is no base64; expected a picture's bytes in it") from None
