"""8-bit forms of a bundle's graphs: which products, with which scales, at which cost in error.

- `int8`: weights and the tokens they meet, as explicit QuantizeLinear and DequantizeLinear pairs,
  written by `onnxruntime.quantization`; symmetric, one scale per output channel of a weight and
  one per token tensor.
- `int8w`, `fp8`: weights alone, DequantizeLinear in front of each product: small files, and the
  forms that TensorRT for RTX gains from. fp8 is E4M3.

What may be 8 bits wide is what `calibration.half` lets run in half and has a constant weight, so
positions, film, sums over tokens, normalisers and the last projection stay fp32. Weights that meet
no tokens (folded value and output projections) are stored in 8 bits in every form.

Sums over tokens are means in our graphs, so the tokens' range does not grow with their number, and
one set of scales serves all sizes; each form is checked at every size that fp32 was.

Layers are left in fp32, the one first whose quantisation alone moves the graph's output most, until
the error of the whole is within the budget. The choice is a JSON file beside the bundle, which can
be edited and replayed.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tqdm import tqdm

from calibration.half import half_tensors, is_selection, moving_axes, with_graph
from calibration.samples import HEAVY, Arrays, Sample, Samples, fingerprint
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library
from runtime.errors import ArtefactError
from runtime.files import atomic_write, read_bytes, sha256
from runtime.manifest import Array, GraphSpec, Manifest, relative_error

CHOICE_FORMAT = 1
PROBES = 6  # samples of a graph that errors are measured with
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
# Largest `rms_error` against fp32 over the probes: of the step graph, which corrects itself from
# step to step, and of R2IR's, whose errors are in the picture as they are.
BUDGETS = {"int8": (0.05, 0.009), "int8w": (0.03, 0.009), "fp8": (0.05, 0.02)}


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
    model: ModelProto, names: Sequence[str], samples: Sequence[Sample], percentile: float
) -> dict[str, float]:
    """The largest over all samples of each tensor's `percentile` of magnitudes; 100 is MinMax.

    A percentile per sample, and not of all their numbers, so shapes may differ.
    """
    probed = ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = load_library().InferenceSession(
        probed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ranges = dict.fromkeys(names, 0.0)
    for sample in tqdm(samples, desc=f"ranges of {samples[0].graph}", unit="run", leave=False):
        for name, value in zip(names, session.run(names, sample.inputs), strict=True):
            size = np.abs(value)
            top = size.max() if percentile == 100 else np.percentile(size, percentile)
            ranges[name] = max(ranges[name], float(top))
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


class Probe:
    """Runs forms of one graph on a few of its samples and compares them with fp32."""

    def __init__(self, spec: GraphSpec, model: ModelProto, samples: Sequence[Sample]):
        self.spec = spec
        places = np.linspace(0, len(samples) - 1, min(PROBES, len(samples))).round().astype(int)
        self.samples = [samples[place] for place in places]
        self.wanted = [self.open(model).run(sample.inputs) for sample in self.samples]

    def open(self, model: ModelProto) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(self.spec, model.SerializeToString(), EngineOptions())

    def error(self, model: ModelProto) -> float:
        """The root mean square over the samples of `rms_error`; infinite at NaN."""
        engine = self.open(model)
        errors = [
            rms_error(engine.run(sample.inputs), wanted)
            for sample, wanted in zip(self.samples, self.wanted, strict=True)
        ]
        error = float(np.sqrt(np.mean(np.square(errors))))
        return error if np.isfinite(error) else float("inf")


def rms_error(found: Arrays, wanted: Arrays) -> float:
    """sqrt(Σ (found - wanted)² / Σ wanted²), the largest of any output."""
    ratios = [
        np.square(found[name] - value, dtype=np.float64).sum()
        / max(np.square(value, dtype=np.float64).sum(), 1e-30)
        for name, value in wanted.items()
    ]
    return float(np.sqrt(max(ratios)))


@dataclass(frozen=True)
class Choice:
    """Of one graph: layers in 8 bits and left in fp32, the errors that led there.

    `alone` is the error of the graph when that layer alone is quantised, `error` that of the whole.
    """

    quantized: tuple[str, ...]
    fp32: tuple[str, ...]
    alone: dict[str, float]
    error: float
    budget: float


def choose(
    model: ModelProto,
    own: Mapping[str, Layer],
    form: Form,
    ranges: Mapping[str, float],
    probe: Probe,
    budget: float,
) -> Choice:
    """Quantise all layers but the most sensitive ones, of which as few as keep the budget.

    Raises ArtefactError where the budget holds for no layer at all.
    """
    bar = tqdm(own.values(), desc=f"layers of {probe.spec.file}", unit="layer", leave=False)
    alone = {
        layer.weight: float(f"{probe.error(quantized(model, [layer], form, ranges)):.2e}")
        for layer in bar
    }
    ranked = sorted(own, key=lambda name: -alone[name])  # most sensitive first
    low, high, error = 0, len(ranked), 0.0  # how many of them stay fp32
    while low < high:
        count = (low + high) // 2
        kept = [own[name] for name in ranked[count:]]
        found = probe.error(quantized(model, kept, form, ranges))
        if found <= budget:
            high, error = count, found
        else:
            low = count + 1
    if high == len(ranked):
        raise ArtefactError(
            f"{probe.spec.file}: no layer can be quantised within an error of {budget:g}; the "
            f"least sensitive one alone gives {alone[ranked[-1]]:.1e}. Raise --budget"
        )
    left = tuple(ranked[:high])
    return Choice(
        tuple(n for n in own if n not in left), left, alone, float(f"{error:.2e}"), budget
    )


@dataclass(frozen=True)
class Choices:
    """What a choice file holds: one precision's layers of every graph."""

    bundle: str
    precision: str
    percentile: float
    graphs: dict[str, Choice]

    def write(self, path: Path) -> None:
        """Write the file, one layer a line so that it can be edited."""
        graphs = {
            name: {
                "budget": choice.budget,
                "error": choice.error,
                "fp32": [*choice.fp32],
                "quantized": [*choice.quantized],
                "error_alone": choice.alone,
            }
            for name, choice in self.graphs.items()
        }
        content = {
            "format": CHOICE_FORMAT,
            "bundle": self.bundle,
            "precision": self.precision,
            "percentile": self.percentile,
            "graphs": graphs,
        }
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")


def choice_file(precision: str) -> str:
    """The name of a precision's choice file in a bundle."""
    return f"choice.{precision}.json"


def read_choices(path: Path, manifest: Manifest) -> Choices:
    """Read a choice file; raises ArtefactError where it is none or of another bundle."""
    remedy = "Make it again with: make calibrate"
    data = read_bytes(path, "a choice of layers", remedy)
    try:
        content = json.loads(data)
        if content["format"] != CHOICE_FORMAT or content["precision"] not in FORMS:
            raise ValueError(f"format {content['format']}, precision {content['precision']}")
        choices = Choices(
            str(content["bundle"]),
            str(content["precision"]),
            float(content["percentile"]),
            {
                name: Choice(
                    tuple(map(str, own["quantized"])),
                    tuple(map(str, own["fp32"])),
                    {str(k): float(v) for k, v in own["error_alone"].items()},
                    float(own["error"]),
                    float(own["budget"]),
                )
                for name, own in content["graphs"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"{path}: no choice of layers ({reason}). {remedy}") from None
    if choices.bundle != fingerprint(manifest):
        raise ArtefactError(f"{path}: a choice for another bundle than {manifest.folder}. {remedy}")
    if choices.graphs.keys() != set(HEAVY):
        raise ArtefactError(
            f"{path}: names the graphs {sorted(choices.graphs)}; expected {sorted(HEAVY)}. {remedy}"
        )
    return choices


def replayed(path: Path, choice: Choice, name: str, own: Mapping[str, Layer]) -> list[Layer]:
    """The layers to quantise; raises ArtefactError where a choice is not of these layers."""
    named = [*choice.quantized, *choice.fp32]
    unknown = sorted(set(named) - own.keys())
    if unknown:
        raise ArtefactError(
            f"{path}: {name} has no layer {', '.join(unknown)}; expected some of "
            f"{', '.join(own)}. The bundle is as it was"
        )
    if not choice.quantized:
        raise ArtefactError(
            f"{path}: names no layer of {name} to quantise; expected some of {', '.join(own)}. "
            "The bundle is as it was"
        )
    twice = sorted(set(choice.quantized) & set(choice.fp32))
    if twice:
        raise ArtefactError(
            f"{path}: {name} has {', '.join(twice)} both quantised and in fp32. Name it once"
        )
    return [own[layer] for layer in own if layer in choice.quantized]


@dataclass(frozen=True)
class Work:
    """One graph in one precision, ready to be written."""

    spec: GraphSpec
    model: ModelProto
    choice: Choice


def quantize_graph(
    manifest: Manifest,
    name: str,
    precision: str,
    samples: Sequence[Sample],
    budget: float,
    percentile: float,
    given: tuple[Path, Choices] | None,
) -> Work:
    """Choose the layers of a graph, or take those `given`, and quantise them."""
    spec, form = manifest.graph(name), FORMS[precision]
    model = onnx.load_model_from_string(manifest.file_bytes(spec))
    own = layers(model, spec)
    taken = replayed(given[0], given[1].graphs[name], name, own) if given else []
    samples = [sample for sample in samples if sample.graph == name]
    tokens = [*dict.fromkeys(layer.tokens for layer in own.values() if layer.tokens)]
    ranges = token_ranges(model, tokens, samples, percentile) if form.tokens else {}
    probe = Probe(spec, model, samples)
    if given:
        choice = given[1].graphs[name]
        error = probe.error(quantized(model, taken, form, ranges))
        choice = replace(choice, error=float(f"{error:.2e}"))
    else:
        choice = choose(model, own, form, ranges, probe, budget)
        taken = [own[layer] for layer in choice.quantized]
    return Work(spec, quantized(model, taken, form, ranges), choice)


def write_variant(
    work: Work, name: str, precision: str, folder: Path, samples: Samples
) -> GraphSpec:
    """A graph's file in `folder` and its spec, compared with fp32 at the sizes fp32 was.

    Raises ArtefactError at a NaN or infinity.
    """
    onnx.checker.check_model(work.model, full_check=True)
    data = work.model.SerializeToString(deterministic=True)
    file = f"{name}.{precision}.onnx"
    (folder / file).write_bytes(data)
    own = replace(work.spec, file=file, sha256=sha256(data), precision=precision, parity=[])
    engine = OnnxRuntimeEngine(own, data, EngineOptions())
    for number, sizes in enumerate(cases(work.spec)):
        inputs, wanted = samples.take(name, sizes, number)
        found = engine.run(inputs)
        error = max(relative_error(found[output], wanted[output]) for output in wanted)
        if not np.isfinite(error):
            raise ArtefactError(
                f"{file} at {sizes}: {precision} has NaN or infinity. Nothing is written; leave "
                f"layers in fp32 in {choice_file(precision)} and replay it with --choice"
            )
        row: dict[str, Any] = {**sizes, "error": float(f"{error:.2e}")}
        own.parity.append(row)
    return own


def cases(spec: GraphSpec) -> Iterator[dict[str, int]]:
    """The sizes that the fp32 graph was checked at, of one image under two conditions."""
    for row in spec.parity:
        if row["batch"] == 1 and row.get("conditions", 2) == 2:
            yield {axis: int(value) for axis, value in row.items() if axis != "error"}
