"""Engines: libraries that run a graph, each imported when the first engine of it is opened."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtime.errors import IncompatibleError
from runtime.manifest import Array, Manifest


@dataclass(frozen=True)
class EngineOptions:
    """How graphs are run: `provider` as in PROVIDERS; `threads` 0 lets the library choose."""

    provider: str = "cpu"
    allow_fallback: bool = False
    threads: int = 0


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
    """Open a graph of a bundle, its hash checked first.

    Raises ArtefactError for a damaged file, IncompatibleError for a missing library or provider.
    """
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    spec = manifest.graph(graph)
    return OnnxRuntimeEngine(spec, manifest.file_bytes(spec), options)
