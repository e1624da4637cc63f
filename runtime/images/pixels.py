"""Images: [-1, 1] arrays ↔ files with metadata, and contact sheets."""

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write, open_file
from runtime.errors import ArtefactError
from runtime.images import formats
from runtime.images.png import PngWriter, Rows

SHEET_GAP = 2  # pixels between the images of a contact sheet
SHEET_GROUND = 64  # their grey


def to_uint8(pixels: NDArray[np.float32]) -> Rows:
    """Pixels `[.., c, h, w]` in [-1, 1] -> uint8 `[.., h, w, c]`, rounded and clipped."""
    scaled = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.moveaxis(scaled, -3, -1)


def psnr(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], clipped to it; 200 where all agree."""
    error = np.mean(np.square(np.clip(found, -1, 1) - np.clip(wanted, -1, 1), dtype=np.float64))
    return 10 * math.log10(4 / max(float(error), 4e-20))


def resized(
    values: NDArray[np.float32], size: tuple[int, int], box: bool = False
) -> NDArray[np.float32]:
    """`[.., h, w]` -> `[.., *size]` by Pillow's bicubic filter, or the mean of what each covers.

    Both take all of a larger picture into account. The same array where it has that size.
    """
    from PIL import Image

    if values.shape[-2:] == size:
        return values
    kind = Image.Resampling.BOX if box else Image.Resampling.BICUBIC
    maps = [
        np.asarray(Image.fromarray(own).resize((size[1], size[0]), kind))
        for own in values.astype(np.float32).reshape(-1, *values.shape[-2:])
    ]
    return np.stack(maps).reshape(*values.shape[:-2], *size)


def contact_sheet(images: Rows, columns: int) -> Rows:
    """`[B, h, w, c]` -> one image of `columns` columns with a thin grid between."""
    return np.concatenate([*sheet_rows([[image] for image in images], columns)])


def sheet_rows(images: Sequence[Iterable[Rows]], columns: int) -> Iterator[Rows]:
    """A contact sheet from the top down, of images that come in bands `[n, w, c]` alike.

    Only the bands side by side are in memory; a single image is its own sheet.
    """
    columns = min(columns, len(images))
    for start in range(0, len(images), columns):
        gap = SHEET_GAP if start else 0
        for bands in zip(*images[start : start + columns], strict=True):
            height, width, channels = bands[0].shape
            shape = (gap + height, columns * (width + SHEET_GAP) - SHEET_GAP, channels)
            line = np.full(shape, SHEET_GROUND, np.uint8)
            for column, band in enumerate(bands):
                left = column * (width + SHEET_GAP)
                line[gap:, left : left + width] = band
            yield line
            gap = 0


def sheet_size(count: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a sheet of `count` images of `size`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    height, width = (side + SHEET_GAP for side in size)
    return rows * height - SHEET_GAP, columns * width - SHEET_GAP


def save_png(path: Path, image: Rows, metadata: dict[str, Any]) -> None:
    """Write `[h, w, c]` (1 or 3 channels) with `metadata` as JSON text; whole or not at all."""
    save_rows(path, [image], image.shape, metadata)


def png_bytes(image: Rows) -> bytes:
    """`[h, w, c]` (1 or 3 channels) as a PNG without metadata."""
    file = io.BytesIO()
    height, width, channels = image.shape
    png = PngWriter(file, height, width, channels, {})
    png.write(image)
    png.close()
    return file.getvalue()


def save_rows(
    path: Path,
    bands: Iterable[Rows],
    shape: tuple[int, ...],
    metadata: dict[str, Any],
    quality: int | None = None,
) -> bool:
    """Write an image `[h, w, c]` that comes in bands `[n, w, c]`, as its name's end says.

    See `formats.write` for `quality`, and for what is given back.
    """
    with atomic_write(path) as file:
        return formats.write(file, path.suffix, bands, shape, json.dumps(metadata), quality)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_rows` was given; raises ArtefactError for a picture without it."""
    with open_file(path, "an image", "Give the path of an image file") as file:
        text = formats.text_of(path, file)
    try:
        metadata = msgspec.json.decode(text) if text is not None else None
    except (msgspec.DecodeError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ArtefactError(
            f"{path}: holds no {formats.METADATA_KEY!r} metadata; expected a picture made by "
            "runtime.generate"
        )
    return metadata
