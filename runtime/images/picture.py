"""Image files as a model's pixels: every mode that has a right reading, all others refused.

What a reading loses is said in `ImageFile.notes`: colour, transparency, depth, size.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.arrays import read_array
from runtime.bundle.files import open_file, parsing
from runtime.bundle.interface import LARGEST, Size
from runtime.errors import ArtefactError, UsageError
from runtime.images.png import Rows, open_rows

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's modes by what is done with them; it turns the second kind into RGB as it should be.
GREY, DEEP = ("1", "L"), ("I;16", "I;16L", "I;16B", "I;16N")
COLOURED = ("RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P")
CLEAR = ("LA", "La", "RGBA", "RGBa", "PA")  # with an alpha channel
WHITE = (255, 255, 255)
MOST_HELD = 100_000_000  # pixels of a picture that cannot be read by rows


class ImageFile:
    """An image file as the pixels of a model: windows of it, float32 in [-1, 1].

    A PNG of 8 bits, grey or RGB without transparency, is read row by row and never held whole, nor
    is a `.npy` file (uint8 `[h, w, c]`); what Pillow reads is held as bytes. Windows come from the
    top down. `ground`: RGB in 0 to 255, what lies under transparent pixels. `data`: the bytes of
    the picture, where they are no file; `path` then names it in errors.
    """

    def __init__(
        self,
        path: Path,
        channels: int,
        ground: tuple[int, int, int] = WHITE,
        data: bytes | None = None,
    ):
        """Raises UsageError where images cannot have `channels`, ArtefactError for a bad file."""
        if channels not in (1, 3):
            raise UsageError(f"the model has {channels} colour channels; image files have 1 or 3")
        self.path, self.channels, self.ground = path, channels, ground
        self.notes: list[str] = []
        self._file = (
            open_file(path, "an image", "Give the path of an image file")
            if data is None
            else io.BytesIO(data)
        )
        self._rows = open_rows(path, self._file)
        self._top = 0  # of the band, which is all of an image that is not read by rows
        self._band: Rows | None = None
        self._picture: Image | None = None
        if self._rows is not None:
            self.size: Size = self._rows.size
            self._band = self._rows.read(0)
        elif path.suffix == ".npy":
            self._band = _mapped(path, data)
            self.size = self._band.shape[0], self._band.shape[1]
        else:
            self._picture = self._opened()
            width, height = self._picture.size
            self.size = (width, height) if _lies(self._picture) else (height, width)
        if self._band is not None:
            self._say_colour(self._band.shape[2])

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def shrink(self, enough: Size) -> None:
        """Read a JPEG at a half, a quarter or an eighth of its size if that is still `enough`.

        Its decoder does so as it goes, in a share of the time and memory.
        """
        if self._picture is None or self._picture.format != "JPEG":
            return
        lies, whole = _lies(self._picture), self._picture.size
        self._picture.draft(None, (enough[0], enough[1]) if lies else (enough[1], enough[0]))
        width, height = self._picture.size
        if (width, height) != whole:
            self.notes.append(f"read at 1/{round(whole[0] / width)} of its size")
            self.size = (width, height) if lies else (height, width)

    def __call__(self, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """Pixels `[1, c, height, width]` of a window not above the last one."""
        if self._band is None:
            self._band = self._decoded()
        if self._rows is not None:
            missing = top + height - (self._top + len(self._band))
            if missing > 0:
                self._band = np.concatenate([self._band, self._rows.read(missing)])
            self._top, self._band = top, self._band[top - self._top :]
        band = self._band[top - self._top :][:height]
        own = recoloured(band[:, left : left + width], self.channels).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(own, -1, 0)[None] / np.float32(127.5) - 1)

    def whole(self) -> NDArray[np.float32]:
        """All pixels `[1, c, h, w]`; raises ArtefactError for more than MOST_HELD."""
        if math.prod(self.size) > MOST_HELD:
            raise self._too_large(self.size, "a picture that is held whole. Make it smaller")
        return self(0, 0, *self.size)

    def _too_large(self, size: Size, what: str) -> ArtefactError:
        height, width = size
        return ArtefactError(
            f"{self.path}: {height}x{width} pixels; expected at most {MOST_HELD} of {what}"
        )

    def _opened(self) -> "Image":
        """The picture's header, read and judged."""
        from PIL import Image

        with self._readable():
            picture = Image.open(self._file)
            frames = getattr(picture, "n_frames", 1)
        width, height = picture.size
        if width * height > MOST_HELD or max(width, height) > LARGEST:
            rest = "Make it smaller, or an 8-bit PNG without transparency"
            raise self._too_large((height, width), f"a file that is not read by rows. {rest}")
        # A phone's MPO is a photograph, and what comes after it is made of it.
        if frames > 1 and picture.format != "MPO":
            raise ArtefactError(
                f"{self.path}: holds {frames} pictures; expected one. Save the one that you want "
                "as a file of its own"
            )
        if picture.mode not in (*GREY, *DEEP, *COLOURED, *CLEAR):
            raise ArtefactError(
                f"{self.path}: pixels of mode {picture.mode}, whose range or colours no reader "
                "knows; expected grey, RGB, palette or CMYK. Save it as a PNG of 8 or 16 bits"
            )
        if picture.mode in DEEP:
            self.notes.append("16 bits rounded to 8")
        if picture.mode in CLEAR or "transparency" in picture.info:
            self.notes.append("transparency laid on #{:02x}{:02x}{:02x}".format(*self.ground))
        self._say_colour(1 if picture.mode in (*GREY, *DEEP, "LA", "La") else 3)
        return picture

    def _decoded(self) -> Rows:
        """The whole picture, uint8 `[h, w, 1 or 3]`."""
        from PIL import Image, ImageOps

        picture = self._picture
        assert picture is not None  # else there is a band
        info = picture.info  # with what EXIF there is
        with self._readable():
            if picture.mode in DEEP:
                deep = np.asarray(picture).astype(np.uint32)
                picture = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
                picture.info = info
            elif picture.mode in CLEAR or "transparency" in picture.info:
                clear = picture.convert("RGBA")
                picture = Image.new("RGBA", clear.size, (*self.ground, 255))
                picture.alpha_composite(clear)
                picture.info = info
            turned = ImageOps.exif_transpose(picture)
            grey = self.channels == 1 or turned.mode in GREY
            pixels = np.asarray(turned.convert("L" if grey else "RGB"))
        return pixels.reshape(*pixels.shape[:2], -1)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn whatever Pillow raises of a file into an ArtefactError."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes, which are judged above
                yield
        except MemoryError:
            raise
        except Exception as error:  # decoders raise IndexError, struct.error and more
            raise ArtefactError(f"{self.path}: cannot be read as an image ({error})") from None

    def _say_colour(self, found: int) -> None:
        if found > self.channels:
            self.notes.append("the model is grey: colour dropped")


def _lies(picture: "Image") -> bool:
    """Whether a picture's EXIF turns it by a quarter."""
    from PIL import ExifTags

    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # of damaged EXIF, without which the picture is what it is
        return False


def recoloured(rows: Rows, channels: int) -> Rows:
    """Grey or RGB `[.., c]` as `channels`; grey is ITU-R 601's luma, as Pillow rounds it."""
    if rows.shape[-1] == channels:
        return rows
    if channels == 3:
        return rows.repeat(3, -1)
    luma = rows.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def _mapped(path: Path, data: bytes | None) -> Rows:
    with parsing(path, "array", "Save one of uint8 with numpy.save"):
        array: Rows = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if data is None
            else read_array(io.BytesIO(data), path.name, len(data))
        )
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ArtefactError(
            f"{path}: {array.dtype} {array.shape}; expected uint8 [height, width, 1 or 3]"
        )
    return array
