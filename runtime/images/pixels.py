"""Images: [-1, 1] arrays ↔ PNG files with metadata, and contact sheets."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write, open_file
from runtime.errors import ArtefactError, UsageError
from runtime.images.png import PngWriter, Rows, open_rows, read_text

METADATA_KEY = "r2"
SHEET_GAP = 2  # pixels between the images of a contact sheet
SHEET_GROUND = 64  # their grey


def to_uint8(pixels: NDArray[np.float32]) -> Rows:
    """Pixels `[.., c, h, w]` in [-1, 1] -> uint8 `[.., h, w, c]`, rounded and clipped."""
    scaled = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.moveaxis(scaled, -3, -1)


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
    path: Path, bands: Iterable[Rows], shape: tuple[int, ...], metadata: dict[str, Any]
) -> None:
    """Write an image `[h, w, c]` that comes in bands `[n, w, c]`; see `save_png`."""
    height, width, channels = shape
    with atomic_write(path) as file:
        png = PngWriter(file, height, width, channels, {METADATA_KEY: json.dumps(metadata)})
        for band in bands:
            png.write(band)
        png.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_png` was given; raises ArtefactError for a PNG without it."""
    with open_file(path, "an image", "Give the path of an image file") as file:
        text = read_text(path, file, METADATA_KEY)
    try:
        metadata = msgspec.json.decode(text) if text is not None else None
    except (msgspec.DecodeError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ArtefactError(
            f"{path}: holds no {METADATA_KEY!r} metadata; expected a PNG made by runtime.generate"
        )
    return metadata


class ImageFile:
    """An image file as the pixels of a model: windows of it, float32 in [-1, 1].

    A PNG of 8 bits, grey or RGB, is read row by row and never held whole, nor is a `.npy` file
    (uint8 `[h, w, c]`); what Pillow reads is held as bytes. Windows come from the top down.
    """

    def __init__(self, path: Path, channels: int):
        """Raises UsageError where images cannot have `channels`, ArtefactError for a bad file."""
        if channels not in (1, 3):
            raise UsageError(f"the model has {channels} colour channels; image files have 1 or 3")
        self.path, self.channels = path, channels
        self._file = open_file(path, "an image", "Give the path of an image file")
        self._rows = open_rows(path, self._file)
        self._top = 0  # of the band, which is all of an image that is not read by rows
        self._band = self._rows.read(0) if self._rows else _open(path, self._file)
        height, width = self._rows.size if self._rows else self._band.shape[:2]
        self.size = (height, width)

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __call__(self, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """Pixels `[1, c, height, width]` of a window not above the last one."""
        if self._rows is not None:
            missing = top + height - (self._top + len(self._band))
            if missing > 0:
                self._band = np.concatenate([self._band, self._rows.read(missing)])
            self._top, self._band = top, self._band[top - self._top :]
        band = self._band[top - self._top :][:height]
        own = recoloured(band[:, left : left + width], self.channels).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(own, -1, 0)[None] / np.float32(127.5) - 1)


def recoloured(rows: Rows, channels: int) -> Rows:
    """Grey or RGB `[.., c]` as `channels`; grey is ITU-R 601's luma, as Pillow rounds it."""
    if rows.shape[-1] == channels:
        return rows
    if channels == 3:
        return rows.repeat(3, -1)
    luma = rows.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def _open(path: Path, file: IO[bytes]) -> Rows:
    """A whole image, uint8 `[h, w, 1 or 3]`."""
    if path.suffix == ".npy":
        return _mapped(path)
    from PIL import Image

    try:
        picture = Image.open(file)
        grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
        pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtefactError(f"{path}: cannot be read as an image ({error})") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _mapped(path: Path) -> Rows:
    try:
        array: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtefactError(f"{path}: cannot be read as an array ({error})") from None
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ArtefactError(
            f"{path}: {array.dtype} {array.shape}; expected uint8 [height, width, 1 or 3]"
        )
    return array
