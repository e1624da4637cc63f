"""Pixels as the bytes of a file."""

import base64
import io
import json
from typing import Any, Literal

from runtime.images import formats
from runtime.images.pixels import png_bytes
from runtime.images.png import Rows

Format = Literal["png", "jpeg", "webp"]


def encode(
    pixels: Rows, form: Format, metadata: dict[str, Any], quality: int | None = None
) -> bytes:
    """uint8 `[h, w, c]` as a file of a format; `metadata` is what made the picture.

    `quality`: 1 to 100, of what loses.
    """
    file = io.BytesIO()
    formats.write(file, f".{form}", [pixels], pixels.shape, json.dumps(metadata), quality)
    return file.getvalue()


def preview_of(pixels: Rows) -> str:
    """uint8 `[h, w, c]` as a PNG in base64."""
    return base64_of(png_bytes(pixels))


def base64_of(data: bytes) -> str:
    """Bytes as JSON can hold them."""
    return base64.b64encode(data).decode()
