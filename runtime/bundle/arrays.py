"""Archives of arrays (.npz), read within bounds: sizes are compared before any is believed."""

import io
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from runtime.bundle.files import open_file, parsing
from runtime.bundle.manifest import Array
from runtime.errors import ArtefactError

MEMBER = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})\.npy")
MOST_AXES, PIECE = 8, 1 << 24
LAST_LETTER = 0x10FFFF  # of Unicode; numpy makes strings that are none of what is beyond
# The end of a ZIP archive (APPNOTE 6.3.10, section 4.3.16): members in all, bytes of their list.
END, LISTED = struct.Struct("<4s4xHH4s4xH"), 256  # at most so many bytes a member


def read_arrays(
    path: Path, what: str, remedy: str, most: int, most_members: int
) -> dict[str, Array]:
    """The arrays of an .npz by their names, of `most` bytes and `most_members` in all.

    They are stored as they are: an archive that is packed or encrypted, or whose headers promise
    other sizes than it has, is refused. Nothing in it is run as code. Raises ArtefactError.
    """
    with open_file(path, what, remedy, most) as file, parsing(path, what, remedy):
        size = file.seek(0, io.SEEK_END)
        check_end(file, size, most_members)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sum(info.file_size for info in members) > size:
                raise ValueError(f"its members promise more than its {size} bytes")
            return dict(_array(archive, info) for info in members)


def check_end(file: IO[bytes], size: int, most_members: int) -> None:
    """Raise ValueError for an archive of too many members, found before any is listed."""
    file.seek(max(0, size - END.size))
    mark, count, total, length, comment = END.unpack(file.read().ljust(END.size, b"\0"))
    listed = int.from_bytes(length, "little")
    if mark != b"PK\5\6" or comment or count != total:
        raise ValueError("its end is not that of an .npz")
    if not 0 < count <= most_members or listed > count * LISTED:
        raise ValueError(f"it has {count} members; expected 1 to {most_members}")
    file.seek(max(0, size - END.size - 20))
    if file.read(4) == b"PK\6\7":
        raise ValueError("it has the second end of an archive of more than 4 GiB")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, Array]:
    """A member's name and array; raises what says that it is none."""
    name = MEMBER.fullmatch(info.filename)
    if name is None or info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename[:100]!r} is packed, encrypted or no array")
    with archive.open(info) as file:
        return name[1], read_array(file, info.filename, info.file_size)


def read_array(file: IO[bytes], name: str, size: int) -> Array:
    """The array in a .npy file of `size` bytes; raises what says that it is none."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} has version {version} of the format; expected 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) > MOST_AXES or dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{name} is {dtype} {shape}")
    wanted, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    if wanted != left:
        raise ValueError(f"{name} is {dtype} {shape} in {left} bytes, not {wanted}")
    values = np.empty(shape, dtype, "F" if by_columns else "C")
    place = values.reshape(-1, order="A").view(np.uint8)
    while len(place) and (data := file.read(min(len(place), PIECE))):
        place[: len(data)] = np.frombuffer(data, np.uint8)
        place = place[len(data) :]
    if len(place) or file.read(1):  # the end, where an archive's checksum is compared
        raise ValueError(f"{name} is cut short")
    if dtype.kind == "U":
        letters = values.reshape(-1).view(f"{dtype.byteorder}u4")
        if letters.max(initial=0) > LAST_LETTER:
            raise ValueError(f"{name} holds what is no text")
    return values


def require(path: Path, arrays: dict[str, Array], key: str, remedy: str) -> Array:
    """Take an array out of what was read; raises ArtefactError where it is not there."""
    if key not in arrays:
        raise ArtefactError(f"{path}: has no array {key!r}; found {[*arrays][:8]}. {remedy}")
    return arrays.pop(key)
