"""One TensorRT plan of one graph: checks, the fused update, the library's builder."""

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from runtime.bundle.files import atomic_write, sha256
from runtime.bundle.manifest import GraphSpec, PlanSpec, TensorSpec
from runtime.bundle.profiles import Profile, describe
from runtime.engines import HISTORY
from runtime.engines.tensorrt import (
    FLAVOURS,
    OUT_OF_MEMORY,
    message_log,
    plan_interface,
    platform_name,
)
from runtime.errors import ArtefactError, IncompatibleError, ResourceError, ToolkitError, UsageError
from runtime.progress import Bar

FP8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv")


@dataclass(frozen=True)
class Job:
    """One plan to build: a graph in a precision, as ONNX bytes, and its profiles."""

    name: str
    spec: GraphSpec
    model: bytes
    profiles: tuple[Profile, ...]


def plan_file(spec: GraphSpec) -> str:
    """A plan's file name: `r2id.fp16.onnx` → `r2id.fp16.plan`."""
    return Path(spec.file).with_suffix(".plan").name


def check_targets(job: Job, targets: Sequence[str]) -> None:
    """Raise UsageError, before any build, where a target lacks what a graph needs."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(job.model))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types |= {value.name: value.type.tensor_type.elem_type for value in values}
    products = (node for node in model.graph.node if node.op_type in PRODUCTS)
    fp32 = next((n.name for n in products if types.get(n.input[0]) == TensorProto.FLOAT), None)
    fp8 = next((name for name, kind in types.items() if kind in FP8), None)
    for target in targets:
        if fp32 is not None and target == "sm75":
            raise UsageError(
                f"{job.spec.file}: its matrix product {fp32} is fp32, which TensorRT for RTX "
                "cannot do on sm75. Leave sm75 out, or use --engine with an ONNX graph there"
            )
        if fp8 is not None and int(target[2:]) < 89:
            raise UsageError(
                f"{job.spec.file}: {fp8} is FP8, which GPUs have from sm89 on; {target} is "
                f"older. Leave {target} out or choose another --precision"
            )


def with_update(spec: GraphSpec, model: bytes) -> tuple[GraphSpec, bytes]:
    """The graph with what `plan_interface` says a plan of it also has: a table's update."""
    interface = plan_interface(spec)
    if interface is spec:
        return spec, model
    made = onnx.load_from_string(model)
    graph = made.graph
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [len(axes)], axes)
        for name, axes in (("update_branches", [0]), ("update_all", [0, 1, 2, 3]))
    )
    node = helper.make_node
    row = [f"update_{name}" for name in ("keep", "move", "c", "d", "e", "p", "q")]
    graph.node.extend(
        (
            node("Cast", ["eps"], ["update_each"], to=TensorProto.FLOAT),
            node("Mul", ["update_each", "weights"], ["update_weighted"]),
            node("ReduceSum", ["update_weighted", "update_branches"], ["update_eps"], keepdims=0),
            node("Split", ["row"], row, axis=0, num_outputs=len(row)),
        )
    )
    sums = {
        "next": (
            ("latent", "keep"),
            ("update_eps", "move"),
            *zip((*HISTORY, "noise"), "cde", strict=True),
        ),
        "x0": (("latent", "p"), ("update_eps", "q")),
    }
    for name, terms in sums.items():
        products = [f"{name}_{factor}" for _, factor in terms]
        for product, (tensor, factor) in zip(products, terms, strict=True):
            graph.node.append(node("Mul", [tensor, f"update_{factor}"], [product]))
        graph.node.append(node("Sum", products, [name]))
    graph.node.extend(
        (
            node("Abs", ["next"], ["update_abs"]),
            node("ReduceMean", ["update_abs", "update_all"], ["size"], keepdims=1),
        )
    )
    graph.input.extend(_value(s) for s in interface.inputs[len(spec.inputs) :])
    graph.output.extend(_value(s) for s in interface.outputs[len(spec.outputs) :])
    return interface, made.SerializeToString()


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.axes))


class PlanBuilder:
    """One build: the library's builder, its messages, its progress on a bar, and Ctrl-C."""

    def __init__(
        self,
        library: Any,
        flavour: str,
        targets: tuple[str, ...],
        folder: Path,
        bar: Any,
        place: int,
        tf32: bool = False,
    ):
        self.trt, self.flavour, self.targets = library, flavour, targets
        self.folder, self.tf32 = folder, tf32
        self.log = message_log(library)
        self.monitor = progress_monitor(library, bar, place)

    def plan(self, job: Job) -> tuple[bytes, PlanSpec]:
        """Build a plan; raises ArtefactError, IncompatibleError or ResourceError.

        All of it in a thread of its own: Ctrl-C reaches the main thread, where no native call can
        swallow it, and stops the build through the monitor.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._plan, job)
            try:
                while not wait([future], timeout=0.1).done:
                    pass
            except BaseException:
                self.monitor.stopped = True
                raise
            return future.result()

    def _plan(self, job: Job) -> tuple[bytes, PlanSpec]:
        started = time.perf_counter()
        interface, model = with_update(job.spec, job.model)
        builder = self.trt.Builder(self.log)
        network = builder.create_network(0)
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse(model):
            errors = (parser.get_error(i) for i in range(parser.num_errors))
            said = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
            raise ArtefactError(
                f"{job.spec.file}: {self.flavour} {self.trt.__version__} cannot read it: "
                f"{'; '.join(said) or self._said()}. Make the bundle again with: python -m export"
            )
        config = self._config(builder, interface, job)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise self._failure(job)
        for message in dict.fromkeys((*self.log.errors, *self.log.warnings)):
            Bar.write(f"{job.name}: {self.flavour} says: {message}", file=sys.stderr)
        if FLAVOURS[self.flavour].timing_cache:
            with atomic_write(self._timings) as file:
                file.write(bytes(config.get_timing_cache().serialize()))
        plan = bytes(data)
        return plan, PlanSpec(
            file=plan_file(job.spec),
            sha256=sha256(plan),
            graph=job.name,
            precision=job.spec.precision,
            source_sha256=job.spec.sha256,
            flavour=self.flavour,
            version=str(self.trt.__version__),
            targets=self.targets,
            platform=platform_name(),
            profiles=job.profiles,
            build_seconds=round(time.perf_counter() - started, 2),
            bytes=len(plan),
        )

    @property
    def _timings(self) -> Path:
        return self.folder / f"{self.flavour}.timings"

    def _config(self, builder: Any, interface: GraphSpec, job: Job) -> Any:
        """Targets, profiles and caches. fp32 is fp32: TF32 is off unless it was asked for."""
        library = self.trt
        config = builder.create_builder_config()
        config.progress_monitor = self.monitor
        switch = config.set_flag if self.tf32 else config.clear_flag
        switch(library.BuilderFlag.TF32)
        if FLAVOURS[self.flavour].ahead:
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                capability = getattr(library.ComputeCapability, target.upper())
                if not config.set_compute_capability(capability, index):
                    raise self._failure(job)
        if FLAVOURS[self.flavour].timing_cache:
            known = self._timings.read_bytes() if self._timings.exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        for number, profile in enumerate(job.profiles):
            made = builder.create_optimization_profile()
            for spec in interface.inputs:
                shapes = [
                    spec.shape({axis: limits[end] for axis, limits in profile.items()})
                    for end in range(3)
                ]
                made.set_shape(spec.name, *shapes)
            if config.add_optimization_profile(made) != number:
                raise self._failure(job)
        return config

    def _said(self) -> str:
        return "; ".join(dict.fromkeys(self.log.errors)) or "it gave no reason"

    def _failure(self, job: Job) -> ToolkitError:
        """The error for a builder that returned nothing."""
        profiles = " | ".join(map(describe, job.profiles))
        said = self._said()
        where = (
            f"{job.spec.file}: {self.flavour} {self.trt.__version__} built no plan for "
            f"{', '.join(self.targets)} with profiles {profiles}: {said}. "
        )
        if any(words in said.lower() for words in OUT_OF_MEMORY):
            return ResourceError(where + "Ask for smaller ranges or fewer --profiles")
        return IncompatibleError(
            where + "Try one --target at a time, smaller ranges, or another --precision"
        )


def progress_monitor(library: Any, bar: Any, place: int) -> Any:
    """A monitor that moves `bar` from `place` to `place + 1` and stops a build on `stopped`."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.stopped = False
            self.phases: dict[str, tuple[int, int]] = {}  # open ones: steps done, steps in all
            self.lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.phases[name] = (0, steps)

        def phase_finish(self, name: str) -> None:
            with self.lock:
                self.phases.pop(name, None)
                self._show(1.0 if not self.phases else 0.0)

        def step_complete(self, name: str, step: int) -> bool:
            with self.lock:
                if name in self.phases:
                    self.phases[name] = (step + 1, self.phases[name][1])
                self._show(0.0)
            return not self.stopped

        def _show(self, fraction: float) -> None:
            share = 1.0
            for done, steps in self.phases.values():  # a phase is a step of the one before it
                fraction += share * min(done, steps - 1) / steps
                share /= steps
            bar.n = max(bar.n, place + min(fraction, 1.0))
            bar.refresh()

    return Monitor()
