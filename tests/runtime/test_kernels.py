"""What engines compile is kept between starts, within bounds, and never in the way."""

import os
from pathlib import Path

import pytest

from runtime.engines import kernels


def test_files_are_kept_where_the_user_s_caches_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    assert kernels.path_of("a") == tmp_path / "r2-edge-toolkit" / "a.cache"
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "own"))
    assert kernels.path_of("a") == tmp_path / "own" / "a.cache"
    monkeypatch.setenv(kernels.VARIABLE, "off")
    assert kernels.path_of("a") is None


def test_what_was_not_read_for_longest_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "KEPT", 1000)
    other = tmp_path / "not-ours"
    other.write_bytes(bytes(5000))
    paths = [tmp_path / f"{name}.cache" for name in "abcd"]
    kernels.write(paths[0], bytes(251))
    assert not paths[0].exists()  # more than a quarter of all
    for age, path in enumerate(paths[:3]):
        kernels.write(path, bytes(240))  # and 65 of the digest
        os.utime(path, (age, age))
    assert kernels.read(paths[0]) == bytes(240)  # now the latest
    kernels.write(paths[3], bytes(240))
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert other.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "a.cache"
    kernels.write(path, b"data")
    assert kernels.read(path) is None
