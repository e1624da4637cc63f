"""Files: whole or not at all on writing; on reading regular, bounded, hashed before parsing."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from runtime.bundle.locks import lock
from runtime.errors import ArtefactError, ResourceError, ToolkitError

TEMPORARY_PREFIX = ".partial-"
LARGEST_FILE = 1 << 34  # bytes; what is smaller by nature has a limit of its own
LONGEST_REASON = 300  # characters of another library's message that an error of ours repeats
YOUNG = 60  # seconds
_swept: set[Path] = set()
O_BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has texts of its own


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(
    path: Path, what: str, remedy: str, most: int = LARGEST_FILE, within: Path | None = None
) -> bytes:
    """The bytes of a file, read once; see `open_file` for the arguments and errors."""
    with open_file(path, what, remedy, most, within) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def open_file(
    path: Path, what: str, remedy: str, most: int = LARGEST_FILE, within: Path | None = None
) -> IO[bytes]:
    """A regular file of at most `most` bytes, opened for reading.

    `within`: the folder that it must lie in after all symbolic links. Raises ArtefactError naming
    `what` it should hold and the remedy, ResourceError where it cannot be read.
    """
    expected = f"expected {what}. {remedy}"
    try:
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            raise ArtefactError(f"{path}: leads out of {within} to {path.resolve()}; {expected}")
        # A pipe without a writer is opened at once, and refused below.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | O_BINARY)
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; {expected}") from None
    except (PermissionError, IsADirectoryError) as error:  # Windows: the first for both
        if path.is_dir():
            raise ArtefactError(f"{path}: is a folder; {expected}") from None
        raise ResourceError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError:
        if "\0" in str(path) or not str(path).isprintable():
            raise ArtefactError(f"{str(path)!r}: is no file's name; {expected}") from None
        raise
    status = os.fstat(descriptor)
    problem = ""
    if stat.S_ISDIR(status.st_mode):
        problem = "is a folder"
    elif not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif status.st_size > most:
        problem = f"has {status.st_size} bytes, more than the {most} that are read"
    if problem:
        os.close(descriptor)
        raise ArtefactError(f"{path}: {problem}; {expected}")
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def parsing(path: Path, what: str, remedy: str) -> Iterator[None]:
    """The one place where what a parser raises on a file's bytes becomes an ArtefactError.

    Parsers of other libraries document few of their errors. Ours, and a lack of memory, pass.
    """
    try:
        yield
    except (ToolkitError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:LONGEST_REASON]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise ArtefactError(f"{path}: no {what} ({reason}). {remedy}") from None


def check_writable(path: Path) -> None:
    """Raise ResourceError where `atomic_write(path)` could not succeed; leaves no trace."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(
            f"{str(path)[:200]!r}: cannot be a file's name here ({reason}). Choose another output"
        ) from None
    if path.is_dir():
        raise ResourceError(f"{path}: is a folder; expected a file's name. Choose another output")
    if path.is_symlink():
        raise ResourceError(
            f"{path}: is a symbolic link, which replacing would cut. Name its target instead"
        )
    if not path.parent.is_dir():
        raise ResourceError(
            f"{path.parent}: no such folder; expected one to write {path.name} in. "
            f"Create it with: mkdir -p {shlex.quote(str(path.parent))}"
        )
    check_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError as error:  # one of another mode or owner can be replaced, as a rule
            if error.errno == errno.EPERM:
                raise resource_error(path, error) from None


def check_folder(folder: Path) -> None:
    """Raise ResourceError where no file can be made in `folder`; leaves no trace."""
    try:
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY_PREFIX, dir=folder):
            pass
    except OSError as error:
        raise resource_error(folder, error) from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and leaves no trace else.

    Written beside `path`, flushed to disk, renamed over it, and the folder flushed, so that
    `path` is always the whole old file or the whole new one. A file that is replaced hands on its
    mode. What killed writers left in the folder goes. Raises ResourceError.
    """
    temporary: Path | None = None
    remove_dead(path.parent)
    try:
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            lock(descriptor)  # which tells others that its writer lives
            yield file
            file.flush()
            os.fsync(file.fileno())
        old = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(old)
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise resource_error(path, error) from None
    finally:
        if temporary is not None:
            # It is gone if all went well, and else no reason to hide why.
            with contextlib.suppress(OSError):
                temporary.unlink()
    _sync_folder(path)


def remove_dead(folder: Path) -> None:
    """Remove the files that writers left in `folder` as they were killed, once in a process.

    The lock of a file that a living process writes shows that it does.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            young = time.time() - status.st_mtime < YOUNG  # its writer may be about to lock it
            if young or not stat.S_ISREG(status.st_mode):
                continue
            with path.open("rb+") as file:
                dead = lock(file.fileno())
            if dead:
                path.unlink()


def _sync_folder(path: Path) -> None:
    """Flush the folder's entry of a file that was renamed into it."""
    if os.name == "nt":  # Windows has no handle of a folder to flush
        return
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ResourceError(
            f"{path}: is written, but {path.parent} cannot be flushed ({error.strerror}), so a "
            "power cut may bring back the old file. Check the disk"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def resource_error(path: Path, error: OSError) -> ResourceError:
    remedies = {
        errno.ENOSPC: "Free some space or choose another folder",
        errno.EROFS: "The folder is read-only: choose another",
        errno.EACCES: "Permission is missing: choose another folder or change its mode",
        errno.EPERM: "It may be protected, as by chattr +i: lift that or choose another name",
    }
    if error.errno == errno.ENOENT and not (path.is_dir() or path.parent.is_dir()):
        remedies[errno.ENOENT] = f"Create the folder with: mkdir -p {shlex.quote(str(path.parent))}"
    remedy = remedies.get(error.errno or 0, "Choose another folder")
    return ResourceError(
        f"{path}: cannot be written ({error.strerror}); what was there before is intact. {remedy}"
    )


class Measures:
    """Measures by kind and name in a JSON file, written as they come and not taken twice.

    `found` is what the file holds: `settings`, and a dictionary per kind. A file of other settings
    is measured anew.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.found = path, {"settings": settings}
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(path.read_bytes())
            if isinstance(earlier, dict) and earlier.get("settings") == settings:
                self.found = earlier

    def take(self, kind: str, name: str, compute: Callable[[], Any]) -> Any:
        """The measure from the file, or computed and written there; raises ResourceError."""
        part = self.found.setdefault(kind, {})
        if name not in part:
            part[name] = compute()
            with atomic_write(self.path) as file:
                file.write(json.dumps(self.found, indent=1).encode() + b"\n")
        return part[name]
