"""The kernels that TensorRT for RTX compiles on the user's machine, kept between starts."""

import contextlib
import os
from pathlib import Path
from typing import Any

from runtime.bundle.files import atomic_write, sha256
from runtime.bundle.folders import exclusive


def folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder."""
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "r2-edge-toolkit"


def read(path: Path) -> bytes | None:
    """A runtime cache as `save` wrote it; None where there is none or it is damaged."""
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if digest == sha256(data).encode() else None


def save(cache: Any, path: Path) -> None:
    """Write a runtime cache after a line of its SHA-256, locked; see `read`.

    Without it only the next start is slower, so this never fails.
    """
    made = cache.serialize()
    if made is None:  # the library's way of failing
        return
    data = bytes(made)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")), atomic_write(path) as file:
            file.write(sha256(data).encode() + b"\n" + data)
