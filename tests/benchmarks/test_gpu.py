"""What `make gpu` runs, on the processor: its budget, its failures, one whole small run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import apart, gpu, steps
from benchmarks.compare import run_turns, share_of
from benchmarks.contenders import DEVICE_CONTENDERS, Contender, Prepared
from benchmarks.report import as_text, rows_of
from export import to_plan
from runtime import doctor
from runtime.bundle.files import sha256
from runtime.bundle.manifest import PlanSpec, relative_error
from runtime.bundle.profiles import choose
from runtime.engines import kernels, tensorrt
from runtime.errors import UsageError
from tests.conftest import Command
from tests.runtime.simulated import simulate
from tests.runtime.test_faults import LINUX

SIZES = [(4, 5), (8, 6)]
OURS = Contender("ours", "onnxruntime", "r2id", peer=True)
OURS_ON_CPU = Contender("ours", "cpu", "r2id")
ABSENT = Contender("absent", "onnxruntime", "r2id.fp4")


def fail(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("the first line\nand another")


def hang(seconds: float) -> Iterator[int]:
    """With a child that would outlive a parent killed alone."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    yield child.pid
    time.sleep(seconds)


def die() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


@LINUX
def test_work_that_fails_hangs_or_dies_gives_what_it_had_and_a_reason() -> None:
    assert [*apart.items(fail, 2)] == [0, 1, apart.Failure("ValueError: the first line")]
    assert [*apart.items(die)] == [1, apart.Failure("its process ended with SIGKILL")]
    child, failure = apart.items(hang, 600.0, seconds=10.0)
    assert failure == apart.Failure("stopped after 10 s, its share of the time")
    end = time.monotonic() + 30
    while running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(child)


def running(process: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_turn_may_use_twice_its_share_and_leaves_the_rest_to_others() -> None:
    assert share_of(100, 10) == 20 and share_of(100, 1) == 100 and share_of(-3, 5) == 0
    left = 100.0
    for turns in range(10, 0, -1):  # each takes all that it may
        left -= share_of(left, turns)
    assert left == pytest.approx(0)


def test_a_failing_contender_is_a_line_with_its_reason(prepared: Prepared) -> None:
    known: list[tuple[int, int]] = []
    turns = [(ABSENT, SIZES), (OURS, SIZES)]
    runs, failed = run_turns(
        prepared, turns, 1, 0.0, on_turn=lambda r, f: known.append((len(r[SIZES[1]]), len(f)))
    )
    assert known == [(0, 1), (1, 1)]
    (only,) = failed
    assert (only.contender, only.sizes) == ("absent", (*SIZES,)) and "r2id.fp4" in only.reason
    rows = rows_of(prepared, runs, [ABSENT, OURS], lambda _: None)
    assert [(row.contender, row.error, row.gemm_share) for row in rows] == [
        ("ours", None, None)
    ] * 2
    assert "absent: did not run at 4x5, 8x6: KeyError: 'r2id.fp4'" in as_text(rows, {}, failed)


def test_what_the_time_does_not_suffice_for_is_left_out_by_name(prepared: Prepared) -> None:
    runs, failed = run_turns(prepared, [(OURS, SIZES)], 1, 0.0, budget=0.0)
    assert runs == {size: {} for size in SIZES}
    assert [(f.sizes, f.reason) for f in failed] == [((*SIZES,), "left out: the time was used up")]


def test_an_export_that_takes_too_long_is_given_up_with_a_reason(tmp_path: Path) -> None:
    """So that the time holds on a slow machine."""
    found = gpu.exported(tmp_path, "tiny", SIZES, [OURS], 0.01)
    assert isinstance(found, str) and "stopped after 0 s" in found


def test_every_contender_of_a_gpu_has_its_graph_and_name(prepared: Prepared) -> None:
    names = [contender.name for contender in DEVICE_CONTENDERS]
    assert len({*names}) == len(names)
    assert {c.graph for c in DEVICE_CONTENDERS} <= {*prepared.specs}
    for precision in ("fp16", "bf16"):
        assert prepared.specs[f"r2id.{precision}"].precision == precision


def test_a_plan_s_steps_are_timed_on_the_device_and_give_its_eps(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated one, whose plan is the graph itself."""
    library = simulate(monkeypatch)
    monkeypatch.setattr(steps, "PLAN_WARM", 0.0)
    monkeypatch.setenv(kernels.VARIABLE, "off")  # set by what is timed, and put back after it
    data = prepared.file("r2id").read_bytes()
    sizes = {"height": (1, 4, 8), "width": (1, 6, 8), "batch": (1, 1, 1), "conditions": (2, 2, 2)}
    plan = PlanSpec(
        file="r2id.plan",
        sha256=sha256(data),
        graph="r2id",
        precision="fp32",
        source_sha256=prepared.specs["r2id"].sha256,
        flavour="tensorrt_rtx",
        version="9.9",
        targets=("sm89",),
        platform=tensorrt.platform_name(),
        profiles=(sizes, sizes),
        build_seconds=1.0,
        bytes=len(data),
    )
    monkeypatch.setattr(steps, "build_plan", lambda *_: (data, plan))
    contender = Contender("plan", "plan", "r2id")
    for size, found in zip(
        SIZES, steps.measure_all(prepared, contender, SIZES, 1, 0.0, "cuda"), strict=True
    ):
        wanted = steps.measure(prepared, OURS_ON_CPU, size, 1, 0.0).eps
        assert relative_error(found.eps, wanted) < 1e-5
        assert len(found.seconds) == steps.FEWEST_STEPS and min(found.seconds) > 0
        assert found.peak == found.own > 0
    latent = prepared.inputs("r2id", SIZES[-1])["latent"].nbytes
    ways = [way for way, count in library.cuda.copies if count == latent]
    assert ways.count("device→device") > 2 * steps.FEWEST_STEPS


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_plan_of_each_precision_is_built_for_the_gpu_at_hand(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """By the real library, told that one is there."""
    pytest.importorskip("tensorrt_rtx", reason="no tensorrt-rtx here")
    monkeypatch.setattr(to_plan, "device_target", lambda: "sm89")
    (contender,) = (c for c in DEVICE_CONTENDERS if c.name == f"ours, plan {precision}")
    data, plan = steps.build_plan(prepared, contender)
    assert len(data) == plan.bytes and plan.targets == ("sm89",)
    for height, width in SIZES:
        sizes = {"height": height, "width": width, "batch": 1, "conditions": 2}
        chosen = plan.profiles[choose(plan.file, plan.profiles, sizes)]
        assert (chosen["height"][1], chosen["width"][1]) == (height, width)
    monkeypatch.setattr(to_plan, "device_target", lambda: "sm90")
    with pytest.raises(UsageError, match="sm90: no target of"):
        steps.build_plan(prepared, contender)


def test_tests_are_counted_and_the_others_named(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left(): pass\n"
    )
    line = [sys.executable, "-m", "pytest", "-q", "--junitxml=found.xml", "test_own.py"]
    subprocess.run(line, cwd=tmp_path, capture_output=True)
    found = gpu.of_junit(tmp_path / "found.xml")
    assert found["passed"] == 1
    assert found["others"]["test_left"] == "skipped: no GPU"
    assert found["others"]["test_bad"].startswith("failure: assert 1 == 2")
    text = gpu.as_text(found)
    assert "1 passed" in text and "test_left: skipped: no GPU" in text


@LINUX
def test_the_whole_of_it_on_the_processor(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the export, which the comparison's own test runs."""
    monkeypatch.setattr(gpu, "exported", lambda *_: prepared)
    line = ["--device", "cpu", "--sizes", "8x6,4x5", "--seconds", "0.02", "--threads", "1"]
    line += ["--only", "eager fp32,ORT,plan fp32", "--out", str(tmp_path / "gpu")]
    gpu.gpu(gpu.parser().parse_args(line))
    content: dict[str, Any] = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    ran = ["torch eager fp32", "plain, ORT fp32", "ours, ORT fp32", "ours, ORT fp16"]
    assert [row["contender"] for row in content["rows"]] == ran * len(SIZES)
    assert [(row["height"], row["width"]) for row in content["rows"][:: len(ran)]] == SIZES
    for row in content["rows"]:
        assert row["error"] < (1e-4 if "fp32" in row["contender"] else 0.1), row
        assert row["gemm_share"] > 0 and 0 < row["own_bytes"] < row["peak_bytes"]
    reasons = {one["contender"]: one["reason"] for one in content["failed"]}
    assert "enable_cuda_graph" in reasons["ours, ORT captured fp32"]
    assert "bf16" in reasons["ours, ORT bf16"] and "ours, plan fp32" in reasons
    assert content["rates"]["bf16"] > 0 and content["rates"]["copies"] > 0
    if doctor.nvidia()["problem"]:
        assert content["tests"]["passed"] == 0
        assert all("no GPU: " in reason for reason in content["tests"]["others"].values())
    assert any("every_graph" in name for name in content["tests"]["others"])
    Image.open(tmp_path / "gpu" / "gpu.png").load()


def test_without_a_gpu_the_command_says_so_and_what_would_run(command: Command) -> None:
    if not doctor.nvidia()["problem"]:
        pytest.skip("this machine has a GPU")
    done = command("benchmarks.gpu")
    assert done.returncode == 4 and "expected an NVIDIA GPU" in done.stderr
    assert "--device cpu" in done.stderr
    done = command("benchmarks.gpu", "--only", "eager,abacus")
    assert done.returncode == 2 and "'abacus' is in no name" in done.stderr
