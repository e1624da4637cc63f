"""Image files as a model's pixels: every mode that has a right reading, all others refused.

What a reading loses is said in `ImageFile.notes`: colour, transparency, depth, size.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.arrays import read_array
from runtime.bundle.files import LONGEST_REASON, open_file, parsing
from runtime.bundle.interface import LARGEST, Size
from runtime.errors import ArtefactError, ToolkitError, UsageError
from runtime.images.png import Rows, open_rows

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's modes by what is done with them; it turns the second kind into RGB as it should be.
GREY, DEEP = ("1", "L"), ("I;16", "I;16L", "I;16B", "I;16N")
COLOURED = ("RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P")
CLEAR = ("LA", "La", "RGBA", "RGBa", "PA")  # with an alpha channel
WHITE = (255, 255, 255)
MOST_HELD = 100_000_000  # pixels of a picture that cannot be read by rows
SMALLER = "of a file that is not read by rows. Make it smaller, or an 8-bit PNG without alpha"
REDUCED = re.compile(r";16[BLN]$")  # in Pillow's name of a file's pixels: 8 of 16 bits are kept
SPREAD = {"L;2": 85, "L;4": 17}  # by such names: what Pillow makes of 1, that white is 255
BAND = 256  # rows that are looked at for colour at once


class ImageFile:
    """An image file as the pixels of a model: windows of it, float32 in [-1, 1].

    A PNG of 8 bits, grey or RGB without transparency, is read row by row and never held whole, nor
    is a `.npy` file (uint8 `[h, w, c]`); what Pillow reads is held as bytes. Windows come from the
    top down. `ground`: RGB in 0 to 255, what lies under transparent pixels. `data`: the bytes of
    the picture, where they are no file; `path` then names it in errors. `taker`: what has
    `channels`, in notes, which are whole once all pixels are read.
    """

    def __init__(
        self,
        path: Path,
        channels: int,
        ground: tuple[int, int, int] = WHITE,
        data: bytes | None = None,
        taker: str = "the model",
    ):
        """Raises UsageError where images cannot have `channels`, ArtefactError for a bad file."""
        if channels not in (1, 3):
            raise UsageError(f"the model has {channels} colour channels; image files have 1 or 3")
        self.path, self.channels, self.ground, self.taker = path, channels, ground, taker
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
        band = self._band[top - self._top :][:height, left : left + width]
        if band.shape[2] > self.channels and (band != band[..., :1]).any():
            self._say_colour()
        own = recoloured(band, self.channels).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(own, -1, 0)[None] / np.float32(127.5) - 1)

    def whole(self) -> NDArray[np.float32]:
        """All pixels `[1, c, h, w]`; raises ArtefactError for more than MOST_HELD."""
        if math.prod(self.size) > MOST_HELD:
            raise self._too_large(self.size, "of a picture that is held whole. Make it smaller")
        return self(0, 0, *self.size)

    def _too_large(self, size: Size, what: str) -> ArtefactError:
        height, width = size
        return ArtefactError(
            f"{self.path}: {height}x{width} pixels; expected at most {MOST_HELD} {what}"
        )

    def _opened(self) -> "Image":
        """The picture's header, read and judged."""
        with readable(self.path, self._file):
            picture = opened(self._file)
            frames = getattr(picture, "n_frames", 1)
        width, height = picture.size
        if width * height > MOST_HELD or max(width, height) > LARGEST:
            raise self._too_large((height, width), SMALLER)
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
        reduced = REDUCED.search(raw_mode(picture)) is not None and picture.mode not in DEEP
        if reduced and "transparency" in picture.info:
            raise ArtefactError(
                f"{self.path}: one colour of 16 bits is transparent, and at the 8 that are read it "
                "is not known from its like; expected an alpha channel, or 8 bits. Save it so"
            )
        if picture.mode in DEEP or reduced:
            self.notes.append(f"16 bits {'cut' if reduced else 'rounded'} to 8")
        if transparent(picture):
            self.notes.append("transparency laid on #{:02x}{:02x}{:02x}".format(*self.ground))
        return picture

    def _decoded(self) -> Rows:
        """The whole picture, uint8 `[h, w, 1 or 3]`."""
        from PIL import Image, ImageOps

        picture = self._picture
        assert picture is not None  # else there is a band
        info = picture.info  # with what EXIF there is
        with readable(self.path, self._file):
            if transparent(picture):
                clear = with_alpha(picture)
                picture = Image.new("RGBA", clear.size, (*self.ground, 255))
                picture.alpha_composite(clear)
            elif picture.mode in DEEP:
                picture = Image.fromarray(_rounded(np.asarray(picture)))
            picture.info = info
            turned = ImageOps.exif_transpose(picture)
            grey = self.channels == 1 or turned.mode in GREY
            if self.channels == 1 and _coloured(turned):
                self._say_colour()
            pixels = np.asarray(turned.convert("L" if grey else "RGB"))
        return pixels.reshape(*pixels.shape[:2], -1)

    def _say_colour(self) -> None:
        note = f"{self.taker} is grey: colour dropped"
        if note not in self.notes:
            self.notes.append(note)


@contextmanager
def readable(path: Path, file: IO[bytes]) -> Iterator[None]:
    """Turn whatever Pillow raises of a file, which is open, into an ArtefactError."""
    from PIL import Image, UnidentifiedImageError

    remedy = "expected a whole picture, such as a PNG or JPEG. Make or fetch the file again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are judged by MOST_HELD
            yield
    except (ToolkitError, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own bound is above ours
        raise ArtefactError(
            f"{path}: more than {MOST_HELD} pixels; expected at most {MOST_HELD} {SMALLER}"
        ) from None
    except UnidentifiedImageError:
        unknown = "cannot be read as an image (of no known kind)"
        found = unknown if file.seek(0, io.SEEK_END) else "is empty"
        raise ArtefactError(f"{path}: {found}; {remedy}") from None
    except Exception as error:  # decoders raise IndexError, struct.error and more
        said = " ".join(str(error).split())[:LONGEST_REASON]
        raise ArtefactError(f"{path}: cannot be read as an image ({said}); {remedy}") from None


def opened(file: IO[bytes]) -> "Image":
    """The picture that Pillow finds in a file, with the transparent value of a PNG as it reads it.

    That is one of the file's values, and Pillow looks for it among those of 8 bits that it makes
    of them.
    """
    from PIL import Image

    picture = Image.open(file)
    if "transparency" in picture.info and (factor := SPREAD.get(raw_mode(picture))) is not None:
        picture.info["transparency"] *= factor
    return picture


def raw_mode(picture: "Image") -> str:
    """What the pixels of a file that is not yet decoded are, as Pillow names it; "" if unknown."""
    tiles = getattr(picture, "tile", [])
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) else args)


def transparent(picture: "Image") -> bool:
    """Whether an opened picture has an alpha channel, or a value that is transparent."""
    return picture.mode in CLEAR or "transparency" in picture.info


def with_alpha(picture: "Image") -> "Image":
    """A transparent picture as RGBA; of 16 bits, Pillow would lose which value is transparent."""
    from PIL import Image

    if picture.mode in DEEP:
        deep = np.asarray(picture)
        alpha = np.where(deep == picture.info["transparency"], 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([*[_rounded(deep)] * 3, alpha], -1))
    return picture.convert("RGBA")


def _rounded(deep: NDArray[np.uint16]) -> Rows:
    """Values of 16 bits at 8 bits."""
    return ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _coloured(picture: "Image") -> bool:
    """Whether any pixel is other than grey, looked at in bands so that little is held."""
    width, height = picture.size
    bands = (
        picture.crop((0, top, width, min(top + BAND, height))) for top in range(0, height, BAND)
    )
    hues = (band.convert("YCbCr").getextrema()[1:] for band in bands)
    return picture.mode not in GREY and any(hue != ((128, 128), (128, 128)) for hue in hues)


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
