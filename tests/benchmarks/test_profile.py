"""The profile of a step: what it counts, and one of each form of a small graph."""

from pathlib import Path

import pytest

from benchmarks.contenders import Contender, Prepared
from benchmarks.profile import (
    EIGHT_BITS,
    FORMS,
    FP32,
    PASSES,
    QUANTISING,
    WARM_UP,
    by_kind,
    by_operator,
    draw,
    node_times,
)
from benchmarks.steps import measure
from runtime.bundle.manifest import relative_error


def test_nodes_are_counted_once_and_the_first_steps_not_at_all() -> None:
    def node(operator: str, ts: int, dur: int) -> dict[str, object]:
        args = {"op_name": operator}
        return {"name": f"{operator}_kernel_time", "ts": ts, "dur": dur, "args": args}

    steps = range(WARM_UP + 2)
    runs: list[dict[str, object]] = [{"name": "model_run", "ts": 100 * step} for step in steps]
    cold = [node("Add", 100 * step, 9_000) for step in range(WARM_UP)]
    counted = [node("Add", 100 * WARM_UP, 1_000), node("MatMul", 100 * WARM_UP + 100, 5_000)]
    found = by_operator([*runs, *cold, *counted, node("Scan", 100 * WARM_UP + 100, 7_000)])
    assert found == {"Add": 0.5, "MatMul": 2.5}
    assert by_kind(found) == {EIGHT_BITS: 0, QUANTISING: 0, FP32: 2.5, PASSES: 0.5}


def test_int8_runs_in_products_of_8_bits(prepared: Prepared, tmp_path: Path) -> None:
    size = (4, 5)
    found = {form: node_times(prepared, g, size, 1, tmp_path) for form, g in FORMS.items()}
    fp32, int8 = (by_kind(own) for own in found.values())
    assert fp32[EIGHT_BITS] == fp32[QUANTISING] == 0 and min(fp32[FP32], fp32[PASSES]) > 0
    assert min(int8.values()) > 0
    assert sum(int8.values()) == pytest.approx(sum(found["int8"].values()))
    contenders = [Contender(graph, "cpu", graph) for graph in FORMS.values()]
    wanted, eps = (measure(prepared, c, size, 1, 0.0).eps for c in contenders)
    assert 1e-4 < relative_error(eps, wanted) < 0.3
    assert prepared.file("r2id.int8").stat().st_size < prepared.file("r2id").stat().st_size
    draw(tmp_path / "profile.png", {"4x5": found})
    assert (tmp_path / "profile.png").stat().st_size > 1000
