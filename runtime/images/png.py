"""PNG files row by row, so that an image is never in memory whole: written and read.

8 bits, grey or RGB, not interlaced. Source: the PNG specification (ISO/IEC 15948), sections 5, 9
and 11. Pillow writes whole images only, and TIFF would want a library of its own.
"""

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ArtefactError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}  # by channels: grey, RGB
HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, lacing
IDAT_BYTES = 1 << 16
BANDS_AHEAD = 2  # that may wait to be written while the next is made
OTHERS = (b"tRNS", b"acTL", b"eXIf")  # chunks of what takes more than rows to read
# No picture of ours comes near these, which stop absurd allocations: bytes of a chunk of pixels,
# bytes and chunks of what comes before them, pixels along a side.
LARGEST_CHUNK, LARGEST_START, MOST_CHUNKS, LONGEST_SIDE = 1 << 26, 1 << 24, 1000, 1 << 20

Rows = NDArray[np.uint8]


class PngWriter:
    """An image of a known size written from the top down."""

    def __init__(
        self, file: IO[bytes], height: int, width: int, channels: int, text: dict[str, str]
    ):
        """`text`: keywords and texts in Latin-1, stored before the pixels."""
        self.file, self.shape, self.left = file, (width, channels), height
        file.write(SIGNATURE)
        header = HEADER.pack(width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
        self._chunk(b"IHDR", header)
        for key, value in text.items():
            self._chunk(b"tEXt", key.encode("latin-1") + b"\0" + value.encode("latin-1"))
        self.compressor = zlib.compressobj(6)
        self.above = np.zeros(width * channels, np.uint8)
        self.pending = bytearray()

    def write(self, rows: Rows) -> None:
        """The next rows, uint8 `[n, width, channels]`."""
        if rows.shape[1:] != self.shape or len(rows) > self.left:
            raise ValueError(f"rows {rows.shape}; expected at most {self.left} of {self.shape}")
        self.left -= len(rows)
        flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
        self.pending += self.compressor.compress(filtered(flat, self.above, self.shape[1]))
        self.above = flat[-1].copy() if len(flat) else self.above
        if len(self.pending) >= IDAT_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left; every row must have come."""
        if self.left:
            raise ValueError(f"{self.left} rows are missing")
        self.pending += self.compressor.flush()
        self._flush()
        self._chunk(b"IEND", b"")

    def _flush(self) -> None:
        self._chunk(b"IDAT", bytes(self.pending))
        self.pending.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + kind + data)
        self.file.write(struct.pack(">I", zlib.crc32(kind + data)))


def write_beside(png: PngWriter, bands: Iterable[Rows]) -> None:
    """Write `bands` from the top, on a thread, while the next ones are made; then close the PNG.

    BANDS_AHEAD of them wait at most. What goes wrong on either side ends both, and is raised here
    once the thread has let go of the file.
    """
    # An executor, as a queue.Queue can lose its reader's wake-up where Ctrl-C ends a put.
    waiting: deque[Future[None]] = deque()
    thread = ThreadPoolExecutor(1)
    try:
        for band in bands:
            waiting.append(thread.submit(png.write, band))
            if len(waiting) > BANDS_AHEAD:
                waiting.popleft().result()
        for written in waiting:
            written.result()
    finally:
        thread.shutdown(cancel_futures=True)
    png.close()


def filtered(rows: Rows, above: Rows, channels: int) -> bytes:
    """Rows `[n, bytes]` as PNG stores them: each after its filter's number.

    Of none, sub and up the filter with the smallest sum of absolute differences (section 12.8);
    average and Paeth gain little on smooth images and undo slowly.
    """
    previous = np.concatenate([above[None], rows[:-1]])
    sub = rows.copy()
    sub[:, channels:] -= rows[:, :-channels]
    candidates = np.stack([rows, sub, rows - previous])  # [3, n, bytes], modulo 256
    cost = np.minimum(candidates, -candidates).sum(2, dtype=np.int64)
    best = cost.argmin(0)
    chosen = candidates[best, np.arange(len(rows))]
    return np.concatenate([best[:, None].astype(np.uint8), chosen], 1).tobytes()


def read_text(path: Path, file: IO[bytes], key: str) -> str | None:
    """The text under `key` before a PNG's pixels; None where it is no PNG or has none.

    Raises ArtefactError where the file is damaged.
    """
    for kind, data in _chunks(path, file):
        if kind == b"tEXt" and data.startswith(key.encode("latin-1") + b"\0"):
            return data[len(key) + 1 :].decode("latin-1")
        if kind == b"IDAT":
            break
    return None


def _chunks(path: Path, file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG one by one, none for a file of another kind."""
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return
    before, count = 0, 0  # bytes and chunks so far, but for pixels
    while head := file.read(8):
        length, kind = struct.unpack(">I4s", head.ljust(8, b"\0"))
        if kind != b"IDAT":
            before, count = before + length, count + 1
            if before > LARGEST_START or count > MOST_CHUNKS:
                raise ArtefactError(
                    f"{path}: holds {count} chunks of {before} bytes besides its pixels; expected "
                    f"at most {MOST_CHUNKS} of {LARGEST_START}. Make or fetch the file again"
                )
        data = file.read(min(length, LARGEST_CHUNK))
        check = file.read(4)
        if check != struct.pack(">I", zlib.crc32(kind + data)):
            raise ArtefactError(
                f"{path}: chunk {kind!r} is damaged or cut short; expected a whole PNG. "
                "Make or fetch the file again"
            )
        yield kind, data


class PngRows:
    """The rows of a PNG of 8 bits, grey or RGB, from the top down; see `open_rows`."""

    def __init__(self, path: Path, file: IO[bytes], height: int, width: int, channels: int):
        self.path, self.size, self.channels = path, (height, width), channels
        self._data = (data for kind, data in _chunks(path, file) if kind == b"IDAT")
        self._inflate = zlib.decompressobj()
        self._above = np.zeros(width * channels, np.uint8)

    def read(self, count: int) -> Rows:
        """The next `count` rows, uint8 `[count, width, channels]`; raises ArtefactError."""
        width = self.size[1]
        out = np.empty((count, width * self.channels), np.uint8)
        for row in out:
            line = self._line(1 + len(row))
            row[:] = line[1:]
            unfilter(int(line[0]), row, self._above, self.channels)
            self._above = row
        self._above = self._above.copy()
        return out.reshape(count, width, self.channels)

    def _line(self, length: int) -> Rows:
        line = b""
        try:
            while len(line) < length:
                source = self._inflate.unconsumed_tail or next(self._data, b"")
                more = self._inflate.decompress(source, length - len(line))
                if not (source or more):
                    break
                line += more
        except zlib.error:
            line = b""
        if len(line) < length or line[0] > 4:
            raise ArtefactError(
                f"{self.path}: its pixels are damaged or cut short; expected a whole PNG. "
                "Make or fetch the file again"
            )
        return np.frombuffer(line, np.uint8)


def open_rows(path: Path, file: IO[bytes]) -> PngRows | None:
    """A reader of a PNG's rows; None for what cannot be read row by row here.

    Such as transparency, several pictures, or one that lies on its side: `OTHERS`.
    """
    rows = None
    for kind, data in _chunks(path, file):
        if kind == b"IDAT":
            break
        if kind == b"IHDR" and len(data) == HEADER.size:
            width, height, bits, colour, _, _, lacing = HEADER.unpack(data)
            channels = {number: count for count, number in COLOUR_TYPES.items()}.get(colour)
            if max(width, height) > LONGEST_SIDE:
                raise ArtefactError(
                    f"{path}: {height}x{width} pixels; expected sides of at most {LONGEST_SIDE}. "
                    "Give a smaller picture"
                )
            plain = bits == 8 and not lacing and width > 0 and height > 0
            rows = (height, width, channels) if plain and channels is not None else None
        if kind in OTHERS:
            rows = None
        if rows is None:
            break
    file.seek(0)
    return PngRows(path, file, *rows) if rows else None


def unfilter(kind: int, row: Rows, above: Rows, channels: int) -> None:
    """Undo a filter on `row` in place, given the row above; section 9.2."""
    if kind == 1:
        pixels = row.reshape(-1, channels)
        np.cumsum(pixels, 0, np.uint8, pixels)
    elif kind == 2:
        row += above
    elif kind == 3:
        for i, up in enumerate(above.tolist()):
            left = int(row[i - channels]) if i >= channels else 0
            row[i] = (int(row[i]) + (left + up) // 2) & 255
    elif kind == 4:
        _undo_paeth(row, above, channels)


def _undo_paeth(row: Rows, above: Rows, channels: int) -> None:
    values, ups = [0] * channels + row.tolist(), [0] * channels + above.tolist()
    for i in range(channels, len(values)):
        left, up, corner = values[i - channels], ups[i], ups[i - channels]
        to_left, to_up = abs(up - corner), abs(left - corner)
        to_corner = abs(left + up - 2 * corner)
        if to_left <= to_up and to_left <= to_corner:
            guess = left
        else:
            guess = up if to_up <= to_corner else corner
        values[i] = (values[i] + guess) & 255
    row[:] = values[channels:]
