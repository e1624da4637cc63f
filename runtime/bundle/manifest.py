"""The manifest of a bundle: what each graph takes and gives, and the hash of each file.

It is written last, so a folder with a manifest is a whole bundle.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write, read_bytes, sha256
from runtime.config import ModelConfig
from runtime.errors import ArtefactError, UsageError

FORMAT = 2
FILE_NAME = "manifest.json"
DEFAULT_BUNDLE = Path("build/mnist")
REBUILD = "Make the bundle again with: make export"
TO_PLAN = "python -m export.to_plan"

Axis = str | int
Array = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: named axes are dynamic, numbers are fixed."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at `sizes` of the named axes."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file and hash, interface, legal range per axis, and measured parity.

    `parity`: sizes of the named axes with `error`, the `relative_error` of an fp32 graph against
    PyTorch, or of a graph in another precision against the fp32 one.
    """

    file: str
    sha256: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, tuple[int, int]]
    parity: list[dict[str, Any]] = field(default_factory=list)

    def check_inputs(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """The sizes of the named axes; raises UsageError where an input is missing or unfit."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if array is None:
                raise UsageError(f"{self.file}: input {spec.name} is missing; found {[*inputs]}")
            if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.axes):
                raise UsageError(
                    f"{self.file}: {spec.name} is {array.dtype} {array.shape}; "
                    f"expected {spec.dtype} {spec.axes}"
                )
            for axis, side in zip(spec.axes, array.shape, strict=True):
                expected = sizes.setdefault(axis, side) if isinstance(axis, str) else axis
                if side != expected:
                    raise UsageError(
                        f"{self.file}: {spec.name} is {array.shape}; expected {spec.axes} "
                        f"with {axis} = {expected}"
                    )
        for axis, (low, high) in self.ranges.items():
            if axis in sizes and not low <= sizes[axis] <= high:
                raise UsageError(
                    f"{self.file}: {axis} {sizes[axis]} is outside its range {low}..{high}; "
                    f"the nearest legal value is {min(max(sizes[axis], low), high)}"
                )
        return sizes


@dataclass(frozen=True)
class PlanSpec:
    """A TensorRT plan of one graph: where it came from and what it runs on.

    `source_sha256` is of the ONNX graph it was built from; `flavour` is `tensorrt` or
    `tensorrt_rtx`; `targets` are compute capabilities such as `sm89`; `platform` is an operating
    system and a processor. A profile maps each dynamic axis to (minimum, optimum, maximum).
    """

    file: str
    sha256: str
    graph: str
    precision: str
    source_sha256: str
    flavour: str
    version: str
    targets: tuple[str, ...]
    platform: str
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    build_seconds: float
    bytes: int

    def rebuild(self, folder: Path, target: str = "current") -> str:
        """What to do where this plan does not fit: the command that builds it anew."""
        precision = "" if self.precision == "fp32" else f" --precision {self.precision}"
        return (
            f"Build it anew with: {TO_PLAN} {folder} --target {target}{precision}; "
            f"or run the graph: --engine {(folder / self.file).with_suffix('.onnx')}"
        )


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest, checked on reading; `folder` and `sha256` are of its own file.

    `graphs` are fp32; `variants` holds, per precision, the graphs that have a form of their own in
    it; `for_cpu` the fp32 graphs that have another form for processors (`export/chunk.py`);
    `plans` are TensorRT plans by file name.
    """

    model: ModelConfig
    labels: tuple[str, ...]
    checkpoint: dict[str, Any]
    versions: dict[str, str]
    schedule: dict[str, Any]
    trajectory: dict[str, Any]
    graphs: dict[str, GraphSpec]
    variants: dict[str, dict[str, GraphSpec]] = field(default_factory=dict)
    for_cpu: dict[str, GraphSpec] = field(default_factory=dict)
    plans: dict[str, PlanSpec] = field(default_factory=dict)
    folder: Path = Path()
    sha256: str = ""

    def graph(self, name: str, precision: str = "fp32") -> GraphSpec:
        """The spec of a graph, in `precision` where it has such a form, else in fp32.

        Raises ArtefactError where the bundle lacks the graph, UsageError where it lacks the
        precision.
        """
        self.check_precision(precision)
        if name not in self.graphs:
            raise ArtefactError(
                f"{self.folder / FILE_NAME}: names no graph {name}; found {[*self.graphs]}. "
                f"{REBUILD}"
            )
        return self.variants.get(precision, {}).get(name, self.graphs[name])

    def forms(self) -> list[tuple[str, GraphSpec]]:
        """Every ONNX graph of the bundle, in every form, with its name."""
        groups = (self.graphs, self.for_cpu, *self.variants.values())
        return [pair for own in groups for pair in own.items()]

    def check_precision(self, precision: str) -> None:
        """Raise UsageError where the bundle has no graph in `precision`."""
        found = ("fp32", *self.variants)
        if precision not in found:
            made_by = "calibration.half" if precision in ("fp16", "bf16") else "calibration"
            raise UsageError(
                f"{self.folder}: no graphs in {precision}; found {', '.join(found)}. Make them "
                f"with: python -m {made_by} {self.folder} --precision {precision}"
            )

    def plan(self, name: str, precision: str = "fp32") -> PlanSpec | None:
        """The plan of what `graph(name, precision)` gives, if the bundle has one."""
        wanted = self.graph(name, precision).precision
        own = (p for p in self.plans.values() if p.graph == name and p.precision == wanted)
        return next(own, None)

    def file_bytes(self, spec: GraphSpec | PlanSpec) -> bytes:
        """A graph's or plan's file, read once and compared with its hash; raises ArtefactError."""
        path = self.folder / spec.file
        remedy = spec.rebuild(self.folder) if isinstance(spec, PlanSpec) else REBUILD
        data = read_bytes(path, "a file that the manifest names", remedy)
        if sha256(data) != spec.sha256:
            raise ArtefactError(
                f"{path}: SHA-256 {sha256(data)}; the manifest expects {spec.sha256}. The file "
                f"is damaged, altered or of another bundle. {remedy}"
            )
        return data

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`: the bundle's commit mark."""
        data = asdict(self)
        del data["folder"], data["sha256"]
        with atomic_write(folder / FILE_NAME) as file:
            file.write(json.dumps({"format": FORMAT, **data}, indent=1).encode() + b"\n")


def relative_error(found: Array, wanted: Array) -> float:
    """max |found - wanted| / max |wanted|; infinite where shapes differ or a NaN shows."""
    if found.shape != wanted.shape:
        return float("inf")
    error = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    return error if np.isfinite(error) else float("inf")


def find_bundle(engine: Path) -> Path:
    """The folder of a bundle, given the folder or any engine file in it.

    A bare file name is looked for in the working folder, then in `build/mnist`. Raises
    ArtefactError.
    """
    if (engine / FILE_NAME).is_file():
        return engine
    if engine.is_file() and (engine.parent / FILE_NAME).is_file():
        return engine.parent
    if engine.parent == Path() and (DEFAULT_BUNDLE / engine).is_file():
        return DEFAULT_BUNDLE
    found = "a folder without" if engine.is_dir() else "a file without" if engine.is_file() else ""
    there = f"{found} {FILE_NAME} beside it" if found else "no such file or folder"
    raise ArtefactError(f"{engine}: {there}; expected a bundle or an engine file in one. {REBUILD}")


def read_manifest(folder: Path, expect_sha256: str | None = None) -> Manifest:
    """Read and check a bundle's manifest; raises ArtefactError.

    `expect_sha256` pins the manifest, and through its hashes every file, to a trusted one.
    """
    path = folder / FILE_NAME
    data = read_bytes(path, "a bundle's manifest", REBUILD)
    found = sha256(data)
    if expect_sha256 is not None and found != expect_sha256.lower():
        raise ArtefactError(f"{path}: SHA-256 {found}; expected {expect_sha256}. Do not use it")
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ArtefactError(
                f"{path}: format {content['format']}; this version reads {FORMAT}. {REBUILD}"
            )
        model = ModelConfig.from_json(content["model"], str(path))
        graphs = {name: _graph(spec) for name, spec in content["graphs"].items()}
        manifest = Manifest(
            model,
            tuple(str(label) for label in content["labels"]),
            dict(content["checkpoint"]),
            dict(content["versions"]),
            dict(content["schedule"]),
            dict(content["trajectory"]),
            graphs,
            {
                precision: {name: _graph(spec) for name, spec in own.items()}
                for precision, own in content["variants"].items()
            },
            {name: _graph(spec) for name, spec in content["for_cpu"].items()},
            {file: _plan(spec) for file, spec in content["plans"].items()},
            folder,
            found,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtefactError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"{path}: not a manifest ({reason}). {REBUILD}") from None
    files = [spec.file for _, spec in manifest.forms()]
    for file in (*files, *(plan.file for plan in manifest.plans.values())):
        if Path(file).name != file:
            raise ArtefactError(f"{path}: a file lies at {file!r}, outside the bundle")
    return manifest


def _graph(data: dict[str, Any]) -> GraphSpec:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["axes"])) for t in data[key])

    ranges = {axis: (int(low), int(high)) for axis, (low, high) in data["ranges"].items()}
    return GraphSpec(
        str(data["file"]),
        str(data["sha256"]),
        str(data["precision"]),
        tensors("inputs"),
        tensors("outputs"),
        ranges,
        list(data["parity"]),
    )


def _plan(data: dict[str, Any]) -> PlanSpec:
    texts = ("file", "sha256", "graph", "precision", "source_sha256", "flavour", "version")
    profiles = tuple(
        {axis: (int(low), int(best), int(high)) for axis, (low, best, high) in profile.items()}
        for profile in data["profiles"]
    )
    return PlanSpec(
        **{key: str(data[key]) for key in texts},
        targets=tuple(str(target) for target in data["targets"]),
        platform=str(data["platform"]),
        profiles=profiles,
        build_seconds=float(data["build_seconds"]),
        bytes=int(data["bytes"]),
    )
