"""What a picture's file is, by the end of its name: PNG in rows, JPEG and WebP whole by Pillow.

PNG keeps its metadata in a text chunk, the others in EXIF's UserComment (Exif 2.3, 4.6.5).
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from runtime.bundle.interface import Size, size_name
from runtime.errors import UsageError
from runtime.images.picture import MOST_HELD, readable
from runtime.images.png import SIGNATURE, PngWriter, Rows, read_text, write_beside

METADATA_KEY = "r2"  # of a PNG's text
QUALITY = 90  # of what loses, where none is asked for
LOSSLESS = 100  # the quality from which WebP loses nothing
COMMENT = b"ASCII\0\0\0"  # what a UserComment begins with


class Format(NamedTuple):
    """A kind of file as Pillow names it; pixels along a side and bytes of EXIF that it can hold."""

    name: str
    longest: int
    exif: int


JPEG, WEBP = Format("JPEG", 65500, 65533), Format("WEBP", 16383, 1 << 30)
WHOLE = {".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP}
SUFFIXES = (".png", *WHOLE)


def check_size(path: Path, size: Size) -> None:
    """Raise UsageError where a file of this name cannot hold a picture of `size`."""
    kind = WHOLE.get(path.suffix.lower())
    if kind is None or (max(size) <= kind.longest and math.prod(size) <= MOST_HELD):
        return
    raise UsageError(
        f"--out {path}: {size_name(size)} pixels; expected sides of at most {kind.longest} and at "
        f"most {MOST_HELD} pixels in {kind.name}. Write a .png, which has neither limit"
    )


def write(
    file: IO[bytes],
    suffix: str,
    bands: Iterable[Rows],
    shape: tuple[int, ...],
    text: str,
    quality: int | None = None,
) -> bool:
    """A picture `[h, w, c]` that comes in bands `[n, w, c]`, as the kind of file of a suffix.

    `text`, in ASCII, is its metadata. Gives whether there was room for it: a JPEG holds 64 KB.
    `quality`: 1 to 100, of what loses; WebP of LOSSLESS keeps every pixel.
    """
    from PIL import Image

    height, width, channels = shape
    kind = WHOLE.get(suffix.lower())
    if kind is None:
        write_beside(PngWriter(file, height, width, channels, {METADATA_KEY: text}), bands)
        return True
    whole = np.concatenate([*bands])
    picture = Image.fromarray(whole[..., 0] if channels == 1 else whole)
    exif = _exif(text)
    fits = len(exif) <= kind.exif
    picture.save(
        file,
        kind.name,
        quality=quality or QUALITY,
        lossless=quality == LOSSLESS,
        exif=exif if fits else b"",
    )
    return fits


def text_of(path: Path, file: IO[bytes]) -> str | None:
    """The text that `write` put into a file; None where there is none.

    Raises ArtefactError where it is no picture, or damaged.
    """
    if file.read(len(SIGNATURE)) == SIGNATURE:
        file.seek(0)
        return read_text(path, file, METADATA_KEY)
    from PIL import ExifTags, Image

    file.seek(0)
    with readable(path, file):
        kinds = sorted({kind.name for kind in WHOLE.values()})
        exif = Image.open(file, formats=kinds).getexif().get_ifd(ExifTags.IFD.Exif)
        found = exif.get(ExifTags.Base.UserComment, b"")
    if not isinstance(found, bytes) or not found.startswith(COMMENT):
        return None
    return found[len(COMMENT) :].decode("ascii", "replace")


def _exif(text: str) -> bytes:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = COMMENT + text.encode("ascii")
    return exif.tobytes()
