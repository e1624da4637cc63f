"""A writer that is killed, or whose disk fails, leaves the old bundle or the new one, whole."""

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from runtime.bundle.commit import HASHED, commit, editing, note
from runtime.bundle.files import sha256
from runtime.bundle.folders import staging
from runtime.bundle.manifest import GraphSpec, Manifest, read_manifest
from runtime.errors import ResourceError
from tests.runtime.test_faults import field

NOTE = "choice.fp16.json"
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork to kill a writer in")


def altered(old: Manifest, scratch: Path, text: str) -> Manifest:
    """Every graph with another text in it, written to `scratch`, and their manifest."""

    def other(own: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
        made = {}
        for name, spec in own.items():
            file = Path(spec.file).name
            data = old.file_bytes(spec) + field(6, text)
            usual = HASHED.sub(r"\1\3", file)
            (scratch / usual).write_bytes(data)
            made[name] = replace(spec, file=usual, sha256=sha256(data))
        return made

    versions = old.versions | {"text": text}
    return replace(old, graphs=other(old.graphs), for_cpu=other(old.for_cpu), versions=versions)


def export(folder: Path, text: str) -> None:
    old = read_manifest(folder)
    with staging(folder) as scratch:
        commit(altered(old, scratch, text), folder, scratch)


def edit(folder: Path, text: str) -> None:
    """As calibration does: a few graphs more, others kept."""
    with editing(folder) as (manifest, scratch):
        spec = manifest.graphs["r2id"]
        data = manifest.file_bytes(spec) + field(6, text)
        (scratch / "r2id.fp16.onnx").write_bytes(data)
        own = replace(spec, file="r2id.fp16.onnx", sha256=sha256(data), precision="fp16")
        made = replace(manifest, variants={"fp16": {"r2id": own}}, versions={"text": text})
        (scratch / NOTE).write_text(text)
        commit(made, folder, scratch, {"fp16": NOTE})


NAMES = ("replace", "rename", "link", "unlink")
KILLED, SPARED = 9, 8  # SPARED: a call failed, and the work was done all the same


def ended(work: Callable[[], None], call: int, fails: bool = False) -> int:
    """How a process of its own that does `work` ends, killed at its `call`-th change of a name.

    `fails`: the call fails instead, or the flush of a file that it is, as on a disk that is full.
    """
    child = os.fork()
    if child == 0:
        left = [call]

        def mortal(own: Callable[..., Any]) -> Callable[..., Any]:
            def do(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0 and not fails:
                    os._exit(KILLED)
                if left[0] == -1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return own(*args, **options)

            return do

        for name in (*NAMES, "fsync") if fails else NAMES:
            setattr(os, name, mortal(getattr(os, name)))
        try:
            work()
        except ResourceError as error:
            os._exit(error.exit_code)
        except BaseException:
            os._exit(1)
        os._exit(0 if left[0] >= 0 else SPARED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("work", [export, edit])
@pytest.mark.parametrize("fails", [False, True])
def test_a_bundle_is_old_or_new_whenever_its_writer_is_ended(
    work: Callable[[Path, str], None], fails: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    """At each call in turn; a rerun succeeds."""
    first = tmp_path / "first"
    shutil.copytree(tiny_bundle, first)
    work(first, "old")  # so that every name is taken
    usual = {path.name for path in first.iterdir()}
    found, call = [], 0
    while True:
        folder = tmp_path / str(call)
        shutil.copytree(first, folder)
        code = ended(partial(work, folder, "new"), call, fails)
        assert code in ((0, SPARED, ResourceError.exit_code) if fails else (0, KILLED))
        manifest = read_manifest(folder)
        for _, spec in manifest.forms():
            manifest.file_bytes(spec)  # compared with its hash
        found.append(manifest.versions["text"])
        if work is edit:
            assert note(manifest, NOTE, "fp16").read_text() == found[-1]
        if code == 0:
            break
        assert code != SPARED or found[-1] == "new"
        work(folder, "rerun")
        assert read_manifest(folder).versions["text"] == "rerun"
        assert {path.name for path in folder.iterdir()} == usual
        shutil.rmtree(folder)
        call += 1
    assert {path.name for path in folder.iterdir()} == usual
    assert sorted(found, reverse=True) == found and {*found} == {"old", "new"}
    assert found.count("old") > 1 and found.count("new") > 1
