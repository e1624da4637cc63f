"""A destination is the whole old file or the whole new one, whatever fails."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bundle.files import (
    TEMPORARY_PREFIX,
    Measures,
    atomic_write,
    check_writable,
    resource_error,
)
from runtime.bundle.folders import make_folder, owning, remove_stale
from runtime.bundle.locks import lock
from runtime.errors import ResourceError
from tests.conftest import Command


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace", "mkstemp", "write"])
def test_the_old_file_survives_a_failure(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif failing in ("replace", "chmod"):
        monkeypatch.setattr(Path, failing, fail)
    elif failing == "mkstemp":
        monkeypatch.setattr("tempfile.mkstemp", fail)
    with pytest.raises(ResourceError, match=r"No space left.*intact"), atomic_write(path) as file:
        file.write(b"new")
        if failing == "write":
            fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_flushed_holds_the_whole_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    flush = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=r"is written.*Input/output"), atomic_write(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_full_disk_ends_a_command_with_5_and_the_old_file(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    """A real write that fails half-way: the process may write no file beyond 100 bytes."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    (tmp_path / "old.png").write_bytes(b"old")
    args = ("--engine", tiny_bundle, "--steps", 1, "--out", "old.png")
    done = command("runtime.generate", *args, preexec_fn=limit)
    assert done.returncode == 5 and "cannot be written" in done.stderr
    assert (tmp_path / "old.png").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]


def test_a_folder_that_is_there_is_not_to_be_made(tmp_path: Path) -> None:
    missing = FileNotFoundError(2, "No such file or directory")
    for path in (tmp_path, tmp_path / "a.png"):  # as a file in /proc, which cannot be made
        assert str(resource_error(path, missing)).endswith("intact. Choose another folder")
    created = f"mkdir -p {tmp_path / 'b'}"
    assert str(resource_error(tmp_path / "b" / "a.png", missing)).endswith(created)


def test_a_protected_file_is_found_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    path.chmod(0o444)
    check_writable(path)  # it is replaced, not written into
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", path]).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        with pytest.raises(ResourceError, match=r"not permitted.* lift that or choose another"):
            check_writable(path)
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_outputs_that_cannot_be_written_are_found_before(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, words in (("", "is a folder"), ("no/file", "mkdir -p"), ("link", "symbolic link")):
        with pytest.raises(ResourceError, match=words):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_stale_files_go_and_others_stay(tmp_path: Path) -> None:
    for name in (".partial-abc", "kept"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".partial-folder").mkdir()
    remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_killed_measures_go_on_where_they_were(tmp_path: Path) -> None:
    path, given = tmp_path / "measures.json", {"bundle": "1"}
    assert Measures(path, given).take("errors", "a", lambda: 1) == 1
    again = Measures(path, given)
    assert again.take("errors", "a", lambda: 2) == 1
    assert again.take("speed", "a", lambda: [3]) == [3]
    assert Measures(path, {"bundle": "2"}).take("errors", "a", lambda: 4) == 4
    path.write_text("[")
    assert Measures(path, given).take("errors", "a", lambda: 5) == 5


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="modes and locks as on POSIX")


@POSIX
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o600)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@POSIX
def test_what_killed_writers_left_beside_an_output_goes(tmp_path: Path) -> None:
    dead, alive, young = (tmp_path / f"{TEMPORARY_PREFIX}{name}" for name in "abc")
    for path in (dead, alive, young):
        path.write_bytes(b"half")
    for path in (dead, alive):
        os.utime(path, (0, 0))
    with alive.open("rb+") as held:
        assert lock(held.fileno())
        with atomic_write(tmp_path / "file") as file:
            file.write(b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", alive.name, young.name}


@POSIX
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ResourceError, match=r"\.lock: is a symbolic link"), owning(tmp_path):
        pass
    assert (tmp_path / "target").read_bytes() == b"kept"


@POSIX
def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with owning(tmp_path):
        (tmp_path / f"{TEMPORARY_PREFIX}own").write_bytes(b"half")
        with pytest.raises(ResourceError, match=r"in use by process \d+"), owning(tmp_path):
            pass
        assert (tmp_path / f"{TEMPORARY_PREFIX}own").exists()


@POSIX
@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    for check in (check_writable, make_folder):
        with pytest.raises(ResourceError) as caught:
            check(tmp_path / name)
        assert "\n" not in str(caught.value)


@POSIX
@pytest.mark.parametrize("out", ["a" * 300 + ".png", "file/a.png", "none/a.png"])
def test_commands_refuse_outputs_before_any_work(
    out: str, tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "a.npz").write_bytes(b"")
    done = command("runtime.generate", "--engine", tiny_bundle, "--steps", 1, "--out", out)
    assert done.returncode == 5 and done.stderr.count("\n") == 1, done.stderr
