"""IDX files, as MNIST comes in: arrays of unsigned bytes, raw or gzip.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", file formats.
"""

import gzip
import math
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import open_file, parsing
from runtime.errors import ArtefactError

MAGIC = bytes([0, 0, 8])  # of unsigned bytes; the number of axes follows
MOST_AXES = 4
LARGEST = 1 << 30  # bytes, unpacked; MNIST's have 47 MB
PIECE = 1 << 20
REMEDY = "Copy it again"


def read_idx(path: Path, source: str = "") -> NDArray[np.uint8]:
    """The array of an IDX file, or of `path` with .gz where it is not there.

    `source` says where such a file comes from, for the error where there is none.

    What the header promises is compared with a limit before so much is unpacked, and no more is.
    Raises ArtefactError for a missing file, another magic number or another length.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise ArtefactError(
            f"{path}: neither it nor {packed.name} is there; expected MNIST's IDX files. "
            f"Pass their folder with --data{source and '; '}{source}"
        )
    own = path if path.exists() else packed
    with open_file(own, "an IDX file", REMEDY, LARGEST) as file, parsing(own, "IDX file", REMEDY):
        if own == packed:
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _array(own, unpacked)
        return _array(own, file)


def _array(path: Path, file: "IO[bytes] | gzip.GzipFile") -> NDArray[np.uint8]:
    start = file.read(4)
    if len(start) < 4 or start[:3] != MAGIC or not 1 <= start[3] <= MOST_AXES:
        raise ArtefactError(
            f"{path}: begins with {start.hex()}; expected IDX magic 000008NN with 1 to "
            f"{MOST_AXES} axes. {REMEDY}"
        )
    sides = file.read(4 * start[3])
    shape = tuple(int.from_bytes(sides[i : i + 4], "big") for i in range(0, len(sides), 4))
    promised = math.prod(shape)
    data = bytearray()  # grows with what is there, not with what is promised
    while len(data) <= min(promised, LARGEST) and (piece := file.read(PIECE)):
        data += piece
    if len(shape) != start[3] or len(data) != promised:
        found = f"more than {promised}" if len(data) > promised else len(data)
        raise ArtefactError(
            f"{path}: {found} bytes after the header, which promises {promised} for {shape}. "
            f"{REMEDY}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
