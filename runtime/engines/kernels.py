"""What engines compile on the user's machine, kept between starts: kernels and compiled graphs.

Each file begins with the SHA-256 of the rest, so that nothing damaged reaches a library. Without
any of them only the next start is slower: neither reading nor writing ever fails.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from runtime.bundle.files import atomic_write, sha256
from runtime.bundle.folders import exclusive
from runtime.errors import ResourceError

VARIABLE = "R2_CACHE"  # a folder, or `off`
KEPT = 1 << 29  # bytes of all files; what was not read for longest goes first
SHARE = 4  # no file takes more than KEPT over this
SUFFIX = ".cache"


def folder() -> Path | None:
    """Where files are kept, the user's cache folder unless $R2_CACHE names another; None: off."""
    if own := os.environ.get(VARIABLE):
        return None if own == "off" else Path(own)
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "r2-edge-toolkit"


def path_of(name: str) -> Path | None:
    """The file of this name; None where nothing is kept."""
    found = folder()
    return found / (name + SUFFIX) if found else None


def read(path: Path) -> bytes | None:
    """What `write` wrote; None where there is none or it is damaged."""
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != sha256(data).encode():
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return data


def write(path: Path, data: bytes) -> None:
    """Keep `data` unless it is too large, and let others go until all are within KEPT bytes."""
    if len(data) > KEPT // SHARE:
        return
    with contextlib.suppress(OSError, ResourceError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(sha256(data).encode() + b"\n" + data)
        trim(path.parent)


def trim(kept: Path) -> None:
    """Remove those files of a folder that were not read for longest, down to KEPT bytes."""
    stats = {path: path.stat() for path in kept.glob("*" + SUFFIX)}
    total = sum(stat.st_size for stat in stats.values())
    for path in sorted(stats, key=lambda own: stats[own].st_mtime_ns):
        if total <= KEPT:
            break
        path.unlink(missing_ok=True)
        total -= stats[path].st_size


def save(cache: Any, path: Path) -> None:
    """Write a runtime cache of TensorRT for RTX, unless another process is writing it."""
    made = cache.serialize()
    if made is None:  # the library's way of failing
        return
    with contextlib.suppress(OSError, ResourceError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            write(path, bytes(made))
