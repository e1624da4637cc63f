"""Engines: libraries that run a graph, each imported when the first engine of it is opened."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from runtime.errors import IncompatibleError
from runtime.manifest import Array, Manifest
from runtime.providers import check_options, profile_options, span


@dataclass(frozen=True)
class EngineOptions:
    """How graphs are run: `provider` as in PROVIDERS; `threads` 0 lets the library choose.

    `provider_options` go to ONNX Runtime as they are; `precision` chooses among the forms that a
    bundle has of a graph: fp32, fp16 or bf16. Raises UsageError for what cannot be.
    """

    provider: str = "cpu"
    allow_fallback: bool = False
    threads: int = 0
    provider_options: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_options(self.provider, self.provider_options)


class Engine(Protocol):
    """A graph that can be run; safe to call from several threads."""

    provider: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises UsageError, ResourceError or NumericalError."""
        ...


def check_engine_kind(engine: Path) -> None:
    """Raise IncompatibleError where `engine` is of a kind that cannot run here."""
    if engine.suffix != ".plan":
        return
    found = [name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name)]
    here = f"found {found[0]}" if found else "TensorRT is not installed here"
    raise IncompatibleError(
        f"{engine}: a TensorRT plan, but {here} and this version runs ONNX graphs only. "
        f"Use --engine {engine.with_suffix('.onnx')}"
    )


def open_engine(manifest: Manifest, graph: str, options: EngineOptions) -> Engine:
    """Open a graph of a bundle in the precision asked for, its hash checked first.

    Raises UsageError for a precision that the bundle lacks, ArtefactError for a damaged file,
    IncompatibleError for a missing library or provider.
    """
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    spec = manifest.graph(graph, options.precision)
    plans = [plan for plan in manifest.plans.values() if plan.graph == graph]
    profiles = plans[0].profiles if plans else ()
    ranges = profile_options(options.provider, spec, profiles)
    model = manifest.file_bytes(spec)
    if ranges:  # the provider builds for the plans' sizes and can run no other
        legal = {axis: (low, high) for axis, (low, _, high) in span(profiles).items()}
        spec = replace(spec, ranges=spec.ranges | legal)
        own = ranges | dict(options.provider_options)
        options = replace(options, provider_options=own)
    return OnnxRuntimeEngine(spec, model, options)
