"""Which layers of a graph are quantised: chosen by measured error, kept in a file, replayed.

Layers are left in fp32, the one first whose quantisation alone moves the graph's output most, until
the error of the whole is within the budget. The choice is a JSON file beside the bundle, which can
be edited and replayed. Each graph made is checked at every size that fp32 was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from msgspec import Struct
from onnx import ModelProto

from calibration.quantize import FORMS, Form, Layer, layers, quantized, token_ranges
from calibration.samples import Arrays, Sample, Samples, fingerprint, heavy
from runtime.bundle.files import atomic_write, parsing, read_bytes, sha256
from runtime.bundle.manifest import GraphSpec, Manifest, Parity, relative_error
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import ArtefactError
from runtime.progress import Bar

CHOICE_FORMAT = 2
LARGEST_CHOICE = 1 << 24  # bytes
# Of the tokens' magnitudes, tried for each graph; 100 is MinMax.
PERCENTILES = (100.0, 99.99, 99.9, 99.5, 99.0)
PROBES = 6  # samples of a graph that errors are measured with
# Largest `rms_error` against fp32 over the probes: of the step graph, which corrects itself from
# step to step, and of R2IR's, whose errors are in the picture as they are.
BUDGETS = {"int8": (0.03, 0.015), "int8w": (0.03, 0.009), "fp8": (0.05, 0.02)}


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


class Choice(Struct, frozen=True, rename={"alone": "error_alone"}):
    """Of one graph: layers in 8 bits and left in fp32, the tokens' percentile, the errors.

    `alone` is the error of the graph when that layer alone is quantised, `error` that of the whole.
    """

    quantized: tuple[str, ...]
    fp32: tuple[str, ...]
    alone: dict[str, float]
    error: float
    budget: float
    percentile: float


def choose(
    model: ModelProto,
    own: Mapping[str, Layer],
    form: Form,
    found: Mapping[float, Mapping[str, float]],
    probe: Probe,
    budget: float,
) -> Choice:
    """Quantise all layers but the most sensitive ones, of which as few as keep the budget.

    Of the percentiles `found`, that is taken with which all layers together err least. Raises
    ArtefactError where the budget holds for no layer at all.
    """
    errors = {p: probe.error(quantized(model, [*own.values()], form, r)) for p, r in found.items()}
    percentile = min(errors, key=lambda p: errors[p])
    ranges = found[percentile]
    bar = Bar(own.values(), desc=f"layers of {probe.spec.file}", unit="layer", leave=False)
    alone = {
        layer.weight: float(f"{probe.error(quantized(model, [layer], form, ranges)):.2e}")
        for layer in bar
    }
    ranked = sorted(own, key=lambda name: -alone[name])  # most sensitive first
    low, high, error = 0, len(ranked), 0.0  # how many of them stay fp32
    while low < high:
        count = (low + high) // 2
        kept = [own[name] for name in ranked[count:]]
        measured = probe.error(quantized(model, kept, form, ranges))
        if measured <= budget:
            high, error = count, measured
        else:
            low = count + 1
    if high == len(ranked):
        raise ArtefactError(
            f"{probe.spec.file}: no layer can be quantised within an error of {budget:g}; the "
            f"least sensitive one alone gives {alone[ranked[-1]]:.1e}. Raise --budget"
        )
    left = tuple(ranked[:high])
    taken = tuple(name for name in own if name not in left)
    return Choice(taken, left, alone, float(f"{error:.2e}"), budget, percentile)


class Choices(Struct, frozen=True):
    """What a choice file holds: one precision's layers of every graph."""

    bundle: str
    precision: str
    graphs: dict[str, Choice]
    format: int = CHOICE_FORMAT

    def write(self, path: Path) -> None:
        """Write the file, one layer a line so that it can be edited."""
        with atomic_write(path) as file:
            file.write(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def choice_file(precision: str) -> str:
    """The name of a precision's choice file in a bundle."""
    return f"choice.{precision}.json"


def read_choices(path: Path, manifest: Manifest) -> Choices:
    """Read a choice file; raises ArtefactError where it is none or of another bundle."""
    remedy = "Make it again with: python -m calibration"
    data = read_bytes(path, "a choice of layers", remedy, LARGEST_CHOICE)
    with parsing(path, "choice of layers", remedy):
        choices = msgspec.json.decode(data, type=Choices)
    if choices.format != CHOICE_FORMAT or choices.precision not in FORMS:
        raise ArtefactError(
            f"{path}: format {choices.format}, precision {choices.precision!r}; expected "
            f"{CHOICE_FORMAT} and one of {', '.join(FORMS)}. {remedy}"
        )
    if choices.bundle != fingerprint(manifest):
        raise ArtefactError(f"{path}: a choice for another bundle than {manifest.folder}. {remedy}")
    if choices.graphs.keys() != set(heavy(manifest)):
        raise ArtefactError(
            f"{path}: names the graphs {sorted(choices.graphs)}; expected "
            f"{sorted(heavy(manifest))}. {remedy}"
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
    percentiles: Sequence[float],
    given: tuple[Path, Choices] | None,
) -> Work:
    """Choose the layers of a graph, or take those `given`, and quantise them."""
    spec, form = manifest.graph(name), FORMS[precision]
    model = onnx.load_model_from_string(manifest.file_bytes(spec))
    own = layers(model, spec)
    taken = replayed(given[0], given[1].graphs[name], name, own) if given else []
    samples = [sample for sample in samples if sample.graph == name]
    tokens = [*dict.fromkeys(layer.tokens for layer in own.values() if layer.tokens)]
    tried = (given[1].graphs[name].percentile,) if given else percentiles
    found = token_ranges(model, tokens, samples, tried) if form.tokens else {tried[0]: {}}
    probe = Probe(spec, model, samples)
    if given:
        choice, ranges = given[1].graphs[name], found[tried[0]]
        error = probe.error(quantized(model, taken, form, ranges))
        choice = msgspec.structs.replace(choice, error=float(f"{error:.2e}"))
    else:
        choice = choose(model, own, form, found, probe, budget)
        taken, ranges = [own[layer] for layer in choice.quantized], found[choice.percentile]
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
    own = msgspec.structs.replace(
        work.spec, file=file, sha256=sha256(data), precision=precision, parity=[]
    )
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
        own.parity.append(Parity(sizes, float(f"{error:.2e}")))
    return own


def cases(spec: GraphSpec) -> Iterator[dict[str, int]]:
    """The sizes that the fp32 graph was checked at, of one image under two conditions."""
    for row in spec.parity:
        if row.sizes["batch"] == 1 and row.sizes.get("conditions", 2) == 2:
            yield dict(row.sizes)
