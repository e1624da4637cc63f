"""What reads a file or a request in the fuzzer, and what all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime import open_bundle
from runtime.engines import EngineOptions
from runtime.pipeline.bundle import Bundle
from tests.conftest import TINY
from tests.fuzz.child import MEMORY
from tests.fuzz.damage import Sample

ONE = EngineOptions(threads=1)
EDGE = 8  # pixels along a side of a whole picture
# A graph may ask for any memory, as a program may, and a library may end over what it is refused.
ROOM_OF_PROGRAMS = 4 << 30


@dataclass(frozen=True)
class Reader:
    """Whole files, and what reads a damaged one in the place of one of them.

    `read` gets that one's number; it raises a ToolkitError or nothing. `room`: the bytes of address
    space that it is left.
    """

    samples: list[Sample]
    read: Callable[[int, bytes], object]
    room: int = MEMORY


READERS: dict[str, Callable[[Path], Reader]] = {}


def reader(make: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    """Enter a reader under its function's name."""
    READERS[make.__name__] = make
    return make


def drawing() -> Bundle:
    """The tiny bundle, opened."""
    return open_bundle(TINY, ONE)


def grey(seed: int = 0) -> Any:
    """Noise, uint8 `[h, w, 1]`."""
    return np.random.default_rng(seed).integers(0, 256, (EDGE, EDGE + 2, 1), dtype=np.uint8)
