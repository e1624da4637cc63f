"""fp16 and bf16 graphs beside a bundle's fp32 ones: python -m calibration.half build/mnist.

What becomes half and what stays fp32 follows from what an op does, never from a node's name:

- A product of tokens and weights runs in half: these products are nearly all of the arithmetic.
  Convolutions stay fp32: ONNX has none in bf16 before opset 22.
- What is computed from their results alone (bias, LayerNorm, phi, SiLU) stays in half, unless
  fp32 alone reads it. ONNX's LayerNormalization reduces in fp32 in any precision.
- All else is fp32: the interface, coordinates, Fourier features and their projection, the tokens
  that residuals are added to, GRN, sums and means over tokens, the attention's normaliser, the
  projection to the output, and whatever has no tokens (gains, folded weights), which costs nothing.

The product phi(k)ᵀ·x sums over tokens before the graph divides by their number, so it leaves fp16's
65504 where a mean does not. It stays an fp32 product rather than a half one of operands scaled by
1/sqrt(N): these become subnormal as N grows, the summaries' outputs are sums anyhow, and no engine
can then accumulate it in half.

ONNX Runtime on CPU is no witness for half: it has no bf16 kernels, and it runs neighbouring fp16
ops in fp32 without rounding in between. So each graph is checked in an emulation: every half op
computed in fp32 and its result rounded to half by explicit casts, as tensor cores do that
accumulate in fp32.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.samples import Arrays, Samples, heavy
from runtime import cli
from runtime.bundle.commit import commit, editing
from runtime.bundle.files import atomic_write, sha256
from runtime.bundle.manifest import (
    DEFAULT_BUNDLE,
    Array,
    GraphSpec,
    Manifest,
    Parity,
    find_bundle,
    relative_error,
)
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library
from runtime.errors import ArtefactError
from runtime.progress import Bar

HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Largest relative_error of a graph: 64 unit roundoffs, of 2^-11 and 2^-8. It is the largest error
# of any one number: at the edge of a stroke, where tanh is steep, ten times that of the rest.
BOUNDS = {"fp16": 64 * 2**-11, "bf16": 64 * 2**-8}
LARGE = ((256, 256), (512, 512))
# Ops that may stay in half where the tokens they read are half: they sum nothing over tokens.
FOLLOWING = {
    *("Add", "Sub", "Mul", "Relu", "Min", "Max", "Exp", "Sigmoid", "LayerNormalization"),
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}
PROBES = ((4, 6), (10, 12))  # multiples of height and width above the least legal side
# Float tensor -> which of its axes grow with height and width.
Moving = dict[str, tuple[bool, ...]]


def moving_axes(model: ModelProto, spec: GraphSpec) -> Moving:
    """Which axes of each float tensor hold tokens, found by running the graph at two sizes."""
    probed = ModelProto()
    probed.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    inner = [name for node in model.graph.node for name in node.output if name not in outputs]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    library = load_library()
    settings = library.SessionOptions()
    settings.log_severity_level = 3
    session = library.InferenceSession(
        probed.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    axes = {axis for tensor in spec.inputs for axis in tensor.names}
    shapes: list[dict[str, tuple[int, ...]]] = []
    for further in PROBES:
        sizes = dict.fromkeys(axes, 2)
        for axis, count in zip(("height", "width"), further, strict=True):
            if (sides := spec.ranges.get(axis)) is not None:
                sizes[axis] = sides.minimum + count * sides.multiple
        values = {t.name: np.ones(t.shape(sizes), t.dtype) for t in spec.inputs}
        values |= dict(zip(names, session.run(names, values), strict=True))
        values |= {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        shapes.append({k: v.shape for k, v in values.items() if v.dtype == np.float32})
    return {
        name: tuple(a != b for a, b in zip(shape, shapes[1][name], strict=True))
        for name, shape in shapes[0].items()
    }


def half_tensors(graph: GraphProto, moving: Moving) -> set[str]:
    """The tensors that are computed in half; see the module's rules."""
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    kept = feature_sources(graph) | normaliser(graph) | output_sources(graph)
    kept |= read_in_fp32(graph, moving)
    half: set[str] = set()
    features: set[str] = set()
    for node in graph.node:
        tokens = [name for name in node.input if any(moving.get(name, ()))]
        copies = node.op_type == "MatMul" and is_selection(constants.get(node.input[1]))
        follows = node.op_type in FOLLOWING or copies
        if node.op_type in ("Sin", "Cos") or (follows and tokens and features.issuperset(tokens)):
            features.update(node.output)
        product = node.op_type == "MatMul" and not copies and not sums_tokens(node, moving)
        if not tokens or not kept.isdisjoint(node.output):
            continue
        if (product and features.isdisjoint(tokens)) or (follows and half.issuperset(tokens)):
            half.update(node.output)
    return half


def sums_tokens(node: NodeProto, moving: Moving) -> bool:
    """Whether a product contracts over an axis of tokens, as phi(k)ᵀ·x does."""
    return node.op_type == "MatMul" and moving[node.input[0]][-1]


def is_selection(matrix: Array | None) -> bool:
    """Whether a product with this constant copies numbers and adds none of them up."""
    if matrix is None or matrix.ndim < 2:
        return False
    return bool(np.isin(matrix, (0, 1)).all() and (matrix.sum(-2) <= 1).all())


def behind(graph: GraphProto, names: Iterable[str], go_on: Callable[[NodeProto], bool]) -> set[str]:
    """What the tensors `names` are computed from, they included, as far back as `go_on` holds."""
    producers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        if name in producers and name not in found:
            found.add(name)
            if go_on(producers[name]):
                waiting += producers[name].input
    return found


def feature_sources(graph: GraphProto) -> set[str]:
    """All that Fourier features are computed from, and they themselves."""
    names = [name for node in graph.node if node.op_type in ("Sin", "Cos") for name in node.output]
    return behind(graph, names, lambda node: True)


def normaliser(graph: GraphProto) -> set[str]:
    """What is divided by: back to and including the product that sums it up per token."""
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    names = [node.input[1] for node in graph.node if node.op_type == "Div"]

    def go_on(node: NodeProto) -> bool:
        copies = node.op_type == "MatMul" and is_selection(constants.get(node.input[1]))
        return copies or node.op_type in FOLLOWING

    return behind(graph, names, go_on)


def output_sources(graph: GraphProto) -> set[str]:
    """What becomes an output: back to and including the last product."""
    names = [value.name for value in graph.output]
    return behind(graph, names, lambda node: node.op_type in {*FOLLOWING, "Tanh"})


def read_in_fp32(graph: GraphProto, moving: Moving) -> set[str]:
    """Results of FOLLOWING ops that fp32 alone reads: to round them would save nothing."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()

    def in_fp32(reader: NodeProto) -> bool:
        product = reader.op_type == "MatMul" and not sums_tokens(reader, moving)
        return not (product or reader.op_type in FOLLOWING) or reader.output[0] in found

    for node in reversed(graph.node):
        after = [reader for name in node.output for reader in readers.get(name, [])]
        if node.op_type in FOLLOWING and all(in_fp32(reader) for reader in after):
            found.update(node.output)
    return found


class Rewriter:
    """Writes a graph anew, each float tensor in the precisions that its readers ask for.

    A tensor `t` is called `t` in fp32 and `t.fp16` or `t.bf16` in half; a cast from one to the
    other is made once, before its first reader.
    """

    def __init__(self, graph: GraphProto, moving: Moving, precision: str):
        self.graph, self.floats, self.precision = graph, moving.keys(), precision
        self.half = half_tensors(graph, moving)
        self.constants = {i.name: i for i in graph.initializer}
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto | None] = {}

    def name(self, tensor: str, in_half: bool) -> str:
        return f"{tensor}.{self.precision}" if in_half else tensor

    def read(self, tensor: str, in_half: bool) -> str:
        """The name of a float tensor in one precision, made there if it is not yet."""
        name = self.name(tensor, in_half)
        if name in self.made or (tensor in self.half) == in_half:
            return name
        kind = HALVES[self.precision]
        if tensor in self.constants and in_half:
            values = numpy_helper.to_array(self.constants[tensor])
            with np.errstate(over="ignore"):  # infinities are found by the checks
                rounded = values.astype(helper.tensor_dtype_to_np_dtype(kind))
            self.made[name] = numpy_helper.from_array(rounded, name)
        else:
            source, to = self.name(tensor, not in_half), kind if in_half else TensorProto.FLOAT
            self.nodes.append(helper.make_node("Cast", [source], [name], name=name, to=to))
            self.made[name] = None
        return name

    def rewrite(self) -> GraphProto:
        for node in self.graph.node:
            in_half = not self.half.isdisjoint(node.output)
            inputs = [self.read(i, in_half) if i in self.floats else i for i in node.input]
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = inputs
            copy.output[:] = [self.name(o, in_half) for o in node.output]
            self.nodes.append(copy)
        for value in self.graph.output:
            self.read(value.name, False)
        used = {name for node in self.nodes for name in node.input}
        constants = [tensor for name, tensor in self.constants.items() if name in used]
        constants += [tensor for tensor in self.made.values() if tensor is not None]
        inputs, outputs = self.graph.input, self.graph.output
        return helper.make_graph(self.nodes, self.graph.name, inputs, outputs, constants)


def half_from_fp32(model: ModelProto, spec: GraphSpec, precision: str) -> ModelProto:
    """The graph with its token products in `precision` (fp16 or bf16), its interface in fp32."""
    made = with_graph(model, Rewriter(model.graph, moving_axes(model, spec), precision).rewrite())
    onnx.checker.check_model(made, full_check=True)
    return made


def emulated(model: ModelProto) -> ModelProto:
    """The graph in fp32 alone, each result that was half rounded to it by a pair of casts."""
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    half = {name: kind for name, kind in kinds.items() if kind in HALVES.values()}
    nodes = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Cast" and not half.keys().isdisjoint([*node.input, *node.output]):
            copy = helper.make_node("Identity", node.input, node.output)
        rounded = [name for name in node.output if name in half]
        copy.output[:] = [f"{n}.exact" if n in half else n for n in node.output]
        nodes.append(copy)
        for name in rounded:
            there = helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=half[name])
            back = helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
            nodes += [there, back]
    constants = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        widened = numpy_helper.from_array(values.astype(np.float32), tensor.name)
        constants.append(widened if tensor.name in half else tensor)
    graph = model.graph
    made = helper.make_graph(nodes, graph.name, graph.input, graph.output, constants)
    return with_graph(model, made)


def with_graph(model: ModelProto, graph: GraphProto) -> ModelProto:
    """`model` with another graph and the same opset, format and metadata."""
    made = ModelProto()
    made.CopyFrom(model)
    made.graph.CopyFrom(graph)
    return made


def cases(spec: GraphSpec, large: Sequence[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """The sizes that the fp32 graph was checked at, then `large` ones with all else 1."""
    for row in spec.parity:
        yield dict(row.sizes)
    for height, width in large:
        yield dict.fromkeys(spec.parity[0].sizes, 1) | {"height": height, "width": width}


def check(found: Arrays, wanted: Arrays, precision: str, where: str) -> float:
    """The largest relative error of any output; raises ArtefactError over the bound or at NaN."""
    error = max(relative_error(found[name], wanted[name]) for name in wanted)
    if not error <= BOUNDS[precision]:
        reason = (
            f"differs from fp32 by {error:.2e}" if np.isfinite(error) else "has NaN or infinity"
        )
        raise ArtefactError(
            f"{where}: {precision} {reason}; expected a difference of at most "
            f"{BOUNDS[precision]:.3f}. Nothing is written; use --precision fp32 for this checkpoint"
        )
    return error


def make_variants(
    manifest: Manifest,
    precisions: Sequence[str],
    folder: Path,
    large: Sequence[tuple[int, int]],
) -> dict[str, dict[str, GraphSpec]]:
    """Write every heavy graph in each precision into `folder`, each checked; precision -> specs.

    Raises ArtefactError where a graph has NaN or infinity or is over the bound.
    """
    made: dict[str, dict[str, GraphSpec]] = {precision: {} for precision in precisions}
    fp32 = {name: manifest.graph(name) for name in heavy(manifest)}
    total = sum(len([*cases(spec, large)]) for spec in fp32.values())
    samples = Samples(manifest)
    with Bar(total=total, desc="half", unit="check") as bar:
        for name, spec in fp32.items():
            model = onnx.load_model_from_string(manifest.file_bytes(spec))
            engines = {}
            for precision in precisions:
                own, engines[precision] = write_variant(model, spec, name, precision, folder)
                made[precision][name] = own
            for number, sizes in enumerate(cases(spec, large)):
                bar.set_postfix_str(f"{name} {sizes['height']}x{sizes['width']}")
                inputs, wanted = samples.take(name, sizes, number)
                for precision, engine in engines.items():
                    error = check(engine.run(inputs), wanted, precision, f"{name} at {sizes}")
                    row = Parity(sizes, float(f"{error:.2e}"))
                    made[precision][name].parity.append(row)
                bar.update()
    return made


def write_variant(
    model: ModelProto, spec: GraphSpec, name: str, precision: str, folder: Path
) -> tuple[GraphSpec, OnnxRuntimeEngine]:
    """One graph's file in `folder`, its spec without parity yet, and its emulation, opened."""
    variant = half_from_fp32(model, spec, precision)
    data = variant.SerializeToString(deterministic=True)
    file = f"{name}.{precision}.onnx"
    with atomic_write(folder / file) as out:
        out.write(data)
    own = replace(spec, file=file, sha256=sha256(data), precision=precision, parity=[])
    return own, OnnxRuntimeEngine(own, emulated(variant).SerializeToString(), EngineOptions())


def add_variants(args: argparse.Namespace) -> None:
    """Make and check the graphs beside their place, then put them there, the manifest last."""
    with editing(find_bundle(args.bundle)) as (manifest, scratch):
        # Where pixels are diffused, sizes like these were among those of the fp32 graph.
        large = LARGE if manifest.interface.decoupled else ()
        made = make_variants(manifest, args.precision, scratch, large)
        put_variants(manifest, made, scratch)
    for precision, own in made.items():
        error, name = max((row.error, name) for name in own for row in own[name].parity)
        print(f"{precision}: {len(own)} graphs, largest difference from fp32 {error:.1e} in {name}")


def put_variants(
    manifest: Manifest,
    made: dict[str, dict[str, GraphSpec]],
    scratch: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Move finished graphs and their notes from `scratch` into the bundle; see `commit`."""
    every = manifest.variants | made
    variants = {p: every[p] for p in cli.PRECISIONS if p in every}
    commit(replace(manifest, variants=variants), manifest.folder, scratch, notes)


def precisions(text: str) -> list[str]:
    """`fp16`, `bf16` or `fp16,bf16`."""
    found = [part.strip() for part in text.split(",")]
    if not set(found) <= HALVES.keys():
        raise argparse.ArgumentTypeError(f"{text!r}; expected one or more of {','.join(HALVES)}")
    return [precision for precision in HALVES if precision in found]


def main() -> None:
    """The command line."""
    parser = cli.parser(
        "calibration.half", "fp16 and bf16 forms of a bundle's graphs, each checked against fp32"
    )
    parser.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="its folder")
    parser.add_argument(
        "--precision", type=precisions, default=[*HALVES], help="which ones (fp16,bf16)"
    )
    cli.run(add_variants, parser)


if __name__ == "__main__":
    main()
