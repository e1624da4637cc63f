"""The rewrites: each form with one undone is another graph that computes the same."""

from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.rewrites import CHUNKED, HOISTED, PATCHED, SHARED, TOLERANCE, WHOLE, prepare
from benchmarks.steps import measure
from runtime.bundle.manifest import relative_error


def test_every_form_computes_the_same(tmp_path: Path) -> None:
    size = (8, 33)  # 264 tokens: a chunk of its own
    prepared, files = prepare(tmp_path, "tiny", [size])
    assert {*files} == {WHOLE, CHUNKED, SHARED, *PATCHED, *HOISTED}
    eps = {
        name: measure(prepared, Contender(name, "cpu", kind), size, 1, 0.0).eps
        for name, kind in files.items()
    }
    for found in eps.values():
        assert relative_error(found, eps[WHOLE]) <= TOLERANCE
    assert len({(tmp_path / f"{kind}.onnx").read_bytes() for kind in files.values()}) == len(files)
