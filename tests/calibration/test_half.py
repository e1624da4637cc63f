"""fp16 and bf16 graphs: what is half, what is not, that it is checked, and that it holds."""

import argparse
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from calibration import half
from calibration.samples import Arrays, Samples
from runtime.bundle.files import TEMPORARY_PREFIX
from runtime.bundle.folders import LOCK_NAME
from runtime.bundle.manifest import GraphSpec, Manifest, read_manifest
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library
from runtime.errors import ArtefactError
from runtime.images.pixels import read_metadata
from runtime.pipeline.bundle import open_bundle
from runtime.sampling import solvers
from runtime.sampling.schedule import COSINE
from tests.conftest import HEAVY, Command

HALF_TYPES = set(half.HALVES.values())


@pytest.fixture
def manifest(half_bundle: Path) -> Manifest:
    return read_manifest(half_bundle)


def load(manifest: Manifest, graph: str, precision: str = "fp32") -> ModelProto:
    return onnx.load_model_from_string(manifest.file_bytes(manifest.graph(graph, precision)))


def kinds(model: ModelProto) -> dict[str, int]:
    """The type of every tensor by name."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def run(model: ModelProto, spec: GraphSpec, inputs: Arrays) -> Arrays:
    return OnnxRuntimeEngine(spec, model.SerializeToString(), EngineOptions()).run(inputs)


def test_every_size_is_checked(manifest: Manifest) -> None:
    assert [*manifest.variants] == ["fp16", "bf16"]
    assert not [*manifest.folder.glob(TEMPORARY_PREFIX + "*")]
    for precision, own in manifest.variants.items():
        assert own.keys() == {*HEAVY}
        for name, spec in own.items():
            fp32 = manifest.graphs[name]
            assert spec.file == f"{name}.{precision}.onnx" and spec.precision == precision
            assert (spec.inputs, spec.outputs, spec.ranges) == (
                *(fp32.inputs, fp32.outputs, fp32.ranges),
            )
            errors = [row.error for row in spec.parity]
            assert len(errors) == len(fp32.parity) + len(half.LARGE)
            # fp32 graphs differ by 1e-6 at most: anything above is real rounding to half.
            assert 2e-5 < max(errors) <= half.BOUNDS[precision]
            rows = [row.sizes for row in spec.parity]
            assert {(row["height"], row["width"]) for row in rows} >= {
                *half.LARGE,
                (1, 1),
                (31, 64),
            }
    ratio = [max(r.error for r in manifest.variants[p]["r2id"].parity) for p in half.HALVES]
    assert 4 < ratio[1] / ratio[0] < 16  # bf16 has three bits less


@pytest.mark.parametrize("precision", half.HALVES)
@pytest.mark.parametrize("name", HEAVY)
def test_what_is_half(manifest: Manifest, name: str, precision: str) -> None:
    model = load(manifest, name, precision)
    kind = kinds(model)
    assert {kind[v.name] for v in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    found: dict[str, set[int]] = {}
    cast = {name for node in model.graph.node if node.op_type == "Cast" for name in node.output}
    for node in model.graph.node:
        found.setdefault(node.op_type, set()).update(kind[o] for o in node.output)
        if node.op_type == "Cast":
            assert cast.isdisjoint(node.input)  # no number goes there and back
    for op in ("Sin", "Cos", "ReduceMean", "ReduceSum", "Sqrt", "Div", "Tanh"):
        assert found.get(op, set()) <= {TensorProto.FLOAT}, op
    assert half.HALVES[precision] in found["MatMul"]
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    if name == "r2id":  # query, key, read and both of the FFN, per block; cross-attention
        assert sum(kind[node.output[0]] in HALF_TYPES for node in products) >= 5 * 3


def test_sums_over_tokens_are_fp32(manifest: Manifest) -> None:
    """Of the products in half none contracts over tokens, found by their real shapes."""
    for name in HEAVY:
        spec, model = manifest.graphs[name], load(manifest, name)
        moving = half.moving_axes(model, spec)
        chosen = half.half_tensors(model.graph, moving)
        sums = [
            node
            for node in model.graph.node
            if node.op_type == "MatMul" and moving[node.input[0]][-1]
        ]
        assert bool(sums) == (name != "r2ir_render")
        assert chosen.isdisjoint(node.output[0] for node in sums)


def test_delicate_products_are_fp32(manifest: Manifest) -> None:
    """The normaliser's sum, the features' projection and the last product, by walking there."""
    layout = ("Concat", "LayerNormalization", "Reshape")
    for name in HEAVY:
        model = load(manifest, name, "bf16")
        kind, makers = kinds(model), {o: n for n in model.graph.node for o in n.output}
        constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        waiting = [node.input[1] for node in model.graph.node if node.op_type == "Div"]
        if not name.endswith("_summary"):
            waiting += [model.graph.output[0].name]
        fourier = {o for n in model.graph.node if n.op_type in ("Sin", "Cos") for o in n.output}
        for node in model.graph.node:
            if node.op_type in layout and not fourier.isdisjoint(node.input):
                fourier.update(node.output)
        found = [n.output[0] for n in model.graph.node if not fourier.isdisjoint(n.input)]
        assert all(kind[name] == TensorProto.FLOAT for name in found)
        while waiting:
            node = makers.get(waiting.pop())
            if node is not None and node.op_type == "MatMul":
                found += node.output
                if half.is_selection(constants.get(node.input[1])):
                    waiting.append(node.input[0])
            elif node is not None and node.op_type in (
                "Add",
                "Cast",
                "Reshape",
                "Tanh",
                "Transpose",
            ):
                waiting += node.input
        products = [name for name in found if makers[name].op_type == "MatMul"]
        assert products and {kind[name] for name in products} == {TensorProto.FLOAT}


def test_names_decide_nothing(manifest: Manifest) -> None:
    spec, model = manifest.graphs["r2id"], load(manifest, "r2id")
    interface = {value.name for value in (*model.graph.input, *model.graph.output)}
    renamed: dict[str, str] = {}

    def new(name: str) -> str:
        return renamed.setdefault(name, f"t{len(renamed)}") if name not in interface else name

    other = ModelProto()
    other.CopyFrom(model)
    for node in other.graph.node:
        node.name = ""
        node.input[:] = [new(i) for i in node.input]
        node.output[:] = [new(o) for o in node.output]
    for tensor in other.graph.initializer:
        tensor.name = new(tensor.name)
    chosen = half.half_tensors(model.graph, half.moving_axes(model, spec))
    again = half.half_tensors(other.graph, half.moving_axes(other, spec))
    assert again == {new(name) for name in chosen}


def test_emulation_rounds_every_half_result() -> None:
    """ONNX Runtime alone would run (x·x)·1/x as fp32 and find no overflow."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["h", "h"], ["square"]),
        helper.make_node("Mul", ["square", "small"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["y"], to=TensorProto.FLOAT),
    ]
    small = numpy_helper.from_array(np.array([2**-8], np.float16), "small")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph(nodes, "square", ends[:1], ends[1:], [small])
    opset = [helper.make_opsetid("", 20)]
    model = half.emulated(helper.make_model(graph, opset_imports=opset, ir_version=10))
    x = np.array([1 + 2**-13, 1.001, 300], np.float32)
    session = load_library().InferenceSession(model.SerializeToString())
    with np.errstate(over="ignore"):
        square = x.astype(np.float16) ** 2
    assert np.isinf(square[2])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], square * np.float16(2**-8))


def test_fp16_where_the_naive_form_overflows(manifest: Manifest) -> None:
    """All in fp16, as the usual converter makes it, breaks between 64x64 and 237x237."""
    spec = manifest.graphs["r2id"]
    everything = convert_float_to_float16(
        load(manifest, "r2id"), keep_io_types=True, op_block_list=[]
    )
    naive, ours = half.emulated(everything), half.emulated(load(manifest, "r2id", "fp16"))
    samples, fails = Samples(manifest), []
    for side in (64, 237):
        sizes = {"height": side, "width": side, "batch": 1, "conditions": 1}
        inputs, wanted = samples.take("r2id", sizes, 2)
        half.check(run(ours, spec, inputs), wanted, "fp16", f"{side}")
        fails.append(not np.isfinite(run(naive, spec, inputs)["eps"]).all())
    assert fails == [False, True]
    inputs["latent"] = inputs["latent"] * 16
    half.check(
        run(ours, spec, inputs), samples.bundle.engines.open("r2id").run(inputs), "fp16", "16x"
    )


def test_summaries_are_not_limited_by_fp16(manifest: Manifest) -> None:
    sizes = {"height": 512, "width": 512, "batch": 1}
    inputs, wanted = Samples(manifest).take("r2ir_image_summary", sizes, 0)
    spec = manifest.graphs["r2ir_image_summary"]
    model = load(manifest, "r2ir_image_summary", "fp16")
    found = run(half.emulated(model), spec, inputs)
    assert wanted["k"].max() > np.finfo(np.float16).max
    assert half.check(found, wanted, "fp16", "r2ir_image_summary") <= half.BOUNDS["fp16"]


@pytest.mark.parametrize(
    ("found", "words"), [([1.0, np.nan], "NaN or infinity"), ([1.0, 3.0], "by 5.00e-01")]
)
def test_a_wrong_result_is_refused(found: list[float], words: str) -> None:
    wanted = {"eps": np.array([1, 2], np.float32)}
    with pytest.raises(ArtefactError, match=words):
        half.check({"eps": np.array(found, np.float32)}, wanted, "bf16", "r2id")


def whole(folder: Path) -> Manifest:
    """The manifest of a bundle in which each file has its hash and nothing is left over."""
    manifest = read_manifest(folder)
    for own in (manifest.graphs, *manifest.variants.values()):
        for spec in own.values():
            manifest.file_bytes(spec)
    assert not [*folder.glob(TEMPORARY_PREFIX + "*")]
    return manifest


def test_a_graph_over_the_bound_changes_nothing(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(half.BOUNDS, "fp16", 1e-7)

    def listing() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in own_bundle.iterdir() if p.name != LOCK_NAME}

    before = listing()
    with pytest.raises(ArtefactError, match=r"r2id at .* fp16 differs from fp32"):
        half.add_variants(argparse.Namespace(bundle=own_bundle, precision=["fp16"]))
    assert listing() == before


def test_a_rerun_replaces_and_may_be_killed(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "LARGE", ())
    monkeypatch.setattr(half, "heavy", lambda manifest: ["r2ir_encode"])
    args = argparse.Namespace(bundle=own_bundle, precision=["fp16"])
    half.add_variants(args)
    (own_bundle / "r2ir_encode.fp16.onnx").write_bytes(b"damaged")
    half.add_variants(args)
    assert [*whole(own_bundle).variants["fp16"]] == ["r2ir_encode"]

    replacing = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".onnx" and TEMPORARY_PREFIX in path.parent.name:
            raise KeyboardInterrupt
        return replacing(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        half.add_variants(args)
    assert [*whole(own_bundle).variants] == ["fp16"]
    monkeypatch.setattr(Path, "replace", replacing)
    half.add_variants(args)
    assert [*whole(own_bundle).variants] == ["fp16"]


def test_drawing_in_fp16(half_bundle: Path, tmp_path: Path, command: Command) -> None:
    # One step: the latent of random weights grows with every step and then leaves fp16.
    asked = ("--label", 3, "--steps", 1, "--latent", "3x5", "--precision", "fp16")
    draw = ("runtime.generate", "--engine", half_bundle)
    assert command(*draw, *asked, "--out", "a.png").returncode == 0
    assert read_metadata(tmp_path / "a.png")["precision"] == "fp16"
    assert command(*draw, "--from-png", "a.png", "--out", "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    again = ("--from-png", "a.png", "--precision", "fp32", "--out", "c.png")
    assert command(*draw, *again).returncode == 0
    assert read_metadata(tmp_path / "c.png")["precision"] == "fp32"


def test_bf16_starts_in_fp32_and_fp16_does_not(half_bundle: Path) -> None:
    table = solvers.table("ddim", COSINE, 50)
    exact = {
        precision: open_bundle(
            half_bundle, EngineOptions(precision=precision)
        ).diffuser.exact_steps(table)
        for precision in ("fp32", "fp16", "bf16")
    }
    assert exact == {"fp32": 0, "fp16": 0, "bf16": 2}


def test_bf16_needs_another_provider_than_the_cpu(half_bundle: Path, command: Command) -> None:
    done = command("runtime.generate", "--engine", half_bundle, "--precision", "bf16")
    assert done.returncode == 4
    assert "cannot run bf16" in done.stderr and "--precision fp32" in done.stderr


def test_usage(command: Command, tmp_path: Path) -> None:
    done = command("calibration.half", tmp_path, "--precision", "fp8")
    assert done.returncode == 2 and "expected one or more of fp16,bf16" in done.stderr
    done = command("calibration.half", tmp_path)
    assert done.returncode == 3 and "a folder without manifest.json" in done.stderr
