"""The rewrites: each form with one undone is another graph that computes the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import Contender, build
from benchmarks.forms import CHUNKS, PATCHED, SHARED, WHOLE, every_input, forms
from benchmarks.rewrites import TOLERANCE, prepare
from benchmarks.steps import measure
from runtime.bundle.manifest import relative_error

AXIAL = ("position once per size", "film once per schedule", "condition once per prompt")
DEEP = ("position once per size", "scalings once per schedule", "film once per prompt")
# Per family a legal size that is not square, and the graphs that left the step.
FAMILIES: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
    "siid": ((16, 24), AXIAL),
    "s2id": ((9, 16), AXIAL),
    "hdit": ((32, 40), DEEP),
    "sid2": ((16, 24), DEEP),
}


class Operations(TorchDispatchMode):
    """How often each operation runs, what shapes it takes included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        self.found[f"{func} {shapes}"] += 1
        return func(*args, **(kwargs or {}))


def test_every_form_computes_the_same(tmp_path: Path) -> None:
    size = (8, 33)  # 264 tokens: a chunk of its own
    prepared, files = prepare(tmp_path, "tiny", [size])
    hoisted = {f"r2id_{words}" for words in AXIAL}
    assert {*files} == {WHOLE, SHARED, "FFNs in chunks", *PATCHED["r2"], *hoisted}
    eps = {
        name: measure(prepared, Contender(name, "cpu", kind), size, 1, 0.0).eps
        for name, kind in files.items()
    }
    for found in eps.values():
        assert relative_error(found, eps[WHOLE]) <= TOLERANCE
    assert len({(tmp_path / f"{kind}.onnx").read_bytes() for kind in files.values()}) == len(files)


@pytest.mark.parametrize("family", [*FAMILIES])
@torch.inference_mode()
def test_forms_of_families_that_diffuse_pixels_compute_the_same(family: str) -> None:
    """As modules: to trace them all would take minutes."""
    size, hoisted = FAMILIES[family]
    models = build(f"tiny-{family}")
    known, found = dict(every_input(models, size)), forms(models)
    names = {WHOLE, SHARED, *CHUNKS, *PATCHED[family], *(f"{family}_{words}" for words in hoisted)}
    assert found.keys() == names
    eps, ran = {}, {}
    for name, form in found.items():
        with form.patched() as module, Operations() as operations:
            eps[name] = module(*(known[spec.name] for spec in form.source.inputs)).numpy()
        ran[name] = operations.found
    for name, own in eps.items():
        assert relative_error(own, eps[WHOLE]) <= TOLERANCE, name
        assert (ran[name] == ran[WHOLE]) == (name in {WHOLE, *CHUNKS}), name
