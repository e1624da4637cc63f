"""8-bit graphs: what is quantised, with which scales, how layers are chosen, what is refused."""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from calibration import __main__ as calibrate
from calibration import choices
from calibration.choices import Probe, choose, rms_error
from calibration.half import half_tensors, moving_axes
from calibration.quantize import FORMS, Layer, layers, quantized, token_ranges
from calibration.samples import (
    Sample,
    Samples,
    Settings,
    calibration_set,
    default_sizes,
    load,
)
from runtime.bundle.files import TEMPORARY_PREFIX
from runtime.bundle.manifest import Array, GraphSpec, Manifest, read_manifest
from runtime.engines import HISTORY, Engine, EngineOptions
from runtime.engines.onnxruntime import load_library
from runtime.errors import ArtefactError, UsageError
from runtime.images.pixels import read_metadata
from runtime.pipeline.bundle import open_bundle
from runtime.pipeline.diffuser import EXACT_BELOW, Progress
from runtime.sampling import solvers
from runtime.sampling.loop import StepCallback
from runtime.sampling.request import Request
from runtime.sampling.schedule import COSINE
from tests.conftest import HEAVY, Command


@pytest.fixture
def manifest(quantized_bundle: Path) -> Manifest:
    return read_manifest(quantized_bundle)


def model_of(manifest: Manifest, graph: str, precision: str = "fp32") -> ModelProto:
    return onnx.load_model_from_string(manifest.file_bytes(manifest.graph(graph, precision)))


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def samples_of(manifest: Manifest, graph: str) -> list[Sample]:
    (path,) = manifest.folder.glob("calibration-*.npz")
    return [sample for sample in load(path, manifest) if sample.graph == graph]


def test_every_form_is_there_and_checked_at_every_size(manifest: Manifest) -> None:
    assert [*manifest.variants] == [*FORMS]
    assert not [*manifest.folder.glob(TEMPORARY_PREFIX + "*")]
    for precision, own in manifest.variants.items():
        assert own.keys() == {*HEAVY}
        for name, spec in own.items():
            assert (spec.file, spec.precision) == (f"{name}.{precision}.onnx", precision)
            sizes = {
                (row.sizes["height"], row.sizes["width"]) for row in manifest.graphs[name].parity
            }
            assert {(row.sizes["height"], row.sizes["width"]) for row in spec.parity} == sizes
            errors = [row.error for row in spec.parity]
            assert 1e-4 < max(errors) < np.inf
            fp32 = (manifest.folder / manifest.graphs[name].file).stat().st_size
            assert len(manifest.file_bytes(spec)) < 0.95 * fp32


@pytest.mark.parametrize("name", HEAVY)
def test_only_products_of_tokens_and_weights_are_quantised(manifest: Manifest, name: str) -> None:
    spec, model = manifest.graphs[name], model_of(manifest, name)
    half = half_tensors(model.graph, moving_axes(model, spec))
    chosen = choices.read_choices(manifest.folder / "choice.int8.json", manifest).graphs[name]
    made = model_of(manifest, name, "int8")
    values, own = constants(made), layers(model, spec)
    outputs = {output: node for node in made.graph.node for output in node.output}
    readers = {i: node for node in made.graph.node for i in node.input}
    for node in made.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert scale.shape == () and zero == 0 and zero.dtype == np.int8
            product = readers[readers[node.output[0]].output[0]]
            assert product.op_type == "MatMul" and product.output[0] in half
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            weight, zero = values[node.input[0]], values[node.input[2]]
            assert weight.dtype == np.int8 and not zero.any()
            assert values[node.input[1]].shape == weight.shape[-1:]
            assert readers[node.output[0]].op_type == "MatMul"
    pairs = sum(node.op_type == "QuantizeLinear" for node in made.graph.node)
    products = [n for layer in chosen.quantized if own[layer].tokens for n in own[layer].nodes]
    assert pairs == len(products)
    for layer in chosen.fp32:
        assert layer in values and values[layer].dtype == np.float32
    for op in ("Sin", "Cos", "Div", "ReduceMean", "LayerNormalization", "Tanh"):
        for node in (node for node in made.graph.node if node.op_type == op):
            makers = [outputs[i].op_type for i in node.input if i in outputs]
            assert "DequantizeLinear" not in makers


def test_every_quantised_product_is_one_integer_kernel(manifest: Manifest, tmp_path: Path) -> None:
    """Also those that share their tokens, as keys and queries do."""
    for name in HEAVY:
        spec = manifest.graphs[name]
        model = model_of(manifest, name)
        own = [layer for layer in layers(model, spec).values() if layer.tokens]
        made = quantized(model, own, FORMS["int8"], {str(layer.tokens): 4.0 for layer in own})
        settings = load_library().SessionOptions()
        settings.log_severity_level = 3
        settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        load_library().InferenceSession(made.SerializeToString(), settings)
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert kinds.count("MatMulIntegerToFloat") == sum(len(layer.nodes) for layer in own)


def test_weights_alone(manifest: Manifest) -> None:
    for precision, kind in (("int8w", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)):
        made, fp32 = model_of(manifest, "r2id", precision), constants(model_of(manifest, "r2id"))
        assert not [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
        stored = {t.name: t for t in made.graph.initializer if t.data_type == kind}
        pairs = [node for node in made.graph.node if node.op_type == "DequantizeLinear"]
        assert len(pairs) >= 12 and {node.input[0] for node in pairs} <= stored.keys()
        values = constants(made)
        for node in pairs:
            weight, scale = values[node.input[0]].astype(np.float32), values[node.input[1]]
            wanted = fp32[node.output[0]]
            error = np.abs(weight * scale - wanted)
            largest = np.abs(wanted).max(axis=tuple(range(wanted.ndim - 1)))
            bound = largest / 254 if precision == "int8w" else np.maximum(np.abs(wanted) / 16, 1e-3)
            assert (error <= bound * 1.001 + 1e-9).all()


def test_scales_are_those_of_the_samples(manifest: Manifest) -> None:
    spec, model = manifest.graphs["r2id"], model_of(manifest, "r2id")
    tokens = sorted({layer.tokens for layer in layers(model, spec).values() if layer.tokens})
    samples = samples_of(manifest, "r2id")
    ranges, cut = token_ranges(model, tokens, samples, (100, 99)).values()
    assert all(0 < cut[name] < ranges[name] for name in tokens)
    path = manifest.folder / "choice.int8.json"
    percentile = choices.read_choices(path, manifest).graphs["r2id"].percentile
    ranges = token_ranges(model, tokens, samples, [percentile])[percentile]
    values = constants(model_of(manifest, "r2id", "int8"))
    for node in model_of(manifest, "r2id", "int8").graph.node:
        if node.op_type == "QuantizeLinear":
            expected = 2 * ranges[node.input[0]] / 254
            assert values[node.input[1]] == pytest.approx(expected, rel=0.01)


def test_one_set_of_scales_serves_all_sizes(manifest: Manifest, tmp_path: Path) -> None:
    """Ranges of trajectories at a size that no sample has are those of the samples."""
    spec, model = manifest.graphs["r2id"], model_of(manifest, "r2id")
    tokens = sorted({layer.tokens for layer in layers(model, spec).values() if layer.tokens})
    calibrated = token_ranges(model, tokens, samples_of(manifest, "r2id"), [100])[100]
    larger = Settings(((24, 24),), (0.0, 1.0, 2.0, 4.0), steps=3, every=1)
    found = calibration_set(manifest, larger, tmp_path, tmp_path, None)
    own = [sample for sample in found if sample.graph == "r2id"]
    ranges = token_ranges(model, tokens, own, [100])[100]
    ratios = [ranges[name] / calibrated[name] for name in tokens]
    assert 0.4 < np.median(ratios) < 2.5 and max(ratios) < 5


def test_the_most_sensitive_layers_stay_in_fp32(manifest: Manifest) -> None:
    spec, model, form = manifest.graphs["r2id"], model_of(manifest, "r2id"), FORMS["fp8"]
    own, probe = layers(model, spec), Probe(spec, model, samples_of(manifest, "r2id"))
    everything = probe.error(quantized(model, [*own.values()], form, {}))
    assert choose(model, own, form, {100: {}}, probe, everything).fp32 == ()
    choice = choose(model, own, form, {100: {}}, probe, everything / 1.5)
    assert 0 < len(choice.fp32) < len(own) and choice.error <= everything / 1.5
    assert {*choice.fp32, *choice.quantized} == own.keys() == choice.alone.keys()
    worst = min(choice.alone[name] for name in choice.fp32)
    assert worst >= max(choice.alone[name] for name in choice.quantized)
    with pytest.raises(ArtefactError, match=r"no layer can be quantised within .* --budget"):
        choose(model, own, form, {100: {}}, probe, 1e-9)


def test_the_percentile_that_errs_least_is_chosen(manifest: Manifest) -> None:
    name = "r2ir_latent_summary"
    spec, model, form = manifest.graphs[name], model_of(manifest, name), FORMS["int8"]
    own, samples = layers(model, spec), samples_of(manifest, name)
    tokens = sorted({layer.tokens for layer in own.values() if layer.tokens})
    ranges = token_ranges(model, tokens, samples, [100])[100]
    coarse = {token: 40 * top for token, top in ranges.items()}
    probe = Probe(spec, model, samples)
    for found, best in (({1e2: ranges, 99.0: coarse}, 100), ({1e2: coarse, 99.0: ranges}, 99)):
        choice = choose(model, own, form, found, probe, 1e9)
        assert choice.percentile == best
        assert choice.error == pytest.approx(
            probe.error(quantized(model, [*own.values()], form, ranges)), rel=0.01
        )


def replay(folder: Path, path: Path, command: Command) -> tuple[int, str]:
    (data,) = folder.glob("calibration-*.npz")
    done = command("calibration", folder, "--choice", path, "--samples", data)
    return done.returncode, done.stderr


def test_a_choice_is_edited_and_replayed(own_quantized: Path, command: Command) -> None:
    path = own_quantized / "choice.int8.json"
    before = {file.name: file.read_bytes() for file in own_quantized.glob("*.onnx")}
    code, said = replay(own_quantized, path, command)
    assert code == 0, said
    assert {file.name: file.read_bytes() for file in own_quantized.glob("*.onnx")} == before
    content = json.loads(path.read_bytes())
    moved = content["graphs"]["r2ir_decode"]["quantized"].pop(0)
    content["graphs"]["r2ir_decode"]["fp32"].append(moved)
    path.write_text(json.dumps(content))
    code, said = replay(own_quantized, path, command)
    assert code == 0, said
    after = {file.name: file.read_bytes() for file in own_quantized.glob("*.onnx")}
    assert [name for name in after if after[name] != before[name]] == ["r2ir_decode.int8.onnx"]
    manifest = read_manifest(own_quantized)
    assert constants(model_of(manifest, "r2ir_decode", "int8"))[moved].dtype == np.float32
    assert [*manifest.variants] == [*FORMS]


def test_a_bad_choice_changes_nothing(own_quantized: Path, command: Command) -> None:
    whole = (own_quantized / "choice.int8.json").read_text()
    path = own_quantized.parent / "choice.json"
    manifest = (own_quantized / "manifest.json").read_bytes()
    content = json.loads(whole)
    for change, words in (
        (re.sub(r"blocks\.0\.ffn\.up", "blocks.9.ffn.up", whole), "has no layer blocks.9.ffn.up"),
        (re.sub(r'"bundle": "\w+"', '"bundle": "0"', whole), "for another bundle"),
        (whole.replace('"r2id"', '"unet"'), "names the graphs"),
        (re.sub(r'"format": \d', '"format": 9', whole), "format 9, precision"),
        ("{", "no choice of layers"),
        (json.dumps(emptied(content)), "names no layer of r2id"),
    ):
        path.write_text(change)
        code, said = replay(own_quantized, path, command)
        assert code == 3 and words in said and "Traceback" not in said, said
    done = command("calibration", own_quantized, "--choice", path, "--precision", "int4")
    assert done.returncode == 2 and "int8,int8w,fp8" in done.stderr
    assert (own_quantized / "manifest.json").read_bytes() == manifest


def emptied(content: dict[str, dict[str, dict[str, list[str]]]]) -> object:
    content["graphs"]["r2id"]["quantized"] = []
    return content


def test_a_killed_command_leaves_a_whole_bundle(
    own_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = own_quantized.glob("calibration-*.npz")
    args = argparse.Namespace(
        bundle=own_quantized,
        choice=own_quantized / "choice.int8w.json",
        precision=["int8w"],
        samples=data,
        sizes=(),
        guidance=(),
        steps=1,
        every=1,
        pictures=1,
        seed=0,
        budget=None,
        percentile=None,
    )
    replacing = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "r2ir_encode.int8w.onnx":
            raise KeyboardInterrupt
        return replacing(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(args)
    old = read_manifest(own_quantized)
    assert [*old.variants] == [*FORMS]
    for _, spec in old.forms():
        old.file_bytes(spec)
    monkeypatch.setattr(Path, "replace", replacing)
    calibrate.calibrate(args)
    manifest = read_manifest(own_quantized)
    assert [*manifest.variants] == [*FORMS]
    for _, spec in manifest.forms():
        manifest.file_bytes(spec)


def test_nan_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    spec, model = manifest.graphs["r2ir_encode"], model_of(manifest, "r2ir_encode")
    broken = ModelProto()
    broken.CopyFrom(model)
    name = next(iter(layers(model, spec)))
    for tensor in broken.graph.initializer:
        if tensor.name == name:
            values = np.full_like(numpy_helper.to_array(tensor), np.nan)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    choice = choices.Choice((), (), {}, 0.0, 0.0, 100)
    work = choices.Work(spec, broken, choice)
    with pytest.raises(ArtefactError, match=r"NaN or infinity\. Nothing is written"):
        choices.write_variant(work, "r2ir_encode", "int8", tmp_path, Samples(manifest))
    assert Probe(spec, model, samples_of(manifest, "r2ir_encode")).error(broken) == np.inf


def test_names_decide_nothing(manifest: Manifest) -> None:
    """A product is a layer by what it multiplies: the features' projection never is one."""
    spec: GraphSpec = manifest.graphs["r2ir_decode"]
    found: dict[str, Layer] = layers(model_of(manifest, "r2ir_decode"), spec)
    assert "query_in.weight" not in found and "out.weight" not in found
    assert {"blocks.0.ffn.up.weight", "blocks.0.attention.query.weight"} <= found.keys()


@pytest.mark.parametrize("precision", FORMS)
def test_drawing(quantized_bundle: Path, tmp_path: Path, command: Command, precision: str) -> None:
    draw = ("runtime.generate", "--engine", quantized_bundle, "--label", 3, "--steps", 2)
    asked = (*draw, "--latent", "3x5", "--precision", precision, "--out", "a.png")
    assert command(*asked).returncode == 0
    assert read_metadata(tmp_path / "a.png")["precision"] == precision
    assert command(*draw, "--from-png", "a.png", "--out", "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_bundle_without_the_form_says_how_to_make_it(tiny_bundle: Path, command: Command) -> None:
    done = command("runtime.generate", "--engine", tiny_bundle, "--precision", "int8")
    assert done.returncode == 2
    assert f"python -m calibration {tiny_bundle} --precision int8" in done.stderr


def test_a_trajectory_starts_in_fp32(quantized_bundle: Path) -> None:
    """Where alpha_bar is least: the first step, two of 50, 21 of 1000."""
    exact, ours = (
        open_bundle(quantized_bundle, EngineOptions(precision=p)) for p in ("fp32", "int8")
    )
    tables = [solvers.table("ddim", COSINE, steps) for steps in (1, 3, 50, 1000)]
    assert [ours.diffuser.exact_steps(table) for table in tables] == [1, 1, 2, 21]
    assert exact.diffuser.exact_steps(tables[3]) == 0
    for steps, same in ((1, True), (3, False)):
        drawn = []
        for pipeline in (exact, ours):
            drawn.append(pipeline.diffuse(Request([1], (4, 4), steps=steps, solver="ddim")))
        assert np.array_equal(drawn[0], drawn[1]) == same


class OnDevice:
    """An engine of the step graph that makes the DDIM update too, as a plan does."""

    provider = "device"

    def __init__(self, engine: Engine):
        self.engine = engine
        self.runs = 0

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        raise AssertionError("a plan's latent stays on the device")

    def sample(
        self,
        inputs: Mapping[str, Array],
        updates: Iterable[Mapping[str, Array]],
        on_step: StepCallback | None = None,
        first: int = 0,
    ) -> dict[str, Array]:
        held = dict(inputs)
        for step, update in enumerate(updates, first):
            held |= update
            own = ("row", "weights", "noise", *HISTORY)
            eps = self.engine.run({k: v for k, v in held.items() if k not in own})["eps"]
            eps = (held["weights"] * eps).sum(0)
            keep, move, c, d, e, p, q = held["row"]
            x, one, two = held["latent"], *(held[name] for name in HISTORY)
            held["latent"] = keep * x + move * eps + c * one + d * two + e * held["noise"]
            held |= {"x0_1": p * x + q * eps, "x0_2": one}
            self.runs += 1
            if on_step is not None:
                on_step(step, partial(np.add, p * x, q * eps))
        return {name: held[name] for name in ("latent", *HISTORY)}


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_on_a_device_it_starts_in_fp32_too(quantized_bundle: Path, eta: float) -> None:
    drawn, engines = [], []
    steps: list[Progress] = []
    for device in (False, True):
        pipeline = open_bundle(quantized_bundle, EngineOptions(precision="int8"))
        if device:
            engines = [OnDevice(pipeline.engines.open("r2id", p)) for p in ("fp32", "int8")]
            kept = pipeline.engines.opened
            kept["r2id", "fp32"], kept["r2id", "int8"] = engines
        request = Request([1], (4, 4), steps=4, eta=eta, solver="ddim", guidance_interval=(0, 0.7))
        drawn.append(pipeline.diffuse(request, steps.append))
    assert [engine.runs for engine in engines] == [1, 3]
    assert [progress.step for progress in steps] == [1, 2, 3, 4] * 2
    np.testing.assert_allclose(drawn[1], drawn[0], rtol=1e-4, atol=1e-4 * np.abs(drawn[0]).max())


def test_families_that_diffuse_pixels_have_int8(
    pixel_bundle: Path, tmp_path: Path, command: Command
) -> None:
    """Their step's products of tokens and weights; convolutions and all else stay fp32."""
    folder = Path(shutil.copytree(pixel_bundle, tmp_path / pixel_bundle.name))
    drawn = ("--sizes", "16x16,24x32", "--guidance", "1,2", "--pictures", "1", "--steps", "3")
    chosen = ("--precision", "int8", "--percentile", "100", "--budget", "0.2", "--every", "1")
    done = command("calibration", folder, *drawn, *chosen)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(folder)
    name = manifest.step_graph
    assert manifest.variants["int8"].keys() == {name}
    table = Request([0], (16, 16), steps=3, solver="ddim").table(manifest.schedule)
    each = 2 * int((table.alpha_bar[:-1] >= EXACT_BELOW).sum())  # others are fp32's
    assert 4 <= each <= 6 and f"{name}   16x16 {each}, 24x32 {each}" in done.stdout
    model, made = model_of(manifest, name), model_of(manifest, name, "int8")
    kinds = [[node.op_type for node in own.graph.node] for own in (model, made)]
    own = layers(model, manifest.graph(name)).values()
    count = sum(len(layer.nodes) for layer in own if layer.tokens)
    assert count >= 10 and 0.5 * count < kinds[1].count("QuantizeLinear") <= count
    assert kinds[0].count("Conv") == kinds[1].count("Conv")
    pairs = [open_bundle(folder, EngineOptions(precision=p)) for p in ("fp32", "int8")]
    wanted, found = (one.generate([3], (24, 32), steps=4, seed=1).latents for one in pairs)
    # Random weights have outliers; what has nothing in common differs by 1.4.
    assert 1e-4 < rms_error({"x": found}, {"x": wanted}) < 0.35
    with pytest.raises(UsageError, match="no picture goes through this bundle's graphs"):
        calibration_set(manifest, Settings(((16, 16),)), folder, folder, tmp_path)
    with pytest.raises(UsageError, match="sizes 70000x8: expected sides of"):
        calibration_set(manifest, Settings(((70000, 8),)), folder, folder, None)


def test_sizes_of_samples_surround_the_default_one(tiny_bundle: Path, pixel_bundle: Path) -> None:
    latents, pixels = (read_manifest(path).interface for path in (tiny_bundle, pixel_bundle))
    assert latents.default_latent == (4, 4)
    assert default_sizes(latents) == ((2, 2), (4, 4), (8, 8), (4, 8), (8, 3), (16, 16))
    height, width = pixels.default_latent
    found = default_sizes(pixels)
    assert (height, width) in found and (2 * height, 2 * width) in found
    sides = [side for size in found for side in size]
    assert all(side in pixels.latent_sides for side in sides) and max(sides) == 2 * height
