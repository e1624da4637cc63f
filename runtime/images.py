"""Images: [-1, 1] arrays ↔ PNG files with metadata, and contact sheets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ArtefactError, UsageError
from runtime.files import atomic_write, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA_KEY = "r2"
SHEET_GAP = 2  # pixels between the images of a contact sheet
SHEET_GROUND = 64  # their grey


def to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels `[.., c, h, w]` in [-1, 1] -> uint8 `[.., h, w, c]`, rounded and clipped."""
    scaled = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.moveaxis(scaled, -3, -1)


def contact_sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """`[B, h, w, c]` -> one image of `columns` columns with a thin grid between."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    step_y, step_x = height + SHEET_GAP, width + SHEET_GAP
    shape = (rows * step_y - SHEET_GAP, columns * step_x - SHEET_GAP, channels)
    sheet = np.full(shape, SHEET_GROUND, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * step_y, index % columns * step_x
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: Path, image: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
    """Write `[h, w, c]` (1 or 3 channels) with `metadata` as JSON text; whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(METADATA_KEY, json.dumps(metadata))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=text)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_png` was given; raises ArtefactError for a PNG without it."""
    picture = _open(path)
    text = picture.info.get(METADATA_KEY)
    try:
        metadata = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ArtefactError(
            f"{path}: holds no {METADATA_KEY!r} metadata; expected a PNG made by runtime.generate"
        )
    return metadata


def load_pixels(path: Path, channels: int) -> NDArray[np.float32]:
    """An image file as `[1, c, h, w]` in [-1, 1], grey or RGB as `channels` wants."""
    if channels not in (1, 3):
        raise UsageError(f"the model has {channels} colour channels; image files have 1 or 3")
    picture = _open(path).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, channels)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)[None] / np.float32(127.5) - 1)


def _open(path: Path) -> "Image":
    import io

    from PIL import Image

    data = read_bytes(path, "an image", "Give the path of an image file")
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtefactError(f"{path}: cannot be read as an image ({error})") from None
    return picture
