"""Parity of every exported graph with PyTorch, at sizes that the exporter never saw."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from export.families import Family
from export.to_onnx import GraphSource
from runtime.bundle.interface import Range
from runtime.bundle.manifest import Array, Manifest, Parity, Trajectory, relative_error
from runtime.errors import ArtefactError
from runtime.pipeline.bundle import Bundle
from runtime.sampling.guidance import guided
from runtime.sampling.labels import Label
from runtime.sampling.loop import sample
from runtime.sampling.request import Request

TOLERANCE = 1e-4
TRAJECTORY_TOLERANCE = 1e-3
TRAJECTORY_STEPS = 20
TRAJECTORY_SIZE = (9, 6)
SIZES = ((1, 1), (1, 9), (7, 5), (16, 16), (31, 64), (64, 64))
SMALL_GRAPH_SIZES = (*SIZES, (2, 2), (3, 128), (97, 101))
MOST_CELLS = 1 << 15
# Multiply-adds of a run, about: larger ones, of hundreds of millions of weights, take minutes each.
MOST_WORK = 1 << 39
BATCHES = (1, 3)
CONDITIONS = (1, 2, 3)
STEPS = (1, 5, 51)


def size_cases(source: GraphSource, sides: Range) -> Iterator[dict[str, int]]:
    """Sizes of the graph's named axes: all grids, batches, conditions and step counts.

    Grids count legal sides from the least on; those that are too large are left out, and runs
    whose weights meet too many tokens, which are about as many as such counts make.
    """
    axes = source.axes
    small = source.lifetime == "size"
    scaled = [
        tuple(sides.minimum + (count - 1) * sides.multiple for count in size)
        for size in (SMALL_GRAPH_SIZES if small else SIZES)
    ]
    grids = [
        (height, width)
        for height, width in scaled
        if height in sides and width in sides and height * width <= MOST_CELLS
    ]
    grids = grids if "height" in axes else [(0, 0)]
    weights = sum(parameter.numel() for parameter in source.module.parameters())
    batches = BATCHES if "batch" in axes else (0,)
    conditions = CONDITIONS if "conditions" in axes else (0,)
    steps = STEPS if "steps" in axes else (0,)
    for (height, width), batch, count, step in product(grids, batches, conditions, steps):
        sizes = {"height": height, "width": width, "batch": batch}
        sizes |= {"conditions": count, "steps": step}
        tokens = height * width // sides.multiple**2
        if weights * tokens * max(batch, 1) * max(count, 1) <= MOST_WORK:
            yield {axis: sizes[axis] for axis in sizes if axis in axes}


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """PyTorch as one of Polygraphy's backends: the module of a graph, before its export."""

    def __init__(self, source: GraphSource):
        super().__init__(name="PyTorch")
        self.source = source

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.source.inputs:
            shape = [None if isinstance(axis, str) else axis for axis in spec.axes]
            metadata.add(spec.name, np.dtype(spec.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: dict[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            made = self.source.module(*map(torch.from_numpy, feed_dict.values()))
        tensors = made if isinstance(made, tuple) else (made,)
        named = zip(self.source.outputs, tensors, strict=True)
        return {spec.name: tensor.numpy() for spec, tensor in named}


def parity(
    source: GraphSource, model: bytes, sides: Range, tolerance: float = TOLERANCE
) -> list[Parity]:
    """Errors of a graph on ONNX Runtime against its module in PyTorch, at every size case.

    Polygraphy runs both, one case after the other, and refuses inputs that are not the graph's.
    Raises ArtefactError over `tolerance`.
    """
    cases = list(size_cases(source, sides))
    names = [spec.name for spec in source.inputs]
    examples = (
        source.example(sizes, torch.Generator().manual_seed(n)) for n, sizes in enumerate(cases)
    )
    feeds = ({k: v.numpy() for k, v in zip(names, own, strict=True)} for own in examples)
    rows = []
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        backends = [TorchRunner(source), OnnxrtRunner(SessionFromOnnx(model), name="ONNX Runtime")]
        runs = Comparator.run(backends, data_loader=feeds, streaming=True)
        for sizes, run in zip(cases, runs, strict=True):
            wanted, found = (results[0] for _, results in run)
            errors = (relative_error(found[s.name], wanted[s.name]) for s in source.outputs)
            error = max(errors)
            if not error <= tolerance:
                raise ArtefactError(
                    f"{source.name}: differs from PyTorch by {error:.2e} at {sizes}; expected at "
                    f"most {tolerance:.0e}. The export is stopped and no manifest is written"
                )
            rows.append(Parity(sizes, float(f"{error:.2e}")))
    return rows


def trajectory_parity(family: Family, models: Any, manifest: Manifest) -> Trajectory:
    """A whole guided trajectory and its picture: the bundle against the reference models.

    This compares with `reference/`, not with the modules that were exported, so that it also
    guards the rewrites. Raises ArtefactError.
    """
    bundle, interface = Bundle(manifest), manifest.interface
    height, width = (interface.latent_sides.nearest(side) for side in TRAJECTORY_SIZE)
    count = len(interface.labels)
    label: Label = count // 2 if count else None
    request = Request([label], (height, width), steps=TRAJECTORY_STEPS)
    table = request.table(bundle.diffuser.schedule)
    guidance = bundle.diffuser.guidance(request, table)
    start = torch.from_numpy(bundle.diffuser.noise(request, request.latent).draw())
    with torch.inference_mode():
        denoise = models.denoiser(torch.from_numpy(guidance.conditions), table.alpha_bar)
        weights = [float(weight[0, 0, 0, 0]) for weight in guidance.at(0)]
        wanted = sample(guided(denoise, weights), start, table)
        pixels = family.decode(models, wanted, interface.image_size(request.latent))
    made = bundle.generate(request.labels, latent=request.latent, steps=TRAJECTORY_STEPS)
    errors = {
        "latent": relative_error(made.latents, wanted.numpy()),
        "pixels": relative_error(made.images, pixels.numpy()),
    }
    if not max(errors.values()) <= TRAJECTORY_TOLERANCE:
        raise ArtefactError(
            f"{TRAJECTORY_STEPS} steps through the graphs differ from PyTorch by {errors}; "
            f"expected at most {TRAJECTORY_TOLERANCE:.0e}"
        )
    rounded = {key: float(f"{error:.2e}") for key, error in errors.items()}
    return Trajectory(TRAJECTORY_STEPS, height, width, rounded)
