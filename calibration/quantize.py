"""8-bit forms of a bundle's graphs: which products may be 8 bits wide, and how they become it.

- `int8`: weights and the tokens they meet, as explicit QuantizeLinear and DequantizeLinear pairs,
  written by `onnxruntime.quantization`; symmetric, one scale per output channel of a weight and
  one per token tensor.
- `int8w`, `fp8`: weights alone, DequantizeLinear in front of each product: small files, and the
  forms that TensorRT for RTX gains from. fp8 is E4M3.

What may be 8 bits wide is what `calibration.half` lets run in half and has a constant weight, so
positions, film, sums over tokens, normalisers and the last projection stay fp32. Weights that meet
no tokens (folded value and output projections) are stored in 8 bits in every form.

No outliers are smoothed into weights: where it is free, in the gains before a product, errors fell
by 0 to 14 %; in front of an FFN's second product, where the outliers are, it takes another pass
over the hidden tokens.

Sums over tokens are means in our graphs, so the tokens' range does not grow with their number, and
one set of scales serves all sizes; each form is checked at every size that fp32 was.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration.half import half_tensors, is_selection, moving_axes, with_graph
from calibration.samples import Sample
from runtime.bundle.manifest import Array, GraphSpec
from runtime.engines.onnxruntime import load_library
from runtime.progress import Bar

SMALLEST = 256  # numbers in a weight: below, storing it in 8 bits saves nothing
FP8_LARGEST = 448.0  # of E4M3
RANGE = 127
QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Form:
    """A precision: the type of its weights, and whether tokens are quantised too."""

    weights: int
    tokens: bool


FORMS = {
    "int8": Form(TensorProto.INT8, True),
    "int8w": Form(TensorProto.INT8, False),
    "fp8": Form(TensorProto.FLOAT8E4M3FN, False),
}


@dataclass(frozen=True)
class Layer:
    """A product with a constant weight: its nodes and the tensor they multiply with it.

    `tokens` is None where that tensor holds no tokens: only the weight is stored in 8 bits.
    """

    weight: str
    nodes: tuple[str, ...]
    tokens: str | None


def layers(model: ModelProto, spec: GraphSpec) -> dict[str, Layer]:
    """The layers of a graph that may be quantised, by the name of their weight."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    moving = moving_axes(model, spec)
    half = half_tensors(model.graph, moving)
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.size < SMALLEST or is_selection(weight):
            continue
        tokens = any(moving.get(node.input[0], ()))
        if (tokens and node.output[0] not in half) or (tokens and weight.ndim != 2):
            continue
        name = node.input[1]
        nodes = found[name].nodes if name in found else ()
        found[name] = Layer(name, (*nodes, node.name), node.input[0] if tokens else None)
    return found


def token_ranges(
    model: ModelProto, names: Sequence[str], samples: Sequence[Sample], percentiles: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Per percentile, the largest over all samples of each tensor's magnitudes; 100 is MinMax.

    A percentile per sample, and not of all their numbers, so shapes may differ.
    """
    probed = ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = load_library().InferenceSession(
        probed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ranges = {percentile: dict.fromkeys(names, 0.0) for percentile in percentiles}
    for sample in Bar(samples, desc=f"ranges of {samples[0].graph}", unit="run", leave=False):
        for name, value in zip(names, session.run(names, sample.inputs), strict=True):
            tops = np.percentile(np.abs(value), percentiles)
            for own, top in zip(ranges.values(), tops, strict=True):
                own[name] = max(own[name], float(top))
    return ranges


def quantized(
    model: ModelProto, chosen: Sequence[Layer], form: Form, ranges: Mapping[str, float]
) -> ModelProto:
    """The graph with the `chosen` layers in 8 bits; `ranges` are those of their tokens."""
    both = [layer for layer in chosen if form.tokens and layer.tokens is not None]
    made = with_quantized_tokens(model, both, ranges) if both else model
    weights = {layer.weight for layer in chosen if layer not in both}
    return with_stored_weights(made, weights, form.weights)


def with_quantized_tokens(
    model: ModelProto, chosen: Sequence[Layer], ranges: Mapping[str, float]
) -> ModelProto:
    """Q/DQ pairs around the tokens and weights of layers, by ONNX Runtime's own quantiser."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    def limits(layer: Layer) -> tuple[Array, Array]:
        top = np.array(max(ranges[layer.tokens or ""], 1e-12), np.float32)
        return -top, top

    copied = ModelProto()
    copied.CopyFrom(model)
    quantizer = QDQQuantizer(
        copied,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax, {layer.tokens: limits(layer) for layer in chosen}
        ),
        nodes_to_quantize=[name for layer in chosen for name in layer.nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "DedicatedQDQPair": True,
        },
    )
    with without_advice():
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    made: ModelProto = quantizer.model.model
    give_back_tokens(made, chosen)
    separate_pairs(made)
    return made


def give_back_tokens(model: ModelProto, chosen: Sequence[Layer]) -> None:
    """Let all but the chosen products read tokens as they were.

    The library quantises a tensor for all its readers, among them the sums over tokens.
    """
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in QDQ}
    tokens = {layer.tokens for layer in chosen}
    inside = {name for layer in chosen for name in layer.nodes}
    for node in model.graph.node:
        if node.name in inside or node.op_type in QDQ:
            continue
        for place, name in enumerate(node.input):
            exact = source.get(source.get(name, ""))
            if exact in tokens:
                node.input[place] = exact


def separate_pairs(model: ModelProto) -> None:
    """Give products that share tokens scales that differ in the last bit.

    ONNX Runtime would make one QuantizeLinear of equal ones, and fuses none that two products read:
    keys and queries would run in fp32.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    last: dict[str, str] = {}
    moved: dict[str, str] = {}  # quantised tensor -> the scale of its own
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            tokens, scale = node.input[:2]
            if tokens in last:
                value = numpy_helper.to_array(constants[last[tokens]])
                own = f"{scale}.{node.output[0]}"
                next_value = np.nextafter(value, np.float32(np.inf), dtype=np.float32)
                constants[own] = numpy_helper.from_array(np.array(next_value), own)
                model.graph.initializer.append(constants[own])
                node.input[1] = moved[node.output[0]] = own
            last[tokens] = node.input[1]
        elif node.op_type == "DequantizeLinear" and node.input[0] in moved:
            node.input[1] = moved[node.input[0]]


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Without the library's advice on pre-processing, which our graphs have behind them."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


def with_stored_weights(model: ModelProto, names: set[str], kind: int) -> ModelProto:
    """The graph with weights stored in 8 bits and dequantised in front of their products.

    One scale per output channel, the last axis; products stay in fp32.
    """
    constants, nodes = [], []
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            constants.append(tensor)
            continue
        values, scale = stored(numpy_helper.to_array(tensor), kind)
        stem = tensor.name
        zero = np.zeros(scale.shape, values.dtype)
        constants += [
            numpy_helper.from_array(values, f"{stem}_quantized"),
            numpy_helper.from_array(scale, f"{stem}_scale"),
            numpy_helper.from_array(zero, f"{stem}_zero_point"),
        ]
        inputs = [f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"]
        axis = values.ndim - 1
        node = helper.make_node("DequantizeLinear", inputs, [stem], f"{stem}_dequantize", axis=axis)
        nodes.append(node)
    graph = model.graph
    made = helper.make_graph(
        [*nodes, *graph.node], graph.name, graph.input, graph.output, constants
    )
    return with_graph(model, made)


def stored(weight: Array, kind: int) -> tuple[Array, Array]:
    """A weight in 8 bits, and float32 scales of its last axis."""
    largest = RANGE if kind == TensorProto.INT8 else FP8_LARGEST
    top = np.abs(weight).max(axis=tuple(range(weight.ndim - 1)))
    scale = (np.maximum(top, 1e-12) / largest).astype(np.float32)
    scaled = weight / scale
    if kind == TensorProto.INT8:
        scaled = np.rint(scaled)
    return np.clip(scaled, -largest, largest).astype(helper.tensor_dtype_to_np_dtype(kind)), scale
