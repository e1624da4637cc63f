"""OpenVINO as an engine: the same pictures as ONNX Runtime, the same errors."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import Array, Manifest, TensorSpec, read_manifest, relative_error
from runtime.engines import EngineOptions, kernels, open_engine
from runtime.engines import openvino as module
from runtime.engines.openvino import OWN_FORMS, OWN_TOKENS, OpenVinoEngine, load_core
from runtime.errors import ArtefactError, IncompatibleError, NumericalError, UsageError
from runtime.images.pixels import read_metadata
from runtime.pipeline.bundle import Bundle
from tests.conftest import ROOT, Command
from tests.runtime.test_faults import LINUX, field, model, spec_of, tensor

INSTALL = "python -m pip install 'openvino>=2026.4'"
NEEDED = pytest.mark.skipif(not find_spec("openvino"), reason=f"no openvino: {INSTALL}")
SIZES = (
    {"batch": 1, "conditions": 1, "height": 1, "width": 1, "steps": 1},
    {"batch": 2, "conditions": 3, "height": 5, "width": 7, "steps": 4},
    {"batch": 1, "conditions": 2, "height": 33, "width": 40, "steps": 51},
)


def options(**given: object) -> EngineOptions:
    return EngineOptions("openvino", threads=1, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle, options())


def inputs(manifest: Manifest, graph: str, sizes: dict[str, int]) -> dict[str, Array]:
    random = np.random.default_rng(1)
    shapes = {spec.name: spec.shape(sizes) for spec in manifest.graph(graph).inputs}
    return {name: random.random(shape, np.float32) for name, shape in shapes.items()}


def bf16_here() -> bool:
    return "BF16" in load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@NEEDED
def test_every_graph_gives_what_onnx_runtime_gives(manifest: Manifest) -> None:
    for graph in manifest.graphs:
        own = open_engine(manifest, graph, options())
        other = open_engine(manifest, graph, EngineOptions(threads=1))
        assert own.provider == "openvino"
        for sizes in SIZES:
            feed = inputs(manifest, graph, sizes)
            wanted, found = other.run(feed), own.run(feed)
            assert found.keys() == wanted.keys()
            for name, array in wanted.items():
                assert relative_error(found[name], array) < 1e-4, (graph, name, sizes)


@NEEDED
def test_sums_over_the_step_s_tokens_are_reductions(manifest: Manifest) -> None:
    """Two AdaLNs and a self-attention in an encoder block, three and one in a decoder block."""
    engine = open_engine(manifest, "r2id", options())
    assert isinstance(engine, OpenVinoEngine)
    kinds = Counter(node.get_type_name() for node in engine.graph.get_ordered_ops())
    encoders, decoders = 1, 2
    assert kinds["ReduceL2"] == 2 * encoders + 3 * decoders
    assert kinds["ReduceSum"] == encoders + decoders
    assert kinds["Sqrt"] == kinds["ReduceL2"]  # of the numbers that the rows repeated


@NEEDED
def test_pictures_are_those_of_onnx_runtime(pipeline: Bundle, tiny_bundle: Path) -> None:
    wanted = open_bundle(tiny_bundle).generate([1, None], latent=(5, 7), steps=5, eta=0.5)
    found = pipeline.generate([1, None], latent=(5, 7), steps=5, eta=0.5)
    assert pipeline.provider == "openvino"
    assert relative_error(found.images, wanted.images) < 1e-4
    pixels = wanted.images
    resampled = open_bundle(tiny_bundle).resample(pixels, (9, 31))
    assert relative_error(pipeline.resample(pixels, (9, 31)), resampled) < 1e-4


@NEEDED
def test_only_the_step_runs_in_bf16_and_needs_no_graph_of_its_own(manifest: Manifest) -> None:
    if not bf16_here():
        with pytest.raises(IncompatibleError, match=r"expected BF16.*--precision fp32"):
            open_engine(manifest, "r2id", options(precision="bf16"))
        return
    assert "bf16" not in manifest.variants
    half = Bundle(manifest, options(precision="bf16"))
    for graph in manifest.graphs:
        engine = open_engine(manifest, graph, options(precision="bf16"))
        assert isinstance(engine, OpenVinoEngine)
        wanted = "bf16" if graph == "r2id" else "f32"
        assert engine.properties["INFERENCE_PRECISION_HINT"] == wanted, graph
    feed = inputs(manifest, "r2id", SIZES[1])
    eps = open_engine(manifest, "r2id", EngineOptions()).run(feed)["eps"]
    assert 1e-4 < relative_error(half.engines.open("r2id").run(feed)["eps"], eps) < 0.05
    with pytest.raises(UsageError, match="no graphs in fp16"):
        Bundle(manifest, options(precision="fp16"))


@NEEDED
def test_eight_threads_draw_what_one_draws(pipeline: Bundle) -> None:
    def draw(index: int) -> bytes:
        made = pipeline.generate([index], latent=(4, 3 + index), steps=3, first_index=index)
        return made.images.tobytes()

    serial = [draw(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(8))) == serial


@NEEDED
def test_results_are_the_callers_own(pipeline: Bundle) -> None:
    engine = pipeline.engines.open("r2id_film")
    first = engine.run({"alpha_bar": np.array([0.2], np.float32)})["film"]
    kept = first.copy()
    engine.run({"alpha_bar": np.array([0.9], np.float32)})
    np.testing.assert_array_equal(first, kept)


@NEEDED
def test_provider_options_are_openvino_s_properties(manifest: Manifest) -> None:
    own = options(provider_options={"INFERENCE_NUM_THREADS": "2", "PERF_COUNT": "YES"})
    for graph in ("r2id_film", "r2id"):
        engine = open_engine(manifest, graph, own)
        assert isinstance(engine, OpenVinoEngine)
        engine.run(inputs(manifest, graph, SIZES[0]))
        (native,) = engine.compiled.values()
        assert native.get_property("PERF_COUNT") == "YES"
        assert native.get_property("INFERENCE_NUM_THREADS") == 2
    wrongs = (("NO_SUCH", "1", "NO_SUCH"), ("NUM_STREAMS", "many", "many"))
    for graph, (key, value, words) in product(("r2id_film", "r2id"), wrongs):
        wrong, words = {key: value}, rf"refuses it .*{words}.*Check each --provider-option"
        with pytest.raises(IncompatibleError, match=words) as caught:
            open_engine(manifest, graph, options(provider_options=wrong))
        assert "\n" not in str(caught.value) and "src/" not in str(caught.value)
        own = options(provider_options=wrong, allow_fallback=True)
        assert open_engine(manifest, graph, own).provider == "cpu"


@NEEDED
def test_a_request_gives_its_bytes_whatever_was_drawn_before(tiny_bundle: Path) -> None:
    """Small and large ones, at the default size and at others, by one thread and by eight."""
    sizes = [(8, 8), (3, 5), (32, 33), (9, 2), (40, 30), (5, 3)]

    def draw(pipeline: Bundle, turn: int) -> bytes:
        size = sizes[turn % len(sizes)]
        return pipeline.generate([1], latent=size, steps=2, seed=turn).images.tobytes()

    fresh = [draw(open_bundle(tiny_bundle, options()), turn) for turn in range(len(sizes))]
    for order in (range(len(sizes)), reversed(range(len(sizes)))):
        pipeline = open_bundle(tiny_bundle, options())
        with ThreadPoolExecutor(8) as pool:
            turns = [*order] * 3
            found = [*pool.map(draw, [pipeline] * len(turns), turns)]
        assert found == [fresh[turn] for turn in turns]


@NEEDED
def test_large_steps_and_the_default_size_have_forms_of_their_own(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    engine, other = (open_engine(manifest, "r2id", o) for o in (options(), EngineOptions()))
    assert isinstance(engine, OpenVinoEngine)
    least = OWN_TOKENS // 6 // 5  # of 3 conditions, 2 images and 5 rows
    widths = [1, least, least + 1, least + 2, 7]
    for width in (*widths, *range(least + 3, least + 3 + OWN_FORMS)):
        feed = inputs(manifest, "r2id", SIZES[1] | {"width": width})
        assert relative_error(engine.run(feed)["eps"], other.run(feed)["eps"]) < 1e-4
        if width == 7:
            own = [shapes[0][3] for shapes in engine.compiled if shapes]
            assert own == [least + 1, least + 2] and () in engine.compiled
    assert len(engine.compiled) == OWN_FORMS  # the latest
    height, width = manifest.interface.default_latent
    engine.run(inputs(manifest, "r2id", SIZES[0] | {"height": height, "width": width}))
    assert [*engine.compiled][-1][0] == (1, 4, height, width)


@NEEDED
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_graphs_are_kept_and_give_the_same_bytes(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if precision == "bf16" and not bf16_here():
        pytest.skip("this CPU has no bf16 in OpenVINO")
    manifest, own = read_manifest(tiny_bundle), options(precision=precision)
    compiled, core = [], load_core()

    class Counted:
        """OpenVINO's core, which says what it compiles."""

        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def compile_model(self, *args: object) -> object:
            compiled.append(args)
            return core.compile_model(*args)

    monkeypatch.setattr(module, "load_core", lambda: Counted())

    def draw() -> tuple[list[bytes], int]:
        """Every graph's outputs at three sizes, one with a form of its own, freshly opened."""
        before, found = len(compiled), []
        for graph in manifest.graphs:
            engine = open_engine(manifest, graph, own)
            for sizes in SIZES:
                found += [a.tobytes() for a in engine.run(inputs(manifest, graph, sizes)).values()]
        return found, len(compiled) - before

    fresh, every = draw()
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "kept"))
    assert draw() == (fresh, every)
    kept = sorted((tmp_path / "kept").glob("openvino-*.cache"))
    assert len(kept) == every - 1  # less what shows that properties are refused
    assert draw() == (fresh, 1)
    damaged = bytearray(kept[0].read_bytes())
    damaged[len(damaged) // 2] ^= 64
    kept[0].write_bytes(damaged)
    kernels.write(kept[1], b"of another version")
    assert draw() == (fresh, 3)
    assert draw() == (fresh, 1)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "file"))
    assert draw() == (fresh, every)


@NEEDED
def test_graphs_that_are_damaged_or_none_are_refused(own_bundle: Path) -> None:
    path = own_bundle / "r2id.onnx"
    content = json.loads((own_bundle / "manifest.json").read_text())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match=r"SHA-256 .* the manifest expects"):
        open_bundle(own_bundle, options()).engines.open("r2id")
    nonsense = model(field(5, tensor(None))).replace(b"Add", b"Odd")
    outside = model(field(5, tensor("../secret")))
    for data, words in ((nonsense, "refuses it .*python -m export"), (outside, "outside the file")):
        path.write_bytes(data)
        content["graphs"]["r2id"]["sha256"] = sha256(data)
        (own_bundle / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ArtefactError, match=words) as caught:
            open_bundle(own_bundle, options()).engines.open("r2id")
        assert "\n" not in str(caught.value)


@NEEDED
def test_a_wrong_input_is_named_before_any_native_call(pipeline: Bundle) -> None:
    with pytest.raises(UsageError, match="alpha_bar is missing"):
        pipeline.engines.open("r2id_film").run({})


@NEEDED
def test_a_run_that_fails_says_why_and_the_next_one_works() -> None:
    data = model(field(5, tensor(None)))
    engine = OpenVinoEngine(spec_of(data), data, options())
    good = {"x": np.ones(4, np.float32)}
    other = TensorSpec("x", "float32", (5,))  # so that the library meets it
    engine.spec = replace(engine.spec, inputs=(other,))
    with pytest.raises(NumericalError, match=r"sum\.onnx: .*shape"):
        engine.run({"x": np.ones(5, np.float32)})
    engine.spec = spec_of(data)
    np.testing.assert_array_equal(engine.run(good)["y"], np.arange(1, 5, dtype=np.float32))


@NEEDED
def test_a_graph_that_fails_with_memory_to_spare_is_not_run_again(manifest: Manifest) -> None:
    """One whose output OpenVINO leaves unwritten, as it does of some that are damaged."""
    engine = open_engine(manifest, "r2id_position", options())
    assert isinstance(engine, OpenVinoEngine)
    feed = inputs(manifest, "r2id_position", SIZES[1])
    whole, spec = engine.run(feed)["position"], engine.spec
    engine.spec = replace(spec, outputs=(replace(spec.outputs[0], axes=("height", 1, 16)),))
    with pytest.raises(ArtefactError, match=r"position.onnx: openvino fails .* to spare"):
        engine.run(feed)
    engine.spec = spec
    with pytest.raises(ArtefactError, match=r"position.onnx: openvino fails .* to spare"):
        engine.run(feed)
    again = open_engine(manifest, "r2id_position", options())
    np.testing.assert_array_equal(again.run(feed)["position"], whole)


OUT_OF_MEMORY = """
import sys
import numpy as np
from runtime import open_bundle
from runtime.coordinates import grid
from runtime.engines import EngineOptions
from runtime.errors import ResourceError
from tests.runtime.test_faults import limit_memory

pipeline = open_bundle(sys.argv[1], EngineOptions("openvino", threads=int(sys.argv[2])))
small = lambda: pipeline.generate([1], latent=(4, 4), steps=2).images.tobytes()
before = small()
side = 1500
coordinates, pixels = grid(side, side), np.zeros((1, 1, side, side), np.float32)
pipeline.encode(pixels[:, :, :8, :8], (2, 2))
limit_memory(300 << 20)
# The second gives outputs of the size of the run before it, whatever the size of its inputs.
for graph, large in ("r2id_position", {}), ("r2ir_image_summary", {"pixels": pixels}):
    try:
        pipeline.engines.open(graph).run({"coordinates": coordinates, **large})
        sys.exit(f"{graph} was met")
    except ResourceError as error:
        print(error)
    assert small() == before
"""


@LINUX
@NEEDED
@pytest.mark.parametrize("threads", [1, 2])
def test_a_smaller_request_works_after_memory_ran_out(threads: int, tiny_bundle: Path) -> None:
    line = [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_bundle), str(threads)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    for said, graph in zip(done.stdout.splitlines(), ("position", "summary"), strict=True):
        assert f"{graph}.onnx: out of memory" in said and "--latent" in said


def test_without_openvino_the_command_that_installs_it_is_named(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('not installed')")
    base = ("--engine", tiny_bundle, "--provider", "openvino", "--steps", 1, "--label", 1)
    done = command("runtime.generate", *base)
    assert done.returncode == 4 and INSTALL in done.stderr and "Traceback" not in done.stderr
    done = command("runtime.generate", *base, "--allow-fallback")
    assert done.returncode == 0, done.stderr
    assert read_metadata(tmp_path / "out.png")["provider"] == "cpu"


@NEEDED
def test_a_picture_names_its_provider_and_is_drawn_again(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    base = ("--engine", tiny_bundle, "--provider", "openvino", "--threads", 1)
    assert command("runtime.generate", *base, "--steps", 2, "--label", "0-1").returncode == 0
    assert read_metadata(tmp_path / "out.png")["provider"] == "openvino"
    again = ("--from-png", "out.png", "--out", "again.png")
    assert command("runtime.generate", *base, *again).returncode == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
