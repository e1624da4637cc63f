"""The manifest of a bundle: what each graph takes and gives, and the hash of each file.

It is written last, so a folder with a manifest is a whole bundle. Graphs are wired by name: each
states its lifetime, and what one gives is what a later one takes under that name.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write, parsing, read_bytes, sha256
from runtime.bundle.interface import Count, Interface, Range, ScheduleData, Text
from runtime.bundle.profiles import Profile
from runtime.errors import ArtefactError, UsageError

FORMAT = 3
FILE_NAME = "manifest.json"
LARGEST_MANIFEST = 16 << 20  # bytes; a hundred times a real one
LARGEST_GRAPH = 1 << 33  # bytes of a graph or plan; ONNX itself ends at 2 GiB
DEFAULT_BUNDLE = Path("build/mnist")
SHIPPED = Path(__file__).parents[1] / "shipped"  # in a wheel: the bundle that came with it
REBUILD = "Copy the whole bundle here again, or make it where PyTorch is: python -m export"
TO_PLAN = "python -m export.to_plan"

# How long what a graph gives stays as it is: of the diffuser a size, a schedule, a prompt or a
# step, of the resampler an image, a latent or a tile.
Lifetime = Literal["size", "schedule", "prompt", "step", "image", "latent", "tile"]
Name = Annotated[str, Meta(max_length=100, pattern=r"\A[A-Za-z_][A-Za-z0-9_.-]*\Z")]
# A name, or the whole quotient of one: `height/4` of an input of `height`.
AxisName = Annotated[str, Meta(max_length=100, pattern=r"\A[a-z][a-z_]*(/[1-9][0-9]{0,3})?\Z")]
Axis = AxisName | Count
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
Array = NDArray[Any]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output: named axes are dynamic, numbers are fixed."""

    name: Name
    dtype: Literal["float32", "int64", "int32", "bool"]
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at `sizes` of the named axes."""
        return tuple(side_of(axis, sizes) if isinstance(axis, str) else axis for axis in self.axes)

    @property
    def names(self) -> list[str]:
        """The named axes, each once and without its divisor."""
        return [*dict.fromkeys(a.partition("/")[0] for a in self.axes if isinstance(a, str))]


def quoted(path: Path) -> str:
    """A path as a shell reads it, in a command that a user is told to type."""
    return shlex.quote(str(path))


def side_of(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of a named axis, which may be the whole quotient of another."""
    name, _, divisor = axis.partition("/")
    return sizes[name] // int(divisor or 1)


class Parity(Struct, frozen=True, forbid_unknown_fields=True):
    """The `relative_error` of a graph at sizes of its named axes."""

    sizes: dict[Name, Count]
    error: Annotated[float, Meta(ge=0)]


def check_file(file: str) -> None:
    """Raise ValueError for a name that could lie outside a bundle or mislead a terminal."""
    if not FILE.fullmatch(file):
        raise ValueError(f"a file lies at {file!r}, which is outside the bundle or no file's name")


class GraphSpec(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One graph: its file and hash, lifetime, interface, legal range per axis, measured parity.

    `parity` is of an fp32 graph against PyTorch, or of a graph in another precision against the
    fp32 one. `floats_per_pixel`: what a resampler's graph holds per pixel (or cell) at its peak,
    as a number of float32; 0 where that was not measured.
    """

    file: str
    sha256: Digest
    precision: Name
    lifetime: Lifetime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[AxisName, Range]
    floats_per_pixel: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    parity: list[Parity] = []

    def __post_init__(self) -> None:
        check_file(self.file)
        if self.ranges.keys() != (names := {n for own in self.inputs for n in own.names}):
            raise ValueError(f"{self.file} has ranges of {[*self.ranges]}, axes {sorted(names)}")
        if unknown := {n for own in self.outputs for n in own.names} - names:
            raise ValueError(
                f"{self.file} gives axes {sorted(unknown)} that none of its inputs has"
            )

    def takes(self, name: str) -> bool:
        """Whether an input has this name."""
        return any(tensor.name == name for tensor in self.inputs)

    def output(self, name: str) -> TensorSpec | None:
        """The output of this name, if there is one."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)

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
                if isinstance(axis, str) and "/" not in axis:
                    sizes.setdefault(axis, side)
        for spec in self.inputs:
            for axis, side in zip(spec.axes, inputs[spec.name].shape, strict=True):
                expected = side_of(axis, sizes) if isinstance(axis, str) else axis
                if side != expected:
                    raise UsageError(
                        f"{self.file}: {spec.name} is {inputs[spec.name].shape}; expected "
                        f"{spec.axes} with {axis} = {expected}"
                    )
        self.check_ranges(sizes)
        return sizes

    def check_ranges(self, sizes: Mapping[str, int]) -> None:
        """Raise UsageError where an axis of `sizes` is outside its range."""
        for axis, legal in self.ranges.items():
            if axis in sizes and sizes[axis] not in legal:
                raise UsageError(
                    f"{self.file}: {axis} {sizes[axis]} is outside its range {legal}; the "
                    f"nearest legal value is {legal.nearest(sizes[axis])}"
                )


class PlanSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A TensorRT plan of one graph: where it came from and what it runs on.

    `source_sha256` is of the ONNX graph it was built from; `flavour` is `tensorrt` or
    `tensorrt_rtx`; `targets` are compute capabilities such as `sm89`; `platform` is an operating
    system and a processor. A profile maps each dynamic axis to (minimum, optimum, maximum).
    """

    file: str
    sha256: Digest
    graph: Name
    precision: Name
    source_sha256: Digest
    flavour: Name
    version: Text
    targets: tuple[Name, ...]
    platform: Text
    profiles: tuple[Profile, ...]
    build_seconds: Annotated[float, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]

    def __post_init__(self) -> None:
        check_file(self.file)

    def rebuild(self, folder: Path, target: str = "current") -> str:
        """What to do where this plan does not fit: the command that builds it anew."""
        precision = "" if self.precision == "fp32" else f" --precision {self.precision}"
        return (
            f"Build it anew with: {TO_PLAN} {quoted(folder)} --target {target}{precision}; "
            f"or run the graph: --engine {quoted((folder / self.file).with_suffix('.onnx'))}"
        )


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that a bundle was made from: its file's hash, and how it was made."""

    sha256: Digest
    provenance: dict[str, Any]


class Trajectory(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a whole trajectory through the graphs is from PyTorch's: `relative_error` by name."""

    steps: Count
    height: Count
    width: Count
    errors: dict[Name, float]


class Content(Struct, frozen=True, forbid_unknown_fields=True):
    """What a manifest's file holds.

    `graphs` are fp32; `variants` holds, per precision, the graphs that have a form of their own in
    it; `for_cpu` the fp32 graphs that have another form for processors (`export/chunk.py`);
    `plans` are TensorRT plans by file name.
    """

    interface: Interface
    schedule: ScheduleData
    checkpoint: Source | None
    versions: dict[Name, Text]
    trajectory: Trajectory | None
    graphs: dict[Name, GraphSpec]
    variants: dict[Name, dict[Name, GraphSpec]] = {}
    for_cpu: dict[Name, GraphSpec] = {}
    plans: dict[str, PlanSpec] = {}
    format: int = FORMAT


class Manifest(Content, frozen=True):
    """A bundle's manifest, checked on reading; `folder` and `sha256` are of its own file."""

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

    def of_lifetime(self, *lifetimes: Lifetime) -> list[str]:
        """The graphs with one of these lifetimes, by lifetime and then as the manifest has them."""
        return [n for one in lifetimes for n, spec in self.graphs.items() if spec.lifetime == one]

    @property
    def step_graph(self) -> str:
        """The graph that runs once per step; raises ArtefactError where there is not one."""
        found = self.of_lifetime("step")
        if len(found) != 1:
            raise ArtefactError(
                f"{self.folder / FILE_NAME}: graphs that live as long as a step are {found}; "
                f"expected one. {REBUILD}"
            )
        return found[0]

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
                f"with: python -m {made_by} {quoted(self.folder)} --precision {precision}"
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
        what = "a file that the manifest names"
        data = read_bytes(path, what, remedy, LARGEST_GRAPH, within=self.folder)
        if sha256(data) != spec.sha256:
            raise ArtefactError(
                f"{path}: SHA-256 {sha256(data)}; the manifest expects {spec.sha256}. The file "
                f"is damaged, altered or of another bundle. {remedy}"
            )
        return data

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`: the bundle's commit mark."""
        content = {name: getattr(self, name) for name in Content.__struct_fields__}
        data = msgspec.json.format(msgspec.json.encode(content), indent=1)
        with atomic_write(folder / FILE_NAME) as file:
            file.write(data + b"\n")


def relative_error(found: Array, wanted: Array) -> float:
    """max |found - wanted| / max |wanted|; infinite where shapes differ or a NaN shows."""
    if found.shape != wanted.shape:
        return float("inf")
    error = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    return error if np.isfinite(error) else float("inf")


def find_bundle(engine: Path) -> Path:
    """The folder of a bundle, given the folder or any engine file in it.

    A bare file name is looked for in the working folder, in `build/mnist` and in the bundle that
    came with the runtime. Raises ArtefactError.
    """
    if (engine / FILE_NAME).is_file():
        return engine
    if engine.is_file() and (engine.parent / FILE_NAME).is_file():
        return engine.parent
    bare = engine.parent == Path() and engine.suffix != ""
    for folder in (DEFAULT_BUNDLE, SHIPPED) if bare else ():
        if (folder / engine).is_file():
            return folder
    if bare and not engine.exists():
        raise ArtefactError(
            f"no bundle is here: looked for {engine} in {Path.cwd()}, in {DEFAULT_BUNDLE} there "
            f"and beside the runtime in {SHIPPED}. Pass --engine FOLDER, that of a manifest.json, "
            "or make one where PyTorch is: python -m export"
        )
    there = "no such file or folder"
    if engine.is_dir():
        there = f"a folder without {FILE_NAME} in it"
    elif engine.is_file():
        there = f"a file without {FILE_NAME} beside it"
    raise ArtefactError(f"{engine}: {there}; expected a bundle or an engine file in one. {REBUILD}")


def read_manifest(folder: Path, expect_sha256: str | None = None) -> Manifest:
    """Read and check a bundle's manifest; raises ArtefactError.

    `expect_sha256` pins the manifest, and through its hashes every file, to a trusted one.
    """
    path = folder / FILE_NAME
    data = read_bytes(path, "a bundle's manifest", REBUILD, LARGEST_MANIFEST, within=folder)
    found = sha256(data)
    if expect_sha256 is not None and found != expect_sha256.lower():
        raise ArtefactError(f"{path}: SHA-256 {found}; expected {expect_sha256}. Do not use it")
    with parsing(path, "manifest", REBUILD):
        made_for = msgspec.json.decode(data, type=_Head).format
        if made_for != FORMAT:
            raise ArtefactError(
                f"{path}: format {made_for}; this version reads {FORMAT}. Make the bundle again "
                f"with: python -m export --checkpoint CHECKPOINT.safetensors --out {quoted(folder)}"
            )
        content = msgspec.json.decode(data, type=Content)
    return Manifest(**msgspec.structs.asdict(content), folder=folder, sha256=found)


class _Head(Struct):
    """What every format of the manifest has begun with."""

    format: int
