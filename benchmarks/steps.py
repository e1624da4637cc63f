"""A contender's steps, opened and timed; for a process of its own.

The process imports the contender's library alone, so that its memory is its own. A step is what a
sampling loop waits for. PyTorch's tensors stay on the device; ONNX Runtime's latent goes there and
eps comes back, since the runtime's loop is numpy's; a plan updates the latent itself.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import GEMM_ROWS, Contender, Measured, Prepared, Size, build, kind_of
from runtime.bundle.manifest import Array
from runtime.engines import HISTORY, Engine, EngineOptions, kernels
from runtime.memory import peak_resident, resident
from runtime.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_STEPS = 3
WARM_UP = 2  # steps; a graph that is captured is replayed from the third on
WARM_SHARE = 0.3  # of the time of measurement, on a device that raises its clock
PLAN_WARM = 2.0  # seconds: kernels for a size are compiled behind its first steps
# keep, move, c, d, e, p, q of a table's row: the latent stays as it is, whatever eps.
STILL = np.array([1, 0, 0, 0, 0, 0, 1], np.float32)

Feed = dict[str, Array]
# Runs steps for some seconds after a warm-up of others: the time of each, and the last one's eps.
Loop = Callable[[float, float], tuple[list[float], Array]]
# A contender's loop on inputs; what was opened for the inputs before is given up.
Opened = Callable[[Feed], Loop]


def measure(
    prepared: Prepared, contender: Contender, size: Size, threads: int, seconds: float
) -> Measured:
    """Time a contender's steps on the processor for `seconds`, FEWEST_STEPS at least."""
    return next(measure_all(prepared, contender, [size], threads, seconds))


def measure_all(
    prepared: Prepared,
    contender: Contender,
    sizes: list[Size],
    threads: int,
    seconds: float,
    device: str = "cpu",
) -> Iterator[Measured]:
    """The same at several sizes, as each is done; `device` is cpu or cuda."""
    given, on_processor = contender.graph, device == "cpu"
    opened, before = opener(contender)(prepared, contender, threads, device)
    for size in sizes:
        feed = gemm_input(prepared) if given == "gemm" else prepared.inputs(given, size)
        times, eps = opened(feed)(0 if on_processor else WARM_SHARE * seconds, seconds)
        peak = peak_resident() if on_processor else before - free_memory()
        yield Measured(times, eps.copy(), peak, peak - before if on_processor else peak)


def opener(contender: Contender) -> Callable[..., tuple[Opened, int]]:
    """What opens a contender: its `Opened`, and the bytes in use (on a GPU: free) before."""
    if contender.engine.startswith("torch"):
        return open_torch
    return open_plan if contender.engine == "plan" else open_engine


def enough(times: list[float], seconds: float, fewest: int) -> bool:
    return len(times) >= fewest and sum(times) >= seconds


def looped(step: Callable[[], Any], read: Callable[[Any], Array]) -> Loop:
    """A loop of calls of `step`; `read` takes eps from what the last one gave."""

    def loop(warm: float, seconds: float) -> tuple[list[float], Array]:
        for limit, fewest in ((warm, WARM_UP), (seconds, FEWEST_STEPS)):
            times: list[float] = []
            while not enough(times, limit, fewest):
                start = time.perf_counter()
                found = step()
                times.append(time.perf_counter() - start)
        return times, read(found)

    return loop


def free_memory() -> int:
    """Bytes of the GPU's memory that are free; the first call makes the process's context."""
    from runtime.engines.cuda import Device, load_cuda

    return int(Device(load_cuda()).call("cudaMemGetInfo"))


def gemm_input(prepared: Prepared) -> Feed:
    channels = prepared.specs["gemm"].inputs[0].axes[-1]
    return {"x": np.ones((1, GEMM_ROWS, int(channels)), np.float32)}


def open_engine(
    prepared: Prepared, contender: Contender, threads: int, device: str
) -> tuple[Opened, int]:
    """A graph on an engine of the runtime, opened anew for each size."""
    spec = prepared.specs[contender.graph]
    model = prepared.file(contender.graph).read_bytes()
    more = {"use_tf32": "1"} if contender.precision == "tf32" else {}
    if contender.capture:
        more["enable_cuda_graph"] = "1"
    provider = device if contender.engine == "onnxruntime" else contender.engine
    options = EngineOptions(
        provider, threads=threads, precision=contender.precision, provider_options=more
    )
    make, load = library_of(provider)
    load()
    before = resident() if device == "cpu" else free_memory()
    name = spec.outputs[0].name
    latest: list[Engine] = []

    def opened(feed: Feed) -> Loop:
        latest.clear()  # its memory is free before the next is opened
        latest.append(make(spec, model, options))
        for key, array in feed.items():
            array.flags.writeable = key == "latent"  # all else outlives a step
        engine = latest[0]
        return looped(lambda: engine.run(feed)[name], np.asarray)

    return opened, before


def library_of(provider: str) -> tuple[Callable[..., Engine], Callable[[], object]]:
    """The engine of a provider, and what loads its library."""
    if provider == "openvino":
        from runtime.engines import openvino

        return openvino.OpenVinoEngine, openvino.load_core
    from runtime.engines import onnxruntime

    return onnxruntime.OnnxRuntimeEngine, onnxruntime.load_library


def open_torch(
    prepared: Prepared, contender: Contender, threads: int, device: str
) -> tuple[Opened, int]:
    """The published layout in PyTorch, half by autocast; on a GPU compiled once for all sizes."""
    # Compiled code is kept, so that only the first round of a size has to wait for it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepared.folder / "inductor"))
    import torch

    from benchmarks.published import step_of

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    # Both: convolutions have a switch of their own, which is on unless it is turned off.
    torch.set_float32_matmul_precision("high" if contender.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = contender.precision == "tf32"
    on_processor = device == "cpu"
    before = resident() if on_processor else free_memory()
    models = build(prepared.config)
    module: Callable[..., Tensor] = step_of(models).to(device)
    if contender.graph == "gemm":
        ffn = models.r2id.encoder[0].ffn
        up, down = (linear.weight.T.contiguous() for linear in (ffn.up, ffn.down))
        module = lambda x: x @ up @ down  # noqa: E731
    if contender.engine == "torch.compile":
        module = torch.compile(module, dynamic=None if on_processor else True)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(contender.precision)

    def step(inputs: "list[Tensor]") -> "Tensor":
        with torch.autocast(device, half, enabled=half is not None):
            eps = module(*inputs)
        if not on_processor:
            torch.cuda.synchronize()
        return eps

    def opened(feed: Feed) -> Loop:
        if not on_processor:
            torch.cuda.empty_cache()
        inputs = [torch.from_numpy(array).to(device) for array in feed.values()]
        return looped(lambda: step(inputs), lambda eps: eps.float().cpu().numpy())

    return opened, before


def open_plan(
    prepared: Prepared, contender: Contender, threads: int, device: str
) -> tuple[Opened, int]:
    """The step graph's plan, built here for the GPU at hand: a profile for each prepared size."""
    from runtime.engines.tensorrt import TensorRTEngine

    os.environ[kernels.VARIABLE] = str(prepared.folder)  # compiled kernels leave with the plan
    spec = prepared.specs[contender.graph]
    data, plan = build_plan(prepared, contender)
    before = free_memory()
    engine = TensorRTEngine(spec, plan, prepared.folder, data)

    def opened(feed: Feed) -> Loop:
        latent = np.zeros_like(feed["latent"])
        state = {**feed, **dict.fromkeys((*HISTORY, "noise"), latent)}
        film, conditions = state.pop("film"), len(feed["text_k"])
        weights = np.full((conditions, 1, 1, 1, 1), 1 / conditions, np.float32)
        update = {"film": film, "row": STILL, "weights": weights}

        def loop(warm: float, seconds: float) -> tuple[list[float], Array]:
            times: list[float] = []

            def updates() -> Iterator[dict[str, Array]]:
                for limit, fewest in ((max(warm, PLAN_WARM), WARM_UP), (seconds, FEWEST_STEPS)):
                    times.clear()
                    while not enough(times, limit, fewest):
                        start = time.perf_counter()
                        yield update  # taken up again when the step is done
                        times.append(time.perf_counter() - start)

            engine.sample(state, updates())
            return times, engine.run(feed)["eps"]

        return loop

    return opened, before


def build_plan(prepared: Prepared, contender: Contender) -> tuple[bytes, Any]:
    """The plan of a contender's graph for the GPU at hand, as bytes and its entry."""
    from export.plans import Job, PlanBuilder
    from export.to_plan import default_flavour, resolve_targets
    from runtime.engines.tensorrt import load_library

    flavour = default_flavour()
    library = load_library(flavour)
    targets = resolve_targets(library, flavour, "current")
    sizes = prepared.flops[kind_of(contender.graph)]
    fixed = {"batch": (1, 1, 1), "conditions": (2, 2, 2)}
    profiles = tuple(
        {"height": (1, height, height), "width": (1, width, width), **fixed}
        for height, width in sizes
    )
    graph = contender.graph
    job = Job(graph, prepared.specs[graph], prepared.file(graph).read_bytes(), profiles)
    tf32 = contender.precision == "tf32"
    with Bar(total=1.0, leave=False, disable=True) as bar:
        builder = PlanBuilder(library, flavour, targets, prepared.folder, bar, 0, tf32=tf32)
        return builder.plan(job)
