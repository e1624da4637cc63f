"""A writer that is killed leaves the old bundle or the new one, and a rerun succeeds."""

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


def killed(work: Callable[[], None], call: int) -> bool:
    """Whether a process of its own that does `work` is killed at its `call`-th change of a name."""
    child = os.fork()
    if child == 0:
        left = [call]

        def mortal(own: Callable[..., Any]) -> Callable[..., Any]:
            def do(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return own(*args, **options)

            return do

        for name in ("replace", "rename", "link", "unlink"):
            setattr(os, name, mortal(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("work", [export, edit])
def test_a_bundle_is_old_or_new_whenever_its_writer_is_killed(
    work: Callable[[Path, str], None], tiny_bundle: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(tiny_bundle, first)
    work(first, "old")  # so that every name is taken
    usual = {path.name for path in first.iterdir()}
    found, call = [], 0
    while True:
        folder = tmp_path / str(call)
        shutil.copytree(first, folder)
        dead = killed(partial(work, folder, "new"), call)
        manifest = read_manifest(folder)
        for _, spec in manifest.forms():
            manifest.file_bytes(spec)  # compared with its hash
        found.append(manifest.versions["text"])
        if work is edit:
            assert note(manifest, NOTE, "fp16").read_text() == found[-1]
        if not dead:
            break
        work(folder, "rerun")
        assert read_manifest(folder).versions["text"] == "rerun"
        assert {path.name for path in folder.iterdir()} == usual
        shutil.rmtree(folder)
        call += 1
    assert {path.name for path in folder.iterdir()} == usual
    assert sorted(found, reverse=True) == found and {*found} == {"old", "new"}
    assert found.count("old") > 1 and found.count("new") > 1
