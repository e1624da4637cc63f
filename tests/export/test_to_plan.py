"""Plans built by the real library for GPUs that are not here."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export import plans, to_plan
from export.profiles import SizeRange
from runtime.bundle.files import sha256
from runtime.bundle.folders import exclusive
from runtime.bundle.manifest import GraphSpec, TensorSpec, read_manifest
from runtime.engines import HISTORY
from runtime.engines.tensorrt import plan_interface
from runtime.errors import ArtefactError, IncompatibleError, ResourceError, UsageError
from runtime.sampling import solvers
from runtime.sampling.loop import sample
from runtime.sampling.schedule import COSINE
from tests.conftest import ROOT, Command

library = pytest.importorskip(
    "tensorrt_rtx", reason="no tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)
TARGETS = ("--target", "sm120,sm89")
SMALL = ("--latent", "2x2..16x16", "--image", "8x8..64x64", "--profiles", "2")


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a plan of every graph for two targets."""
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    line = [sys.executable, "-m", "export.to_plan", str(bundle), *TARGETS, *SMALL]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "10 for sm120, sm89" in done.stdout and "10 of 10" in done.stderr
    return bundle


def test_every_graph_has_a_plan_that_says_what_it_is(built: Path) -> None:
    manifest = read_manifest(built)
    assert {plan.graph for plan in manifest.plans.values()} == manifest.graphs.keys()
    for name, spec in manifest.graphs.items():
        plan = manifest.plan(name)
        assert plan is not None and plan.file == f"{name}.plan"
        assert plan.source_sha256 == spec.sha256 and plan.precision == "fp32"
        assert (plan.flavour, plan.version) == ("tensorrt_rtx", library.__version__)
        assert plan.targets == ("sm120", "sm89") and plan.build_seconds > 0
        assert len(manifest.file_bytes(plan)) == plan.bytes > 10_000
        assert len(plan.profiles) == (2 if "height" in spec.ranges else 1)
    assert not [path for path in built.iterdir() if path.name.startswith(".partial-")]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8w", "fp8", "int8"])
def test_graphs_of_lower_precision_have_plans(
    request: pytest.FixtureRequest, tmp_path: Path, command: Command, precision: str
) -> None:
    made = "half_bundle" if precision in ("fp16", "bf16") else "quantized_bundle"
    bundle = Path(shutil.copytree(request.getfixturevalue(made), tmp_path / "bundle"))
    asked = ("export.to_plan", bundle, "--precision", precision, *SMALL[:-1], "1")
    done = command(*asked, *TARGETS, "--graphs", "r2id,r2ir_encode")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(bundle)
    for name in ("r2id", "r2ir_encode"):
        plan = manifest.plan(name, precision)
        assert plan is not None and plan.file == f"{name}.{precision}.plan"
        assert plan.source_sha256 == manifest.variants[precision][name].sha256
        assert len(manifest.file_bytes(plan)) == plan.bytes > 10_000
    done = command(*asked, "--target", "sm86", "--graphs", "r2id")
    assert done.returncode == (2 if precision == "fp8" else 0)
    assert ("is FP8, which GPUs have from sm89 on" in done.stderr) == (precision == "fp8")


def test_families_that_diffuse_pixels_have_plans(
    pixel_bundle: Path, tmp_path: Path, command: Command
) -> None:
    """Those of every graph, from the least size that is drawn to one that is not square."""
    bundle = Path(shutil.copytree(pixel_bundle, tmp_path / pixel_bundle.name))
    size = ("--latent", "16x16..32x48", "--profiles", "1")
    done = command("export.to_plan", bundle, *TARGETS, *size, "--conditions", "1..2")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(bundle)
    assert {plan.graph for plan in manifest.plans.values()} == manifest.graphs.keys()
    plan = manifest.plan(manifest.step_graph)
    assert plan is not None and plan.targets == ("sm120", "sm89")
    low, _, high = plan.profiles[0]["width"]
    assert (low, high) == (16, 48) and len(manifest.file_bytes(plan)) == plan.bytes > 10_000


def test_a_plan_is_whole_in_the_library_s_eyes(built: Path) -> None:
    """Without a GPU it says that no GPU is there, of other bytes that they are no plan."""
    runtime = library.Runtime(library.Logger(library.Logger.INTERNAL_ERROR))
    malformed = library.EngineInvalidityDiagnostics.MALFORMED_ENGINE.value
    data = (built / "r2id.plan").read_bytes()
    assert not runtime.get_engine_validity(data)[1] & malformed
    assert runtime.get_engine_validity(b"x" * len(data))[1] & malformed


def test_the_shipped_model_has_plans_for_two_targets(tmp_path: Path, command: Command) -> None:
    shipped = ROOT / "build" / "mnist"
    if not shipped.exists():
        pytest.skip("no build/mnist: run `make export`")
    bundle = shutil.copytree(shipped, tmp_path / "mnist")
    done = command("export.to_plan", bundle, *TARGETS, "--profiles", 1)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(bundle)
    assert {plan.graph for plan in manifest.plans.values()} == manifest.graphs.keys()
    plan = manifest.plan("r2id")
    assert plan is not None and plan.profiles[0]["height"] == (4, 20, 256)


def test_the_update_is_the_sampler_s(tiny_bundle: Path) -> None:
    """The step graph with its update, on ONNX Runtime, against `loop.sample`."""
    manifest = read_manifest(tiny_bundle)
    spec = manifest.graph("r2id")
    interface, model = plans.with_update(spec, manifest.file_bytes(spec))
    onnx.checker.check_model(onnx.load_from_string(model))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    sizes = {"batch": 2, "conditions": 3, "height": 4, "width": 5}
    rng = np.random.default_rng(0)
    given = {
        s.name: rng.standard_normal(s.shape(sizes)).astype(np.float32) for s in interface.inputs
    }
    given["text_k"] = np.abs(given["text_k"]) + 1
    table = solvers.table("dpm++3m", COSINE, 4, eta=0.5)

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        eps = session.run(["eps"], given | {"latent": x.astype(np.float32)})[0]
        return np.asarray((given["weights"] * eps).sum(0))

    wanted = sample(predict, given["latent"], table, lambda step: given["noise"])
    for step in range(4):
        row = *table.update(step), *table.rows[step, :2]
        given["row"] = np.array(row, np.float32)
        made, x0, size = session.run(["next", "x0", "size"], given)
        np.testing.assert_allclose(size.ravel(), np.abs(made).mean(), rtol=1e-5)
        given |= {"latent": made, "x0_1": x0, "x0_2": given["x0_1"]}
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    given["noise"][0, 0, 0, 0] = np.nan
    assert np.isnan(session.run(["size"], given)[0]).all()
    assert plans.with_update(manifest.graph("r2id_film"), b"")[1] == b""


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--target", "sm75,sm89"), 2, r"is fp32, which TensorRT for RTX cannot do on sm75"),
        (("--target", "sm90"), 2, "sm90: no target of tensorrt_rtx"),
        (("--graphs", "r2id,unet"), 2, "--graphs unet"),
        (("--precision", "fp16"), 2, "no graphs in fp16"),
        (("--latent", "8x8..4x4"), 2, "smaller size first"),
        (("--batch", "8..1"), 2, "no range"),
        (("--aspect", "1:2"), 2, "no aspect"),
        (("--latent", "4x4..90000x4"), 2, "takes 1 to 65536"),
        (("--profiles", "0"), 2, "expected an integer"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_build(
    tiny_bundle: Path, command: Command, args: tuple[str, ...], code: int, words: str
) -> None:
    before = listing(tiny_bundle)
    done = command("export.to_plan", tiny_bundle, *TARGETS, *args)
    assert done.returncode == code and words in done.stderr.split("\n")[-2], done.stderr
    assert "plans:" not in done.stderr and listing(tiny_bundle) == before


def test_fp8_needs_sm89() -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, [2])], [value("y", 17, [2])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    spec = GraphSpec("g.onnx", "", "fp8", "step", (), (), {})
    job = plans.Job("g", spec, model.SerializeToString(), ())
    with pytest.raises(UsageError, match=r"y is FP8, which GPUs have from sm89 on; sm86"):
        plans.check_targets(job, ("sm89", "sm86"))
    plans.check_targets(job, ("sm89", "sm120"))


class Bar:
    """A progress bar that keeps where it was."""

    def __init__(self) -> None:
        self.n, self.seen = 0.0, [0.0]

    def refresh(self) -> None:
        self.seen.append(self.n)


def builder(tmp_path: Path, targets: tuple[str, ...], bar: Any = None) -> plans.PlanBuilder:
    return plans.PlanBuilder(library, "tensorrt_rtx", targets, tmp_path, bar or Bar(), 2)


def film(tiny_bundle: Path) -> plans.Job:
    manifest = read_manifest(tiny_bundle)
    spec = manifest.graph("r2id_film")
    return plans.Job("r2id_film", spec, manifest.file_bytes(spec), ({"steps": (2, 51, 99)},))


def test_a_builder_that_returns_nothing_names_what_it_was_given(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleError) as refused:
        builder(tmp_path, ("sm75",)).plan(film(tiny_bundle))
    for words in ("r2id_film.onnx", "sm75", "steps 2..51..99", "FP32 GEMM", "Try one --target"):
        assert words in str(refused.value)


def test_a_graph_that_the_parser_refuses_gives_its_words(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    node = helper.make_node("NoSuchThing", ["x"], ["y"], name="odd")
    graph = helper.make_graph([node], "g", [value], [helper.make_empty_tensor_value_info("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    tensor = TensorSpec("x", "float32", (2,))
    spec = GraphSpec("g.onnx", "", "fp32", "size", (tensor,), (), {})
    with pytest.raises(ArtefactError, match=r"cannot read it: odd \(NoSuchThing\): "):
        builder(tmp_path, ("sm89",)).plan(plans.Job("g", spec, model.SerializeToString(), ({},)))


def test_profiles_that_the_builder_refuses_are_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    job = film(tiny_bundle)
    odd = plans.Job(job.name, job.spec, job.model, ({"steps": (9, 5, 2)},))
    with pytest.raises((IncompatibleError, UsageError), match=r"steps 9\.\.5\.\.2"):
        builder(tmp_path, ("sm89",)).plan(odd)


def test_progress_rises_to_the_end(tiny_bundle: Path, tmp_path: Path) -> None:
    bar = Bar()
    builder(tmp_path, ("sm89",), bar).plan(film(tiny_bundle))
    assert bar.seen == sorted(bar.seen) and len(set(bar.seen)) > 10
    assert 2 < bar.seen[len(bar.seen) // 2] < 3 and bar.n == 3


def test_an_interrupt_stops_the_build_itself(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    made = builder(tmp_path, ("sm89",))
    monkeypatch.setattr(plans, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.plan(film(tiny_bundle))
    assert made.monitor.stopped
    monkeypatch.undo()
    with pytest.raises(IncompatibleError, match="built no plan"):  # the monitor says stop
        made.plan(film(tiny_bundle))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_the_bundle_as_it_was(
    own_bundle: Path, command: Command, kill: signal.Signals
) -> None:
    before = listing(own_bundle)
    line = [sys.executable, "-m", "export.to_plan", str(own_bundle), *TARGETS]
    line += ["--graphs", "r2id_film,r2id"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(own_bundle.glob(".partial-*/r2id_film.plan")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    errors = process.communicate(timeout=60)[1]
    if kill == signal.SIGKILL:
        found = {n: p for n, p in listing_files(own_bundle).items() if n in before}
        assert found == before
        done = command("export.to_plan", own_bundle, *TARGETS, "--graphs", "r2id_film")
        assert done.returncode == 0 and not list(own_bundle.glob(".partial-*"))
    else:
        assert process.returncode == 130 and "interrupted" in errors
        assert "Traceback" not in errors
        assert listing(own_bundle) == before


def listing_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_second_build_in_a_folder_fails_fast(own_bundle: Path, command: Command) -> None:
    before = listing(own_bundle)
    with exclusive(own_bundle / ".lock"):
        with pytest.raises(ResourceError, match=r"in use by process \d+"):
            exclusive(own_bundle / ".lock").__enter__()
        done = command("export.to_plan", own_bundle, *TARGETS, "--graphs", "r2id_film")
        again = ("--checkpoint", own_bundle / "tiny.safetensors", "--out", own_bundle)
        exported = command("export", *again)
    for refused in (done, exported):
        assert refused.returncode == 5 and "in use by process" in refused.stderr
    assert listing(own_bundle) == before
    done = command("export.to_plan", own_bundle, *TARGETS, "--graphs", "r2id_film")
    assert done.returncode == 0, done.stderr


def test_a_build_needs_a_gpu_for_current_and_the_library_for_a_flavour(
    tiny_bundle: Path, command: Command
) -> None:
    from runtime.engines.cuda import device_target

    try:
        device_target()
    except IncompatibleError:
        done = command("export.to_plan", tiny_bundle, "--flavour", "tensorrt_rtx")
        assert done.returncode == 4 and "nvidia-smi" in done.stderr
    done = command("export.to_plan", tiny_bundle, *TARGETS, "--flavour", "tensorrt")
    assert done.returncode in (2, 4)  # without the library, or with it: the GPU at hand only
    assert "'tensorrt>=11'" in done.stderr or "GPU at hand only" in done.stderr


def test_explain_prints_and_draws_the_profiles(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    done = command("export.to_plan", tiny_bundle, "--explain", "p.png", "--profiles", 2)
    assert done.returncode == 0, done.stderr
    assert "latent: expected slow-down with 1, 2" in done.stdout
    assert done.stdout.count("profile 1: batch 1..3..8, height") == 2
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plan_from_fp16_interfaces_keeps_its_update_in_fp32(tiny_bundle: Path) -> None:
    spec = read_manifest(tiny_bundle).graph("r2id")
    extra = plan_interface(spec).inputs[len(spec.inputs) :]
    assert {tensor.dtype for tensor in extra} == {"float32"}
    assert [tensor.name for tensor in extra] == ["weights", "row", *HISTORY, "noise"]


def test_a_range_is_one_size_or_two() -> None:
    assert to_plan.size_span("4x5") == ((4, 4), (5, 5))
    assert to_plan.size_span("4x5..8x6") == ((4, 8), (5, 6))
    assert SizeRange(*to_plan.size_span("4x4..8x9"), to_plan.aspect("16:9")).widths(4) == (4, 7)


def test_a_build_replaces_only_its_own_plans(built: Path, tmp_path: Path, command: Command) -> None:
    bundle = shutil.copytree(built, tmp_path / "copy")
    before = json.loads((bundle / "manifest.json").read_text())["plans"]
    done = command("export.to_plan", bundle, "--target", "sm86", *SMALL, "--graphs", "r2id_film")
    assert done.returncode == 0, done.stderr
    after = json.loads((bundle / "manifest.json").read_text())["plans"]
    assert after["r2id_film.plan"]["targets"] == ["sm86"]
    assert after["r2id_film.plan"]["sha256"] == sha256((bundle / "r2id_film.plan").read_bytes())
    assert {**after, "r2id_film.plan": None} == {**before, "r2id_film.plan": None}
