"""TensorRT plans, of both flavours: `tensorrt` and `tensorrt_rtx` (TensorRT for RTX).

Their Python interface is one; what differs is in `Flavour` and `_runtime_config`.
"""

import importlib
import importlib.util
import math
import platform
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from runtime.bundle.manifest import Array, GraphSpec, PlanSpec, TensorSpec, quoted
from runtime.bundle.profiles import choose
from runtime.engines import HISTORY, kernels
from runtime.engines.cuda import Buffer, Device, device_target, load_cuda
from runtime.errors import ArtefactError, IncompatibleError, NumericalError, ResourceError
from runtime.providers import TENSORRT, TENSORRT_RTX
from runtime.sampling.loop import StepCallback

OUT_OF_MEMORY = ("out of memory", "outofmemory", "memory allocation", "bad_alloc")


@dataclass(frozen=True)
class Flavour:
    """A TensorRT library: its module, what installs it, and what it has that the other one lacks.

    `ahead`: builds for GPUs that are not there. `runtime_cache`: compiles kernels on the user's
    machine, keeps them, and captures CUDA graphs by itself. `timing_cache`: times kernels while it
    builds.
    """

    module: str
    install: str
    ahead: bool
    runtime_cache: bool
    timing_cache: bool


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", TENSORRT, False, False, True),
    "tensorrt_rtx": Flavour("tensorrt_rtx", TENSORRT_RTX, True, True, False),
}


def installed() -> list[str]:
    """The flavours that are installed here."""
    return [name for name in FLAVOURS if importlib.util.find_spec(name)]


def load_library(flavour: str) -> Any:
    """Import a flavour's module; raises IncompatibleError with the command that installs it."""
    try:
        return importlib.import_module(FLAVOURS[flavour].module)
    except (ImportError, OSError) as error:
        raise IncompatibleError(
            f"{flavour} cannot be imported ({error}); found {installed() or 'no TensorRT'} here. "
            f"Install it with: {FLAVOURS[flavour].install}"
        ) from None


def platform_name() -> str:
    """Operating system and processor of this machine, as in `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def message_log(library: Any) -> Any:
    """A logger for `library` that keeps errors and warnings in `errors` and `warnings`."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))
            elif severity == library.ILogger.WARNING:
                self.warnings.append(" ".join(message.split()))

    return Log()


def plan_interface(spec: GraphSpec) -> GraphSpec:
    """What the plan of a graph takes and gives: the step graph's has a table's update fused in.

    With eps = Σ weights[k] · eps[k] and row = (keep, move, c, d, e, p, q), next = keep · latent +
    move · eps + c · x0_1 + d · x0_2 + e · noise and x0 = p · latent + q · eps, so that no latent
    leaves the device; size = mean |next|, which is not finite where any of it is not.
    """
    if spec.lifetime != "step":
        return spec
    latent = next(tensor for tensor in spec.inputs if tensor.name == "latent")
    extra = (
        TensorSpec("weights", "float32", ("conditions", "batch", 1, 1, 1)),
        TensorSpec("row", "float32", (7,)),
        *(TensorSpec(name, "float32", latent.axes) for name in (*HISTORY, "noise")),
    )
    made = (
        TensorSpec("next", "float32", latent.axes),
        TensorSpec("x0", "float32", latent.axes),
        TensorSpec("size", "float32", (1, 1, 1, 1)),
    )
    return replace(spec, inputs=spec.inputs + extra, outputs=spec.outputs + made)


def check_plan(plan: PlanSpec, graph: GraphSpec, folder: Path) -> None:
    """Compare a plan with its graph, then flavour, version, system and GPU with this machine.

    Raises ArtefactError for a plan of another graph, IncompatibleError for another machine's.
    """
    path = folder / plan.file
    if plan.source_sha256 != graph.sha256:
        raise ArtefactError(
            f"{path}: built from a graph of SHA-256 {plan.source_sha256[:12]}…; {graph.file} in "
            f"this bundle has {graph.sha256[:12]}…. {plan.rebuild(folder)}"
        )
    if plan.flavour not in FLAVOURS:
        raise ArtefactError(
            f"{path}: of flavour {plan.flavour!r}; expected {' or '.join(FLAVOURS)}. "
            f"{plan.rebuild(folder)}"
        )
    made, here = f"{plan.flavour} {plan.version}", installed()
    if plan.flavour not in here:
        install = FLAVOURS[plan.flavour].install
        raise IncompatibleError(
            f"{path}: built with {made}; here is {' and '.join(here) or 'no TensorRT'}. "
            f"Install it with: {install}. {plan.rebuild(folder)}"
        )
    version = str(load_library(plan.flavour).__version__)
    if version != plan.version:
        raise IncompatibleError(
            f"{path}: built with {made}; here is {plan.flavour} {version}, which reads its own "
            f"plans only. {plan.rebuild(folder, ','.join(plan.targets))}"
        )
    if plan.platform != platform_name():
        raise IncompatibleError(
            f"{path}: built for {plan.platform}; here is {platform_name()}. {plan.rebuild(folder)}"
        )
    try:
        target = device_target()
    except IncompatibleError as error:
        raise IncompatibleError(
            f"{path}: built for {', '.join(plan.targets)}; {error}. Or run the graph: "
            f"--engine {quoted(folder / graph.file)}"
        ) from None
    if target not in plan.targets:
        raise IncompatibleError(
            f"{path}: built for {', '.join(plan.targets)}; the GPU here is {target}. "
            f"{plan.rebuild(folder)}"
        )


class Context:
    """An execution context of one thread and one profile, with its stream and buffers."""

    def __init__(self, owner: "TensorRTEngine", profile: int):
        self.owner, self.device = owner, owner.device
        self.stream = self.device.call("cudaStreamCreate")
        weakref.finalize(self, self.device.cuda.cudaStreamDestroy, self.stream)
        self.buffers: dict[str, Buffer] = {}
        self.sizes: dict[str, int] = {}
        needed = int(owner.native.get_device_memory_size_for_profile_v2(profile))
        self.native = owner.native.create_execution_context(runtime_config=owner.config)
        if self.native is None:
            raise owner.failure("create_execution_context gave nothing", needed)
        if not self.native.set_optimization_profile_async(profile, int(self.stream)):
            raise owner.failure(f"profile {profile} was refused", needed)
        self.device.call("cudaStreamSynchronize", self.stream)

    def resize(self, sizes: dict[str, int]) -> None:
        """Set and check every shape and give every tensor its memory, where sizes are new."""
        if sizes == self.sizes:
            return
        self.sizes = {}  # until all is set
        owner = self.owner
        for spec in owner.spec.inputs:
            if not self.native.set_input_shape(spec.name, spec.shape(sizes)):
                raise owner.failure(f"{spec.name} of shape {spec.shape(sizes)} was refused")
        missing = self.native.infer_shapes()
        if missing:
            raise owner.failure(f"the shapes of {missing} are unknown")
        for spec in (*owner.spec.inputs, *owner.spec.outputs):
            shape = spec.shape(sizes)
            found = tuple(self.native.get_tensor_shape(spec.name))
            if found != shape:
                raise owner.failure(f"{spec.name} has shape {found}, the manifest says {shape}")
            buffer = self.buffers.setdefault(spec.name, Buffer(self.device))
            buffer.reserve(max(math.prod(shape) * np.dtype(spec.dtype).itemsize, 1))
            if not self.native.set_tensor_address(spec.name, buffer.pointer):
                raise owner.failure(f"the address of {spec.name} was refused")
        self.sizes = sizes

    def close(self) -> None:
        """Give all memory back, though a traceback may still hold this object."""
        for buffer in self.buffers.values():
            buffer.free()
        self.native = None

    def upload(self, inputs: Mapping[str, Array]) -> None:
        """Queue the copies of inputs to the device; those left out keep their values."""
        for spec in self.owner.spec.inputs:
            if spec.name in inputs:
                buffer = self.buffers[spec.name]
                host = buffer.array(spec.shape(self.sizes), spec.dtype)
                host[...] = inputs[spec.name]
                self.device.copy(buffer.pointer, buffer.host, host.nbytes, self.stream)

    def execute(self) -> None:
        """Queue one run."""
        if not self.native.execute_async_v3(int(self.stream)):
            raise self.owner.failure("execute_async_v3 failed")

    def feed(self, source: str, target: str) -> None:
        """Queue the copy of a tensor onto an input of its shape, on the device."""
        spec = next(s for s in self.owner.spec.inputs if s.name == target)
        count = math.prod(spec.shape(self.sizes)) * np.dtype(spec.dtype).itemsize
        pointers = self.buffers[target].pointer, self.buffers[source].pointer
        self.device.copy(*pointers, count, self.stream)

    def download(self, outputs: Iterable[TensorSpec]) -> dict[str, Array]:
        """Copy tensors back and wait for everything queued: arrays that are the caller's own."""
        arrays = {}
        for spec in outputs:
            buffer = self.buffers[spec.name]
            arrays[spec.name] = array = buffer.array(spec.shape(self.sizes), spec.dtype)
            self.device.copy(buffer.host, buffer.pointer, array.nbytes, self.stream)
        self.device.call("cudaStreamSynchronize", self.stream)
        return {name: array.copy() for name, array in arrays.items()}


class TensorRTEngine:
    """One plan; every thread has execution contexts of its own, one per profile it has used."""

    def __init__(self, graph: GraphSpec, plan: PlanSpec, folder: Path, data: bytes):
        """Open a plan of matching hash; raises ArtefactError or IncompatibleError."""
        check_plan(plan, graph, folder)
        library = load_library(plan.flavour)
        self.graph, self.plan, self.folder = graph, plan, folder
        self.spec = plan_interface(graph)
        self.provider = plan.flavour
        self.device = Device(load_cuda())
        self.log = message_log(library)
        self.runtime = library.Runtime(self.log)
        self.native = self.runtime.deserialize_cuda_engine(data)
        if self.native is None:
            raise self.failure("the plan was refused")
        self._check_interface()
        self.config = _runtime_config(self, library)
        self._threads = threading.local()

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph on inputs that fit its spec and a profile; see `Engine.run`."""
        sizes = self.graph.check_inputs(inputs)
        context = self._context(sizes)
        idle = {s.name: np.zeros(s.shape(sizes), s.dtype) for s in self.spec.inputs}
        context.upload({**idle, **inputs})
        context.execute()
        return context.download(
            s for s in self.graph.outputs if outputs is None or s.name in outputs
        )

    def sample(
        self,
        inputs: Mapping[str, Array],
        updates: Iterable[Mapping[str, Array]],
        on_step: StepCallback | None = None,
        first: int = 0,
    ) -> dict[str, Array]:
        """Run the step graph once per update, as `SamplingEngine` and `plan_interface` say.

        `next` becomes `latent` on the device, and `x0` the latest of the history.
        """
        rest = iter(updates)
        begin = next(rest)
        context = self._context(self.spec.check_inputs({**inputs, **begin}))
        context.upload(inputs)
        shift = [*pairwise(("x0", *HISTORY))][::-1]
        size, x0 = (next(s for s in self.spec.outputs if s.name == n) for n in ("size", "x0"))
        for step, update in enumerate(chain([begin], rest), first):
            context.upload(update)
            context.execute()
            context.feed("next", "latent")
            for source, target in shift:
                context.feed(source, target)
            if not np.isfinite(context.download([size])["size"]).all():
                raise NumericalError(
                    f"found NaN or infinity in the latent after step {step + 1}; expected finite "
                    "numbers. Try a lower guidance_scale or a precision of fp32"
                )
            if on_step is not None:
                on_step(step, lambda: context.download([x0])["x0"])
        kept = ("latent", *HISTORY)
        return context.download(spec for spec in self.spec.inputs if spec.name in kept)

    def failure(self, what: str, needed: int = 0) -> Exception:
        """The error for a native call that gave nothing: memory, or what the library said."""
        said = "; ".join(self.log.errors) or "it gave no reason"
        self.log.errors.clear()
        if any(words in said.lower() for words in OUT_OF_MEMORY):
            return self.device.out_of_memory(needed, self.plan.file)
        return IncompatibleError(
            f"{self.folder / self.plan.file}: {what} by {self.plan.flavour} {self.plan.version}: "
            f"{said}. {self.plan.rebuild(self.folder)}"
        )

    def _context(self, sizes: dict[str, int]) -> Context:
        """This thread's context for `sizes`, with shapes and memory set; raises UsageError."""
        profile = choose(self.plan.file, self.plan.profiles, sizes)
        own: dict[int, Context] = self._threads.__dict__.setdefault("contexts", {})
        if profile not in own:
            own[profile] = Context(self, profile)
        try:
            own[profile].resize(sizes)
        except ResourceError:
            own.pop(profile).close()  # so that a smaller request finds room
            raise
        return own[profile]

    def _check_interface(self) -> None:
        """Raise ArtefactError where the plan's tensors or profiles are not the manifest's."""
        names = {self.native.get_tensor_name(i) for i in range(self.native.num_io_tensors)}
        wanted = {spec.name for spec in (*self.spec.inputs, *self.spec.outputs)}
        profiles = self.native.num_optimization_profiles
        if names != wanted or profiles != len(self.plan.profiles):
            raise ArtefactError(
                f"{self.folder / self.plan.file}: has {sorted(names)} and {profiles} profiles; the "
                f"manifest says {sorted(wanted)} and {len(self.plan.profiles)}. "
                f"{self.plan.rebuild(self.folder)}"
            )


def _runtime_config(engine: TensorRTEngine, library: Any) -> Any:
    """How contexts run: memory per profile and, for RTX, CUDA graphs and kept kernels.

    Shape-specialised kernels are compiled in the background while a fallback runs. The cache is
    read where it is whole and the library accepts it (it checks version, GPU and driver), and kept
    at the end.
    """
    config = engine.native.create_runtime_config()
    if config is None:
        raise engine.failure("create_runtime_config gave nothing")
    config.set_execution_context_allocation_strategy(
        library.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    )
    if not FLAVOURS[engine.plan.flavour].runtime_cache:
        return config
    config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    config.dynamic_shapes_kernel_specialization_strategy = (
        library.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    path = kernels.path_of(f"{engine.plan.flavour}-{engine.plan.sha256[:24]}-{device_target()}")
    if path is None:
        return config
    cache = config.create_runtime_cache()
    known = kernels.read(path)
    if known is not None and not cache.deserialize(known):
        engine.log.errors.clear()  # an older driver's, say: no reason for any later failure
    if not config.set_runtime_cache(cache):
        raise engine.failure("the runtime cache was refused")
    weakref.finalize(engine, kernels.save, cache, path)
    return config
