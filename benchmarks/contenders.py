"""What is compared: a guided denoising step in several forms, on several engines.

`prepare` needs PyTorch and writes graphs and inputs; `measure` runs one contender in a process of
its own, which imports that contender's library alone, so that its memory is its own.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime import cli
from runtime.bundle.files import sha256
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import Array, GraphSpec, Lifetime, TensorSpec
from runtime.coordinates import grid
from runtime.engines import EngineOptions
from runtime.memory import peak_resident, resident

if TYPE_CHECKING:
    from torch import Tensor

    from reference.families.r2.model import R2Models

Size = tuple[int, int]
Step = Callable[[], Array]
Interface = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]

ALPHA_BAR = 0.3
LABEL = 7
GEMM_ROWS = 1024  # tokens of the product that gives the machine's rate: its arrays stay in cache
FEWEST_STEPS = 3
WEIGHT_NOISE = 0.02  # standard deviation; the weights' own is 0.04 at the published width
EXPORT_SIZE = (5, 7)


@dataclass(frozen=True)
class Contender:
    """`engine` runs `graph`; torch runs the published layout's module itself.

    A `peer` heads a column of ratios: what a user could pick instead, or our own fp32. A quick
    comparison leaves the `slow` ones out.
    """

    name: str
    engine: str
    graph: str
    precision: str = "fp32"
    peer: bool = False
    slow: bool = False


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
# The same two products of an FFN on both libraries: what the machine gives, and what torch gets.
GEMMS = (
    Contender("GEMM, ORT", "cpu", "gemm"),
    Contender("GEMM, torch", "torch gemm", "gemm"),
)


@dataclass(frozen=True)
class Prepared:
    """`folder` holds a file per graph and inputs per size; `flops[graph][size]` of one step."""

    folder: Path
    config: str
    specs: dict[str, GraphSpec]
    flops: dict[str, dict[Size, int]]

    def file(self, graph: str) -> Path:
        return self.folder / f"{graph}.onnx"

    def inputs(self, graph: str, size: Size) -> dict[str, Array]:
        """A graph's inputs; its forms share them."""
        kind = graph.split(".")[0]
        with np.load(self.folder / f"{kind}-{size_name(size)}.npz") as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class Measured:
    """Seconds of each step, eps, and the peak of resident bytes: in all, and since loading."""

    seconds: list[float]
    eps: NDArray[np.float32]
    peak: int
    own: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison of steps can be asked for."""
    add = parser.add_argument
    add("--rounds", type=cli.number(1, 1000, int), help="processes of each, at each size (3)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="CPU threads of each (2)")
    add("--config", default="published", help="configuration in reference/configs (published)")
    add("--out", type=Path, default=Path("build/bench"), help="folder of the results (build/bench)")


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


def prepare(folder: Path, config: str, sizes: list[Size]) -> Prepared:
    """Write every graph and the inputs at every size; count the work."""
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
    flops: dict[str, dict[Size, int]] = {name: {} for name in (*graphs, "r2id.int8")}
    modules = {"published": PublishedR2ID(models), "r2id": source.module}
    with torch.inference_mode():
        for size in sizes:
            feeds = {"published": plain_inputs(models, size), "r2id": our_inputs(models, size)}
            for name, feed in feeds.items():
                arrays = {key: tensor.numpy() for key, tensor in feed.items()}
                np.savez(folder / f"{name}-{size_name(size)}.npz", **arrays)
                flops[name][size] = count_flops(modules[name], feed)
            flops["r2id.cpu"][size] = flops["r2id.int8"][size] = flops["r2id"][size]
            flops["gemm"][size] = 2 * 2 * GEMM_ROWS * width(models) * 4 * width(models)
    prepared = Prepared(folder, config, specs, flops)
    int8 = in_int8(ours, specs["r2id"], sizes[0], prepared.inputs("r2id", sizes[0]))
    specs["r2id.int8"] = write_graph(folder, "r2id.int8", int8, source.inputs, source.outputs)
    return prepared


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
    return GraphSpec(path.name, sha256(data), "fp32", lifetime, inputs, outputs, {})


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
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        shapes = [fake.from_tensor(tensor) for tensor in inputs.values()]
        with FlopCounterMode(display=False) as counter:
            module(*shapes)
    return int(counter.get_total_flops())


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


def measure(
    prepared: Prepared, contender: Contender, size: Size, threads: int, seconds: float
) -> Measured:
    """Time a contender's steps for `seconds`, two at least; for a process of its own."""
    given = contender.graph
    feed = gemm_input(prepared) if given == "gemm" else prepared.inputs(given, size)
    open_step = open_torch if contender.engine.startswith("torch") else open_engine
    step, before = open_step(prepared, contender, feed, threads)
    for _ in range(2):
        eps = step()
    times: list[float] = []
    while len(times) < FEWEST_STEPS or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = peak_resident()
    return Measured(times, eps.copy(), peak, peak - before)


def gemm_input(prepared: Prepared) -> dict[str, Array]:
    channels = prepared.specs["gemm"].inputs[0].axes[-1]
    return {"x": np.ones((1, GEMM_ROWS, int(channels)), np.float32)}


def open_engine(
    prepared: Prepared, contender: Contender, feed: dict[str, Array], threads: int
) -> tuple[Step, int]:
    """A step on an engine of the runtime, and the resident bytes before its graph was opened."""
    spec = prepared.specs[contender.graph]
    model = prepared.file(contender.graph).read_bytes()
    options = EngineOptions(contender.engine, threads=threads, precision=contender.precision)
    name = spec.outputs[0].name
    if contender.engine == "openvino":
        from runtime.engines.openvino import OpenVinoEngine, load_core

        load_core()
        before = resident()
        compiled = OpenVinoEngine(spec, model, options)
        return lambda: compiled.run(feed)[name], before
    from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library

    load_library()
    before = resident()
    session = OnnxRuntimeEngine(spec, model, options)
    return lambda: session.run(feed)[name], before


def open_torch(
    prepared: Prepared, contender: Contender, feed: dict[str, Array], threads: int
) -> tuple[Step, int]:
    """A step in PyTorch, and the resident bytes before the model was built."""
    # Compiled code is kept, so that only the first round of a size has to wait for it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepared.folder / "inductor"))
    import torch

    from benchmarks.published import PublishedR2ID

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    before = resident()
    models = build(prepared.config)
    module: Callable[..., Tensor] = PublishedR2ID(models)
    if contender.graph == "gemm":
        ffn = models.r2id.encoder[0].ffn
        up, down = (linear.weight.T.contiguous() for linear in (ffn.up, ffn.down))
        module = lambda x: x @ up @ down  # noqa: E731
    if contender.engine == "torch.compile":
        module = torch.compile(module)
    inputs = [torch.from_numpy(array) for array in feed.values()]
    return lambda: module(*inputs).numpy(), before
