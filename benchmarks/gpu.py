"""All that one visit to a GPU can settle, in 8 minutes: python -m benchmarks.gpu (or make gpu).

First the tests marked `gpu`, while the graphs are exported; then the card's rates; then the steps
of `benchmarks.compare` on the card: PyTorch eager and compiled (once for all sizes), ONNX Runtime
on CUDA with and without CUDA graphs, and TensorRT plans, in fp32, TF32, bf16 and fp16. A contender
that fails, or has no time left, is a line with its reason. gpu.json is written as results come,
gpu.png at the end. `--device cpu` runs the same code on the processor.
"""

import argparse
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import apart, report
from benchmarks.compare import SIZES, prepared_apart, run_turns
from benchmarks.contenders import DEVICE_CONTENDERS, Contender, Prepared, Size, add_options
from runtime import cli, doctor
from runtime.errors import IncompatibleError

NEEDED = ("torch", "onnx", "onnxscript", "safetensors")  # modules that the comparison cannot lack
PACKAGES = (
    *("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt_rtx", "tensorrt", "cuda-bindings"),
    *("onnx", "matplotlib", "pytest"),
)
TEST_SHARE, EXPORT_SHARE = 0.3, 0.6  # of the time, at most; they run beside each other
RESERVE = 10.0  # seconds for what follows the last contender
RATE_SECONDS = 1.0
MATRIX = {"cuda": 8192, "cpu": 512}  # rows and columns of the products that give the card's rate
COPIED = {"cuda": 1 << 30, "cpu": 1 << 24}  # bytes of the copies that give its bandwidth
Rates = dict[str, float]


def gpu(args: argparse.Namespace) -> None:
    """Check what is here, then tests, rates and comparison within the time."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(args.device)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    contenders = [c for c in DEVICE_CONTENDERS if any(part in c.name for part in args.only)]
    sizes = sorted(args.sizes or SIZES, key=math.prod)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        tests = pool.submit(run_tests, args.out / "tests.xml", TEST_SHARE * 60 * args.minutes)
        most = EXPORT_SHARE * 60 * args.minutes
        prepared = exported(Path(name), args.config, sizes, contenders, most)
        about["tests"] = tests.result()
        print(as_text(about["tests"]), flush=True)
        if isinstance(prepared, str):
            about["comparison"] = prepared
            print(prepared)
            report.write_json(args.out / "gpu.json", [], [], about)
            return
        about["rates"] = rates = card_rates(args.device)

        def rows(runs: report.Runs) -> list[report.Row]:
            return report.rows_of(prepared, runs, contenders, lambda c: rates.get(c.precision))

        def keep(runs: report.Runs, failed: list[report.Failed]) -> None:
            report.write_json(args.out / "gpu.json", rows(runs), failed, about)

        left = max(0.0, 60 * args.minutes - (time.monotonic() - started) - RESERVE)
        turns = [(contender, sizes) for contender in contenders]
        given = args.threads, args.seconds, args.device, left
        runs, failed = run_turns(prepared, turns, *given, on_turn=keep)
        found = rows(runs)
    print(report.as_text(found, {}, failed))
    print(", ".join(f"{name}: {rate / 1e9:.0f} G/s" for name, rate in rates.items()))
    draw(args.out / "gpu.png", found, rates, str(about["device"]))
    print(f"{args.out}: finished after {time.monotonic() - started:.0f} s")


def exported(
    folder: Path, config: str, sizes: list[Size], contenders: list[Contender], seconds: float
) -> Prepared | str:
    """What is compared, written within `seconds`, or why nothing can be."""
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        return f"no comparison: {', '.join(missing)} cannot be imported"
    try:
        return prepared_apart(folder, config, sizes, contenders, seconds)
    except RuntimeError as error:
        return f"no comparison: {error}"


def machine(device: str) -> dict[str, Any]:
    """The card or processor, its driver and the packages; raises IncompatibleError without one."""
    nvidia, processor = doctor.nvidia(), doctor.processor()
    if device == "cuda" and nvidia["problem"]:
        raise IncompatibleError(
            f"{nvidia['problem']}; expected an NVIDIA GPU and its driver. "
            "Run the same on the processor with: python -m benchmarks.gpu --device cpu"
        )
    packages: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": nvidia["gpus"][0]["name"] if device == "cuda" else processor["name"],
        "driver": nvidia["driver"],
        "platform": platform.platform(),
        "packages": {name: found for name, found in packages.items() if found},
        "missing": [name for name, found in packages.items() if not found],
        "memory": "bytes of the device's memory at the peak, a library's own context left out",
    }


def run_tests(path: Path, seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu`: how many passed, and each other one with its reason."""
    if find_spec("pytest") is None:
        return {"passed": 0, "others": {"all": "skipped: pytest cannot be imported"}}
    path.unlink(missing_ok=True)
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        f"--junitxml={path}",
        "tests/runtime",
    ]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")[-2000:]
        return {"passed": 0, "others": {"all": f"stopped after {seconds:.0f} s"}, "output": said}
    if not path.exists():
        return {"passed": 0, "others": {"all": (done.stdout + done.stderr)[-2000:]}}
    return of_junit(path)


def of_junit(path: Path) -> dict[str, Any]:
    """The same of pytest's report."""
    passed, others = 0, {}
    for case in ElementTree.parse(path).iter("testcase"):
        kind = next((k for k in ("failure", "error", "skipped") if case.find(k) is not None), None)
        if kind is None:
            passed += 1
            continue
        found = case.find(kind)
        assert found is not None
        others[case.get("name", "")] = f"{kind}: {found.get('message', '').strip()}"
    return {"passed": passed, "others": others}


def as_text(tests: dict[str, Any]) -> str:
    """A line for the number of tests that passed, and for each other one."""
    others = (f"{name}: {reason}" for name, reason in tests["others"].items())
    return "\n".join([f"tests: {tests['passed']} passed", *others])


def card_rates(device: str) -> Rates:
    """FLOPs per second of products in each precision, and bytes per second of `copies`."""
    found = list(apart.items(measure_rates, device, seconds=60.0))
    for failure in (item for item in found if isinstance(item, apart.Failure)):
        print(f"rates: {failure.reason}", flush=True)
    return dict(item for item in found if not isinstance(item, apart.Failure))


def measure_rates(device: str) -> Iterator[tuple[str, float]]:
    """Each rate by name, in PyTorch: the fastest run of several."""
    import torch

    side = MATRIX[device]
    types = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        a, b = (
            torch.randn(side, side, device=device).to(types.get(precision, torch.float32))
            for _ in range(2)
        )
        yield precision, 2 * side**3 / fastest(device, lambda a=a, b=b: a @ b)
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A copy reads each byte and writes it.
    yield "copies", 2 * COPIED[device] / fastest(device, lambda: target.copy_(source))


def fastest(device: str, work: Any) -> float:
    """Seconds of the fastest of the runs of RATE_SECONDS, after one that counts for nothing."""
    import torch

    times: list[float] = []
    while len(times) < 3 or sum(times[1:]) < RATE_SECONDS:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def draw(path: Path, rows: list[report.Row], rates: Rates, title: str) -> None:
    """Steps per second, with what products alone would allow, and peak memory."""
    if not rows or find_spec("matplotlib") is None:
        print(f"no {path.name}: {'matplotlib cannot be imported' if rows else 'nothing ran'}")
        return
    limits = {
        f"limit of products, {name}: {rates[name] / 1e12:.3g} TFLOP/s": {
            tokens: 1 / seconds for tokens, seconds in report.limit(rows, rates[name]).items()
        }
        for name in ("fp32", "bf16")
        if name in rates
    }
    steps = report.Panel("steps per second (median)", lambda row: 1 / row.median, limits)
    report.draw(path, rows, [steps, report.memory_panel()], title)


def parts(text: str) -> tuple[str, ...]:
    """Parts of contenders' names, each of which is in one at least."""
    found = tuple(text.split(","))
    for part in found:
        if not any(part in contender.name for contender in DEVICE_CONTENDERS):
            names = ", ".join(contender.name for contender in DEVICE_CONTENDERS)
            raise argparse.ArgumentTypeError(f"{part!r} is in no name of {names}")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("benchmarks.gpu", __doc__)
    add = p.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="what runs the steps (cuda)")
    add("--minutes", type=cli.number(0.1, 600), default=8.0, help="for all of it (8)")
    add(
        "--seconds", type=cli.number(0.01, 60), default=0.7, help="of each contender and size (0.7)"
    )
    add("--sizes", type=cli.sizes, help="HxW,… of the latent, the largest last (16x16 to 256x256)")
    add("--only", type=parts, default=("",), help="eager,plan,…: those so named (all)")
    add_options(p, Path("build/gpu"), rounds=False)
    return p


def main() -> None:
    """The command line."""
    cli.run(gpu, parser())


if __name__ == "__main__":
    main()
