"""Folders of output: made and tried before any work, one writer at a time."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.bundle.files import TEMPORARY_PREFIX, check_folder, resource_error
from runtime.bundle.locks import lock
from runtime.errors import ResourceError

LOCK_NAME = ".lock"


def make_folder(folder: Path) -> None:
    """Make `folder` where it is not there; raises ResourceError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        found = error if isinstance(error, OSError) else OSError(0, str(error))
        raise resource_error(folder, found) from None
    check_folder(folder)


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Make `folder` and be its only writer while the block runs; what killed ones left goes.

    Raises ResourceError where another process writes there or nothing can be written.
    """
    make_folder(folder)
    with exclusive(folder / LOCK_NAME):
        remove_stale(folder)
        yield


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A scratch folder in `folder`, whose only writer the block is; removed at the block's end.

    Made if it is not there, cleared of what killed writers left. What the block moves out of the
    scratch folder stays. Raises ResourceError where another process writes there or the disk fails.
    """
    with owning(folder):
        try:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder) as scratch:
                yield Path(scratch)
        except OSError as error:
            if isinstance(error, ResourceError):
                raise
            raise resource_error(folder, error) from None


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left in `folder`; only for a folder that one writer owns."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; raises ResourceError naming who holds it.

    The system frees the lock of a process that ends in any way, so none is ever stale.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ResourceError(
                f"{path}: is a symbolic link, which is not followed; expected a lock. Remove it"
            ) from None
        raise resource_error(path, error) from None
    with os.fdopen(descriptor, "r+") as file:
        file.seek(0)
        if not lock(file.fileno()):
            raise ResourceError(
                f"{path.parent}: in use by {file.read().strip() or 'another process'}; "
                "expected to be the only one that writes there. Wait until it has finished"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} ({Path(sys.argv[0]).name})")
        file.flush()
        yield
