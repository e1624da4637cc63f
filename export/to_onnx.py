"""Checkpoint → ONNX graphs with named dynamic axes."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from runtime.bundle.interface import LARGEST, Range
from runtime.bundle.manifest import Axis, Lifetime, TensorSpec
from runtime.coordinates import grid
from runtime.errors import ArtefactError

OPSET = 20
# Sizes that examples are traced at: no two axes alike, none 0 or 1, which would be baked in.
EXAMPLE = {"batch": 2, "conditions": 3, "steps": 4}
FURTHER = {"height": 4, "width": 6}  # multiples above the least legal side
ANY = Range(1, LARGEST)
LARGEST_FILE = (1 << 31) - (1 << 20)  # bytes: a message of Protocol Buffers, nodes left room for


@dataclass(frozen=True)
class GraphSource:
    """A graph before its export: a module and what goes in and comes out by name and axes.

    `positive` names inputs that are at least 1 wherever the runtime gives them, as sums of
    positive features are, `bounded` those within ±1. `floats_per_pixel` as in `GraphSpec`.
    """

    name: str
    lifetime: Lifetime
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    positive: frozenset[str] = frozenset()
    floats_per_pixel: int = 0
    bounded: frozenset[str] = frozenset({"pixels"})

    @property
    def axes(self) -> list[str]:
        """The named axes of the inputs."""
        return [*dict.fromkeys(axis for spec in self.inputs for axis in spec.names)]

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Inputs of the kind that the runtime gives, at `sizes` of the named axes."""
        return tuple(self._input(spec, sizes, generator) for spec in self.inputs)

    def _input(self, spec: TensorSpec, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        """One input: a grid, alpha_bar in [0, 1], log_snr, positive or normal numbers."""
        shape = spec.shape(sizes)
        if spec.name == "coordinates":
            return torch.from_numpy(grid(shape[0], shape[1]))
        if spec.name == "alpha_bar":
            return torch.linspace(0, 1, shape[0])
        if spec.name == "log_snr":
            return torch.linspace(-14, 9, shape[0])
        values = torch.randn(shape, generator=generator)
        if spec.name in self.positive:
            return values.abs() + 1
        return values.tanh() if spec.name in self.bounded else values


def graph_source(
    name: str,
    lifetime: Lifetime,
    module: nn.Module,
    inputs: dict[str, tuple[Axis, ...]],
    outputs: dict[str, tuple[Axis, ...]],
    bounded: Iterable[str] = (),
) -> GraphSource:
    """A graph whose tensors are float32, each with its axes; `bounded` as in `GraphSource`."""
    taken, given = (
        tuple(TensorSpec(key, "float32", axes) for key, axes in side.items())
        for side in (inputs, outputs)
    )
    within = frozenset(bounded)
    return GraphSource(name, lifetime, module.eval(), taken, given, bounded=within)


def onnx_from_source(source: GraphSource, sides: Range = ANY) -> onnx.ModelProto:
    """Export one graph, height and width of `sides`.

    Raises ArtefactError for a fixed axis, and for more weights than one file can hold.
    """
    check_weights(source)
    generator = torch.Generator().manual_seed(0)
    example = EXAMPLE | {
        axis: sides.minimum + count * sides.multiple for axis, count in FURTHER.items()
    }
    dynamic = tuple(
        {i: dimension(axis, sides) for i, axis in enumerate(spec.axes) if isinstance(axis, str)}
        for spec in source.inputs
    )
    with quiet():
        program = torch.onnx.export(
            source.module,
            source.example(example, generator),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in source.inputs],
            output_names=[spec.name for spec in source.outputs],
            # By the names of the module's parameters: several may be taken as one.
            dynamic_shapes=inspect.signature(source.module.forward).bind(*dynamic).arguments,
            verbose=False,
        )
    assert program is not None  # torch types it so for its older exporter
    model = program.model_proto
    name_axes(model, source)
    onnx.checker.check_model(model)
    return model


def check_weights(source: GraphSource) -> None:
    """Raise ArtefactError where a graph's file would be larger than Protocol Buffers allow."""
    tensors = (*source.module.parameters(), *source.module.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > LARGEST_FILE:
        raise ArtefactError(
            f"{source.name}: has weights of {size / 1e9:.2f} GB; expected at most "
            f"{LARGEST_FILE / 1e9:.2f}, which is what one ONNX file holds: weights in a second one "
            "would be refused when the graph is opened. Take a smaller width or fewer blocks"
        )


def dimension(axis: str, sides: Range) -> Any:
    """A named axis for the exporter, which is told what a height or width is a multiple of."""
    name, _, divisor = axis.partition("/")
    multiple = sides.multiple // int(divisor or 1)
    if name not in FURTHER or sides.multiple == 1:
        return torch.export.Dim.DYNAMIC
    cells = torch.export.Dim(f"{name}_cells")
    return cells if multiple == 1 else multiple * cells


def name_axes(model: onnx.ModelProto, source: GraphSource) -> None:
    """Give every axis of the interface its name or number; raises ArtefactError on a mismatch."""
    interface = [*zip(source.inputs, model.graph.input, strict=True)]
    interface += [*zip(source.outputs, model.graph.output, strict=True)]
    for spec, value in interface:
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(spec.axes) or value.name != spec.name:
            raise ArtefactError(
                f"{source.name}: {value.name} has {len(dims)} axes; "
                f"expected {spec.name} {spec.axes}"
            )
        for dim, axis in zip(dims, spec.axes, strict=True):
            baked_in = bool(dim.dim_value) and dim.dim_value != axis
            if baked_in:
                raise ArtefactError(
                    f"{source.name}: {spec.name} has {dim.dim_value} where {axis!r} is expected: "
                    "the exporter baked a size in"
                )
            if isinstance(axis, str):
                dim.dim_param = axis
            else:
                dim.dim_value = axis
    # Shapes between the nodes were traced under other names; engines infer them anew.
    del model.graph.value_info[:]
    for node in model.graph.node:  # where in whose folder each line of code was
        del node.metadata_props[:]


@contextlib.contextmanager
def quiet() -> Any:
    """Keep the exporter's chatter from the progress bar; its errors are still raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
