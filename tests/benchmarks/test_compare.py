"""The comparison: what it counts, what it computes from its runs, and one whole small run."""

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.contenders import (
    CONTENDERS,
    GEMMS,
    Measured,
    Prepared,
    build,
    count_flops,
    our_inputs,
    plain_inputs,
)
from benchmarks.published import PublishedR2ID
from benchmarks.report import as_text, evenness, gemm_rates, rows_of
from export.families.r2 import bundle as r2
from tests.conftest import ROOT, Command
from tests.runtime.test_faults import LINUX

SIZES = [(4, 4), (8, 6)]


def measured(seconds: list[float], eps: float, peak: int = 100) -> Measured:
    return Measured(seconds, np.full((2, 3), eps, np.float32), peak, peak // 2)


def test_products_and_convolutions_are_counted() -> None:
    linear, conv = torch.nn.Linear(5, 7), torch.nn.Conv2d(3, 4, 1)
    assert count_flops(linear, {"x": torch.zeros(11, 5)}) == 2 * 11 * 5 * 7
    assert count_flops(conv, {"x": torch.zeros(1, 3, 6, 6)}) == 2 * 36 * 3 * 4
    tokens = {name: torch.zeros(1, 2, 9, 8) for name in "qkv"}  # two heads: q·kᵀ and its softmax·v
    assert count_flops(F.scaled_dot_product_attention, tokens) == 2 * (2 * 2 * 9 * 9 * 8)


def test_no_engine_can_drop_or_join_what_trained_weights_would_keep_apart() -> None:
    weights = [*build("tiny").parameters()]
    assert all(weight.count_nonzero() == weight.numel() for weight in weights)
    assert not any(torch.equal(a, b) for a, b in combinations(weights, 2) if a.shape == b.shape)


def test_the_published_width_costs_what_its_layers_cost() -> None:
    """Per token: 8 encoder blocks once, 8 decoder blocks twice; the rewrites save a tenth."""
    models, size = build("published"), (24, 24)
    d, heads, channels = 192, 6, 64
    step = {source.name: source.module for source in r2.sources(models)}["r2id"]
    with torch.inference_mode():
        plain = count_flops(PublishedR2ID(models), plain_inputs(models, size))
        ours = count_flops(step, our_inputs(models, size))
    attention, ffn = 4 * d * d + 2 * d * d // heads + d, 8 * d * d
    cross = 2 * d * d + d * d // heads + d
    projections = (channels + 64) * d + 2 * d * channels
    per_token = 2 * (24 * (attention + ffn) + 16 * cross + projections)
    assert plain / 576 == pytest.approx(per_token, rel=0.01)
    assert 0.88 < ours / plain < 0.95


def test_rows_hold_ratios_of_medians_and_shares_of_the_machine_s_rate(tmp_path: Path) -> None:
    size = (4, 8)
    flops = {"published": {size: 900}, "r2id": {size: 800}}
    prepared = Prepared(tmp_path, "tiny", {}, {**flops, "gemm": {size: 500}})
    prepared.file("r2id").write_bytes(b"graph")
    ours = next(c.name for c in CONTENDERS if c.graph == "r2id")
    runs = {
        size: {
            GEMMS[0].name: [measured([0.5, 0.25], 0), measured([1.0], 0)],
            CONTENDERS[0].name: [measured([3.0, 4.0], 2.0), measured([8.0], 2.0)],
            ours: [measured([1.0, 2.0], 1.5, 300), measured([2.0], 1.5, 40)],
        }
    }
    rates = gemm_rates(prepared, runs, GEMMS[0].name)
    assert rates == [2000, 500]
    eager, row = rows_of(prepared, runs, CONTENDERS, lambda _: max(rates))
    assert (eager.error, eager.faster) == (0, {CONTENDERS[0].name: 1})
    assert (row.minimum, row.median, row.faster) == (1.0, 2.0, {CONTENDERS[0].name: 2.0})
    assert (row.gemm_share, row.error) == (800 / 1.0 / 2000, 0.25)
    assert (row.peak_bytes, row.own_bytes, row.tokens) == (300, 150, 32)
    assert (eager.file_bytes, row.file_bytes) == (None, 5)
    text = as_text([eager, row], {"GEMM": rates})
    assert "4x8" in text and "2.00" in text and "40%" in text and not list(evenness([row]))


PEAK = """
import numpy as np
from runtime.memory import peak_resident, resident
before = resident()
block = np.ones(64 << 20, np.uint8)
held = resident()
del block
assert held - before > 60 << 20 and peak_resident() > held - (1 << 20)
assert resident() < held - (50 << 20)
"""


CHILD = """
import subprocess, sys
import numpy as np
block = np.ones(300 << 20, np.uint8)
code = "from runtime.memory import peak_resident; print(peak_resident())"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
assert 5 << 20 < int(done.stdout) < 150 << 20, done.stdout
"""


@LINUX
def test_a_peak_is_the_process_s_own() -> None:
    """Of a process that a larger one has started, too."""
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@LINUX
def test_a_peak_of_memory_stays_and_what_is_resident_goes() -> None:
    """In a process of its own, whose memory no other test has stretched."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@LINUX
@pytest.mark.skipif(not find_spec("openvino"), reason="pip install '.[bench]'")
def test_a_small_comparison_from_end_to_end(command: Command, tmp_path: Path) -> None:
    sizes = ",".join(f"{height}x{width}" for height, width in SIZES)
    args = ("--quick", "--config", "tiny", "--sizes", sizes, "--threads", 1, "--out", "bench")
    done = command("benchmarks.compare", *args)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "bench" / "compare.json").read_text())
    names = [c.name for c in CONTENDERS if not c.slow]
    rows = content["rows"]
    assert [row["contender"] for row in rows] == names * len(SIZES)
    assert [(row["height"], row["width"]) for row in rows[:: len(names)]] == SIZES
    for row in rows:
        assert 0 < row["minimum"] <= row["median"] and 0 < row["own_bytes"] < row["peak_bytes"]
        assert row["error"] < (0.1 if "bf16" in row["contender"] else 1e-4), row
        assert (row["file_bytes"] is None) == row["contender"].startswith("torch")
    assert "time per token" in done.stdout
    for picture in ("time.png", "memory.png"):
        Image.open(tmp_path / "bench" / picture).load()


def test_usage_and_missing_packages(command: Command, tmp_path: Path) -> None:
    done = command("benchmarks.compare", "--sizes", "16")
    assert done.returncode == 2 and "HEIGHTxWIDTH" in done.stderr
    assert command("benchmarks.compare", "--help").returncode == 0
