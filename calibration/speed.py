"""Seconds per step and peak memory of every precision on every engine of this machine."""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from runtime.bundle.interface import Size, size_name
from runtime.engines import EngineOptions
from runtime.errors import ToolkitError
from runtime.memory import peak_resident
from runtime.pipeline.bundle import open_bundle
from runtime.progress import Bar
from runtime.sampling.request import Request

SECONDS = 1.5  # how long a step is timed in one round
ROUNDS = 3


def timed(bundle: Path, precision: str, provider: str, size: Size, threads: int) -> Any:
    """Seconds of each guided step and the process's peak MiB; in a process of its own.

    The peak has the first step's fp32 graph in it where the precision needs one. A text says why
    where the engine does not run that precision.
    """
    try:
        options = EngineOptions(provider, precision=precision, threads=threads)
        diffuser = open_bundle(bundle, options).diffuser
        request = Request([0], size)
        table = request.table(diffuser.schedule)
        inputs = diffuser.prepare(request, size).at(len(table) // 2)
        first, engine = diffuser.step_engines(table)
    except ToolkitError as error:
        return str(error)
    given = {"latent": diffuser.noise(request, size).draw(), **inputs}
    for own in (first, engine):
        own.run(given)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        began = time.perf_counter()
        engine.run(given)
        seconds.append(time.perf_counter() - began)
    return seconds, peak_resident() / (1 << 20)


def speed(
    bundle: Path, precisions: Sequence[str], sizes: Sequence[Size], threads: int
) -> dict[str, dict[str, Any]]:
    """engine -> size -> precision -> seconds per step, MiB, and how many times as fast as fp32.

    `times_fp32` is against the same engine, `times_fp32_on_cpu` against ONNX Runtime.

    In every round each contender runs in a process of its own, one after the other.
    """
    engines = engines_here()
    spawn = multiprocessing.get_context("spawn")
    turns = [(e, s, p) for s in sizes for e in engines for p in ("fp32", *precisions)]
    seconds: dict[tuple[str, Size, str], list[float]] = {turn: [] for turn in turns}
    found: dict[str, dict[str, Any]] = {e: {size_name(s): {} for s in sizes} for e in engines}
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for turn in Bar(turns * ROUNDS, desc="speed", unit="run"):
            engine, size, precision = turn
            own = pool.submit(timed, bundle, precision, engine, size, threads).result()
            place = found[engine][size_name(size)]
            if isinstance(own, str):
                place[precision] = {"refused": own}
                continue
            seconds[turn] += own[0]
            median = statistics.median(seconds[turn])
            place[precision] = {"seconds_per_step": round(median, 4), "peak_mib": round(own[1])}
    for (engine, size, precision), times in seconds.items():
        if times:
            place = found[engine][size_name(size)][precision]
            for name, base in (("times_fp32", engine), ("times_fp32_on_cpu", "cpu")):
                ratio = statistics.median(seconds[base, size, "fp32"]) / statistics.median(times)
                place[name] = round(ratio, 2)
    return found


def engines_here() -> list[str]:
    """The providers that run on this machine's processor."""
    return ["cpu", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
