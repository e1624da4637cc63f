"""Checkpoint → ONNX graphs with named dynamic axes."""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from reference.families.r2.model import R2Models
from torch import Tensor, nn

from export.families.r2 import graphs
from runtime.bundle.manifest import Axis, TensorSpec
from runtime.coordinates import grid
from runtime.errors import ArtefactError

OPSET = 20
# Sizes that examples are traced at: no two axes alike, none 0 or 1, which would be baked in.
EXAMPLE = {"batch": 2, "conditions": 3, "height": 5, "width": 7, "steps": 4}


@dataclass(frozen=True)
class GraphSource:
    """A graph before its export: a module and what goes in and comes out by name and axes."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Inputs of the kind that the runtime gives, at `sizes` of the named axes."""
        return tuple(example_input(spec, sizes, generator) for spec in self.inputs)


def example_input(spec: TensorSpec, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    """One input: a grid, alpha_bar in [0, 1], positive means of phi, else normal."""
    shape = spec.shape(sizes)
    if spec.name == "coordinates":
        return torch.from_numpy(grid(shape[0], shape[1]))
    if spec.name == "alpha_bar":
        return torch.linspace(0, 1, shape[0])
    values = torch.randn(shape, generator=generator)
    if spec.name in ("k", "response", "text_k"):
        return values.abs() + 1
    return values.tanh() if spec.name == "pixels" else values


def sources(models: R2Models) -> list[GraphSource]:
    """Every graph of the design, in the order in which the runtime needs them."""
    ir, id_, text = models.config.r2ir, models.config.r2id, models.config.condition
    film = graphs.Film(models)
    rank = id_.heads * text.tokens
    latent = ("batch", ir.latent_channels, "height", "width")
    pixels = ("batch", ir.color_channels, "height", "width")
    coordinates = ("height", "width", 4)
    text_k = (id_.decoder_blocks, id_.width, rank)
    text_v = (id_.decoder_blocks, rank, id_.width)

    def sums(blocks: int) -> dict[str, tuple[Axis, ...]]:
        return {"kv": ("batch", blocks, ir.width, ir.width), "k": ("batch", blocks, ir.width)}

    encoder, decoder = sums(ir.encoder_blocks), sums(ir.decoder_blocks)
    response = {"response": ("batch", ir.decoder_blocks, 2, ir.width)}

    def source(
        name: str,
        module: nn.Module,
        inputs: dict[str, tuple[Axis, ...]],
        outputs: dict[str, tuple[Axis, ...]],
    ) -> GraphSource:
        specs = [
            tuple(TensorSpec(key, "float32", axes) for key, axes in side.items())
            for side in (inputs, outputs)
        ]
        return GraphSource(name, module.eval(), specs[0], specs[1])

    return [
        source(
            "r2id_position",
            graphs.Position(models),
            {"coordinates": coordinates},
            {"position": ("height", "width", id_.width)},
        ),
        source(
            "r2id_film",
            film,
            {"alpha_bar": ("steps",)},
            {"film": ("steps", film.width)},
        ),
        source(
            "r2id_condition",
            graphs.Condition(models),
            {"condition": ("conditions", text.labels)},
            {"text_k": ("conditions", *text_k), "text_v": ("conditions", *text_v)},
        ),
        source(
            "r2id",
            graphs.Denoise(models),
            {
                "latent": latent,
                "position": ("height", "width", id_.width),
                "film": (film.width,),
                "text_k": ("conditions", "batch", *text_k),
                "text_v": ("conditions", "batch", *text_v),
            },
            {"eps": ("conditions", *latent)},
        ),
        source(
            "r2ir_image_summary",
            graphs.ResamplerSummary(models, "image"),
            {"pixels": pixels, "coordinates": coordinates},
            encoder,
        ),
        source(
            "r2ir_encode",
            graphs.Encode(models, "latent"),
            {"coordinates": coordinates, **encoder},
            {"latent": latent},
        ),
        source(
            "r2ir_latent_summary",
            graphs.ResamplerSummary(models, "latent"),
            {"latent": latent, "coordinates": coordinates},
            decoder,
        ),
        source(
            "r2ir_decode",
            graphs.Decode(models, "image"),
            {"coordinates": coordinates, **decoder},
            {"pixels": pixels, **response},
        ),
        source(
            "r2ir_render",
            graphs.Render(models, "image"),
            {"coordinates": coordinates, **decoder, **response},
            {"pixels": pixels},
        ),
        source(
            "r2ir_response",
            graphs.Response(models, "image"),
            {"coordinates": coordinates, **decoder, **response},
            {f"squares_{site}": ("batch", ir.width) for site in range(2 * ir.decoder_blocks)},
        ),
    ]


def onnx_from_source(source: GraphSource) -> onnx.ModelProto:
    """Export one graph; raises ArtefactError where an axis was baked in."""
    generator = torch.Generator().manual_seed(0)
    dynamic: dict[str, Any] = {
        spec.name: {i: torch.export.Dim.DYNAMIC for i, a in enumerate(spec.axes) if named(a)}
        for spec in source.inputs
    }
    with quiet():
        program = torch.onnx.export(
            source.module,
            source.example(EXAMPLE, generator),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in source.inputs],
            output_names=[spec.name for spec in source.outputs],
            dynamic_shapes=tuple(dynamic.values()),
            verbose=False,
        )
    assert program is not None  # torch types it so for its older exporter
    model = program.model_proto
    name_axes(model, source)
    onnx.checker.check_model(model)
    return model


def named(axis: Axis) -> bool:
    return isinstance(axis, str)


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
