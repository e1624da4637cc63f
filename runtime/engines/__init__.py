"""Engines: libraries that run a graph, each imported when the first engine of it is opened."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from runtime.bundle.interface import Range
from runtime.bundle.manifest import TO_PLAN, Array, Manifest, quoted
from runtime.errors import ArtefactError, IncompatibleError
from runtime.providers import check_options, profile_options, span
from runtime.sampling.loop import StepCallback


@dataclass(frozen=True)
class EngineOptions:
    """How graphs are run: `provider` as in PROVIDERS; `threads` 0 lets the library choose.

    `provider_options` go to the library as they are; `precision` chooses among the forms that a
    bundle has of a graph, one of `runtime.cli.PRECISIONS`, but see `form`; `plans` runs TensorRT
    plans instead of graphs. Raises UsageError for what cannot be.
    """

    provider: str = "cpu"
    allow_fallback: bool = False
    threads: int = 0
    provider_options: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"
    plans: bool = False

    def __post_init__(self) -> None:
        check_options(self.provider, self.provider_options)

    @property
    def form(self) -> str:
        """The precision of the graphs that are opened: OpenVINO makes bf16 of fp32 by itself."""
        own = self.provider == "openvino" and self.precision == "bf16" and not self.plans
        return "fp32" if own else self.precision


class Engine(Protocol):
    """A graph that can be run; safe to call from several threads."""

    provider: str

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Outputs by name; raises UsageError, ResourceError or NumericalError.

        `outputs` names those that are needed: a library that can leaves the others uncomputed.
        """
        ...


HISTORY = ("x0_1", "x0_2")  # x0 of the last evaluation and of the one before it


@runtime_checkable
class SamplingEngine(Engine, Protocol):
    """An engine of the step graph that also applies a solver's table, all latents on the device."""

    def sample(
        self,
        inputs: Mapping[str, Array],
        updates: Iterable[Mapping[str, Array]],
        on_step: StepCallback | None = None,
        first: int = 0,
    ) -> dict[str, Array]:
        """`latent` and `HISTORY`, each `[B, C, H, W]`, after a run per update, from step `first`.

        `inputs` holds what stays, and these three and `noise` as they are at first; an update,
        of which there is one at least, what a step changes: `row` float32 `[7]` (keep, move, c, d,
        e, p, q) of a table, `weights` `[K, B, 1, 1, 1]` of guidance, `noise` where e is not 0.
        Raises NumericalError naming the step.
        """
        ...


def check_engine_kind(engine: Path) -> None:
    """Raise IncompatibleError where `engine` is a plan and no TensorRT is installed."""
    if engine.suffix != ".plan":
        return
    from runtime.engines import tensorrt

    if not tensorrt.installed():
        install = " or ".join(flavour.install for flavour in tensorrt.FLAVOURS.values())
        raise IncompatibleError(
            f"{engine}: a TensorRT plan, but TensorRT is not installed here. Install it with: "
            f"{install}; or use --engine {quoted(engine.with_suffix('.onnx'))}"
        )


def open_engine(manifest: Manifest, graph: str, options: EngineOptions) -> Engine:
    """Open a graph of a bundle, or its plan, in the precision asked for, its hash checked first.

    Raises UsageError for a precision that the bundle lacks, ArtefactError for a damaged file or a
    plan that is not there, IncompatibleError for a missing library, provider or GPU.
    """
    spec = manifest.graph(graph, options.form)
    plan = manifest.plan(graph, options.form) if options.plans else None
    if plan is not None:
        from runtime.engines.tensorrt import TensorRTEngine

        return TensorRTEngine(spec, plan, manifest.folder, manifest.file_bytes(plan))
    if options.plans and not options.allow_fallback:
        raise ArtefactError(
            f"{manifest.folder}: has no plan of {graph} in {spec.precision}; found "
            f"{[*manifest.plans]}. Build it with: {TO_PLAN} {quoted(manifest.folder)} "
            f"--graphs {graph}, or pass --allow-fallback to run it on ONNX Runtime"
        )
    if options.provider == "openvino":
        from runtime.engines.openvino import OpenVinoEngine

        try:
            usual = manifest.interface.default_latent
            return OpenVinoEngine(spec, manifest.file_bytes(spec), options, usual)
        except IncompatibleError:
            if not options.allow_fallback:
                raise
            options = replace(options, provider="cpu", provider_options={})
            return open_engine(manifest, graph, options)
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    for_cpu = options.provider == "cpu" and spec.precision == "fp32" and graph in manifest.for_cpu
    if for_cpu:
        spec = manifest.for_cpu[graph]
    plan = manifest.plan(graph, options.form)
    profiles = plan.profiles if plan else ()
    ranges = profile_options(options.provider, spec, profiles)
    if ranges:  # the provider builds for the plans' sizes and can run no other
        sides = {axis: side for axis, side in span(profiles).items() if axis in spec.ranges}
        legal = {axis: Range(low, high) for axis, (low, _, high) in sides.items()}
        spec = msgspec.structs.replace(spec, ranges=spec.ranges | legal)
        own = ranges | dict(options.provider_options)
        options = replace(options, provider_options=own)
    return OnnxRuntimeEngine(spec, manifest.file_bytes(spec), options, optimised=for_cpu)
