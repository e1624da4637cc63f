"""What is compared: a guided denoising step in several forms, on several engines.

`prepare` needs PyTorch and writes graphs and inputs; `benchmarks.steps` measures contenders.
"""

import argparse
import multiprocessing
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime import cli
from runtime.bundle.files import sha256
from runtime.bundle.interface import Range, size_name
from runtime.bundle.manifest import Array, GraphSpec, Lifetime, TensorSpec
from runtime.coordinates import grid

if TYPE_CHECKING:
    from torch import Tensor

    from reference.families.r2.model import R2Models

Size = tuple[int, int]
Interface = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]

LARGEST_AXIS = 1 << 16  # of the sizes that a benchmark's graph takes
ALPHA_BAR = 0.3
LABEL = 7
GEMM_ROWS = 1024  # tokens of the product that gives the machine's rate: its arrays stay in cache
WEIGHT_NOISE = 0.02  # standard deviation; the weights' own is 0.04 at the published width
EXPORT_SIZE = (5, 7)


@dataclass(frozen=True)
class Contender:
    """`engine` runs `graph`; torch runs the published layout's module itself.

    Engines are torch, torch.compile, plan (of TensorRT), a provider by name, or onnxruntime: the
    provider of the device. A `peer` heads a column of ratios: what a user could pick instead, or
    our own fp32. A quick comparison leaves the `slow` ones out. `capture`: replays a CUDA graph.
    """

    name: str
    engine: str
    graph: str
    precision: str = "fp32"
    peer: bool = False
    slow: bool = False
    capture: bool = False


# ORT is ONNX Runtime, `chunks` the form of our graph that the runtime opens for processors.
CONTENDERS = (
    Contender("torch eager", "torch", "published", peer=True),
    Contender("torch.compile", "torch.compile", "published", peer=True, slow=True),
    Contender("plain, ORT", "cpu", "published", peer=True),
    Contender("plain, OpenVINO", "openvino", "published", peer=True),
    Contender("ours, ORT", "cpu", "r2id"),
    Contender("ours, ORT, chunks", "cpu", "r2id.cpu", peer=True),
    Contender("ours, OpenVINO", "openvino", "r2id"),
    Contender("ours, OpenVINO bf16", "openvino", "r2id", "bf16"),
    Contender("ours, ORT int8", "cpu", "r2id.int8", slow=True),
    Contender("ours, OpenVINO int8", "openvino", "r2id.int8", slow=True),
)
# On a GPU, in the order of their turns. TF32 is fp32 whose products round to 10 bits of fraction.
PRECISIONS = ("fp32", "bf16", "tf32", "fp16")
FORMS = {"bf16": "r2id.bf16", "fp16": "r2id.fp16"}
DEVICE_CONTENDERS = (
    *(Contender(f"torch eager {p}", "torch", "published", p, peer=True) for p in PRECISIONS),
    Contender("plain, ORT fp32", "onnxruntime", "published"),
    *(
        Contender(f"ours, {name} {p}", engine, FORMS.get(p, "r2id"), p, **more)
        for name, engine, more in (
            ("ORT", "onnxruntime", {}),
            ("ORT captured", "onnxruntime", {"capture": True}),
            ("plan", "plan", {}),
        )
        for p in PRECISIONS
    ),
    *(
        Contender(f"torch.compile {p}", "torch.compile", "published", p, peer=True, slow=True)
        for p in PRECISIONS
    ),
)
# The same two products of an FFN on both libraries: what the machine gives, and what torch gets.
GEMMS = (
    Contender("GEMM, ORT", "cpu", "gemm"),
    Contender("GEMM, torch", "torch gemm", "gemm"),
)


@dataclass(frozen=True)
class Prepared:
    """`folder` holds a file per graph and inputs per size; `flops[kind][size]` of one step.

    Forms of a graph, as r2id.fp16 is of r2id, are of one kind: they share inputs and work.
    """

    folder: Path
    config: str
    specs: dict[str, GraphSpec]
    flops: dict[str, dict[Size, int]]

    def file(self, graph: str) -> Path:
        return self.folder / f"{graph}.onnx"

    def inputs(self, graph: str, size: Size) -> dict[str, Array]:
        """A graph's inputs."""
        with np.load(self.folder / f"{kind_of(graph)}-{size_name(size)}.npz") as arrays:
            return dict(arrays)

    def work(self, graph: str, size: Size) -> int:
        """Floating-point operations of a graph's run."""
        return self.flops[kind_of(graph)][size]


def kind_of(graph: str) -> str:
    return graph.split(".")[0]


@dataclass(frozen=True)
class Measured:
    """Seconds of each step, eps, and the peak of bytes in use: in all, and since loading.

    Of resident memory on a processor; on a GPU of its own memory, the library's context left out.
    """

    seconds: list[float]
    eps: NDArray[np.float32]
    peak: int
    own: int


def add_options(
    parser: argparse.ArgumentParser, out: Path = Path("build/bench"), rounds: bool = True
) -> None:
    """What every comparison of steps can be asked for."""
    add = parser.add_argument
    if rounds:
        add("--rounds", type=cli.number(1, 1000, int), help="processes of each, at each size (3)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="CPU threads of each (2)")
    add("--config", default="published", help="configuration in reference/configs (published)")
    add("--out", type=Path, default=out, help=f"folder of the results ({out})")


def build(config: str) -> "R2Models":
    """A configuration with random weights, the same in every process.

    Fresh models have keys like their queries and biases of zero: engines compute the former once
    and drop the latter, which they could not do with trained weights. So every weight is moved.
    """
    import torch

    from reference.train import build_models, read_config

    models = build_models(read_config(config), config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in models.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=WEIGHT_NOISE)
    return models


def prepare(
    folder: Path, config: str, sizes: list[Size], forms: Collection[str] = ("r2id.int8",)
) -> Prepared:
    """Write every graph, `forms` of the step's among them, and all inputs; count the work."""
    import torch

    from benchmarks.published import PublishedR2ID
    from export.chunk import chunk_ffn
    from export.families.r2 import bundle as r2
    from export.to_onnx import onnx_from_source

    models = build(config)
    source = next(source for source in r2.sources(models) if source.name == "r2id")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # each export takes one core
        plain = pool.submit(export_published, config)
        ours = onnx_from_source(source)
        published = plain.result()
    chunked = chunk_ffn(ours)
    assert chunked is not None  # the step graph has FFNs
    graphs = {
        "published": (published, *interface(plain_inputs(models, EXPORT_SIZE))),
        "r2id": (ours, source.inputs, source.outputs),
        "r2id.cpu": (chunked, source.inputs, source.outputs),
        "gemm": (gemm_graph(models), *gemm_interface(models)),
    }
    specs = {}
    for name, (model, *sides) in graphs.items():
        specs[name] = write_graph(folder, name, model, *sides)
    flops: dict[str, dict[Size, int]] = {kind_of(name): {} for name in graphs}
    modules = {"published": PublishedR2ID(models), "r2id": source.module}
    with torch.inference_mode():
        for size in sizes:
            feeds = {"published": plain_inputs(models, size), "r2id": our_inputs(models, size)}
            for name, feed in feeds.items():
                arrays = {key: tensor.numpy() for key, tensor in feed.items()}
                np.savez(folder / f"{name}-{size_name(size)}.npz", **arrays)
                flops[name][size] = count_flops(modules[name], feed)
            flops["gemm"][size] = 2 * 2 * GEMM_ROWS * width(models) * 4 * width(models)
    prepared = Prepared(folder, config, specs, flops)
    for form in sorted(forms):
        made = in_form(form, ours, specs["r2id"], prepared.inputs("r2id", sizes[0]), sizes[0])
        specs[form] = write_graph(folder, form, made, source.inputs, source.outputs)
    return prepared


def in_form(form: str, model: Any, spec: GraphSpec, inputs: dict[str, Array], size: Size) -> Any:
    """The step graph in the precision that ends a form's name."""
    precision = form.split(".")[1]
    if precision == "int8":
        return in_int8(model, spec, size, inputs)
    from calibration.half import half_from_fp32

    return half_from_fp32(model, spec, precision)


def write_graph(
    folder: Path,
    name: str,
    model: Any,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> GraphSpec:
    """A graph's file in `folder`, and its spec."""
    data = model.SerializeToString()
    path = folder / f"{name}.onnx"
    path.write_bytes(data)
    # A plain export gets no form per size in OpenVINO, as nobody asked for one.
    lifetime: Lifetime = "size" if name.startswith("published") else "step"
    form = name.split(".")[-1]
    precision = form if form in PRECISIONS else "fp32"
    ranges = {axis: Range(1, LARGEST_AXIS) for tensor in inputs for axis in tensor.names}
    return GraphSpec(path.name, sha256(data), precision, lifetime, inputs, outputs, ranges)


def in_int8(model: Any, spec: GraphSpec, size: Size, inputs: dict[str, Array]) -> Any:
    """The step graph with every layer in int8 that may be: a bundle's choice leaves a few out."""
    from calibration.quantize import FORMS, layers, quantized, token_ranges
    from calibration.samples import Sample

    own = [*layers(model, spec).values()]
    tokens = [*dict.fromkeys(layer.tokens for layer in own if layer.tokens)]
    ranges = token_ranges(model, tokens, [Sample("r2id", size, inputs)], [100])
    return quantized(model, own, FORMS["int8"], ranges[100])


def width(models: "R2Models") -> int:
    return models.config.r2id.width


def gemm_interface(models: "R2Models") -> Interface:
    axes = (1, "rows", width(models))
    return (TensorSpec("x", "float32", axes),), (TensorSpec("y", "float32", axes),)


def interface(inputs: "dict[str, Tensor]") -> Interface:
    """The published graph's inputs and outputs, height and width dynamic."""
    axes: dict[str, tuple[str | int, ...]] = {key: tuple(t.shape) for key, t in inputs.items()}
    axes["latent"] = (*axes["latent"][:2], "height", "width")
    axes["coordinates"] = ("height", "width", 4)
    eps = TensorSpec("eps", "float32", (len(inputs["labels"]), *axes["latent"][1:]))
    return tuple(TensorSpec(key, "float32", own) for key, own in axes.items()), (eps,)


def export_published(config: str) -> Any:
    """The ONNX graph of the published layout as a user would export it."""
    import torch

    from benchmarks.published import PublishedR2ID
    from export.to_onnx import OPSET, quiet

    models = build(config)
    module, inputs = PublishedR2ID(models), plain_inputs(models, EXPORT_SIZE)
    dynamic = torch.export.Dim.DYNAMIC
    with quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["eps"],
            dynamic_shapes=({2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic}, {}, {}),
            verbose=False,
        )
    assert program is not None  # torch types it so for its older exporter
    return program.model_proto


def gemm_graph(models: "R2Models") -> Any:
    """An FFN's two products and nothing between them: `[1, rows, d]` -> `[1, rows, d]`."""
    from onnx import TensorProto, helper, numpy_helper

    ffn = models.r2id.encoder[0].ffn
    weights = [linear.weight.T.contiguous().numpy() for linear in (ffn.up, ffn.down)]
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "rows", width(models)))
        for name in ("x", "y")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "down"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(w, n) for w, n in zip(weights, ("up", "down"), strict=True)
    ]
    graph = helper.make_graph(nodes, "gemm", sides[:1], sides[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def count_flops(module: Any, inputs: "dict[str, Tensor]") -> int:
    """Multiplications and additions of a step's products and convolutions, counted as it runs.

    On tensors that have a shape and no values, so that counting costs nothing at any size.
    """
    from torch._subclasses import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused attention; written out it is two products.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, sdpa_kernel(SDPBackend.MATH):
        shapes = [fake.from_tensor(tensor) for tensor in inputs.values()]
        with FlopCounterMode(display=False) as counter:
            module(*shapes)
    return int(counter.get_total_flops())


def random_latent(channels: int, size: Size) -> np.ndarray:
    """A latent `[1, C, H, W]` in [-1, 1]."""
    return np.tanh(np.random.default_rng(0).standard_normal((1, channels, *size), np.float32))


def plain_inputs(models: "R2Models", size: Size) -> "dict[str, Tensor]":
    """What the published model takes in every step."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 1, models.config.condition.labels)
    labels[1, 0, LABEL] = 1
    channels = models.config.r2id.latent_channels
    return {
        "latent": torch.randn(1, channels, *size, generator=generator),
        "coordinates": torch.from_numpy(grid(*size)),
        "alpha_bar": torch.tensor([ALPHA_BAR]),
        "labels": labels,
    }


def our_inputs(models: "R2Models", size: Size) -> "dict[str, Tensor]":
    """What our step graph takes: the rest was computed once."""
    from export.families.r2 import bundle as r2

    plain = plain_inputs(models, size)
    modules = {source.name: source.module for source in r2.sources(models)}
    text_k, text_v = modules["r2id_condition"](plain["labels"][:, 0])
    return {
        "latent": plain["latent"],
        "position": modules["r2id_position"](plain["coordinates"]),
        "film": modules["r2id_film"](plain["alpha_bar"])[0],
        "text_k": text_k.unsqueeze(1),
        "text_v": text_v.unsqueeze(1),
    }
