"""Pixels as the bytes of a file."""

import base64
from typing import Any, Literal

from runtime.images.pixels import png_bytes
from runtime.images.png import Rows

Format = Literal["png", "jpeg", "webp"]


def encode(pixels: Rows, form: Format, metadata: dict[str, Any] | None = None) -> bytes:
    """uint8 `[h, w, c]` as a file of a format; `metadata` is what made the picture."""
    return png_bytes(pixels, metadata)


def base64_of(data: bytes) -> str:
    """Bytes as JSON can hold them."""
    return base64.b64encode(data).decode()
