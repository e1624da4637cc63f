"""The runtime draws a family that nobody has: it needs a manifest and graphs, and no code."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from runtime import Bundle, open_bundle
from runtime.bundle.manifest import read_manifest
from runtime.engines import Engine, EngineOptions
from runtime.errors import ArtefactError, StoppedError, UsageError
from runtime.pipeline.diffuser import Progress
from runtime.pipeline.opened import Engines
from runtime.sampling import solvers
from runtime.sampling.guidance import guided
from runtime.sampling.loop import sample
from runtime.sampling.noise import NoiseStreams
from runtime.sampling.request import Request
from runtime.sampling.schedule import COSINE
from tests.conftest import Command
from tests.runtime.invented import LATENT, closed_form, graph, write_bundle


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("invented"))


@pytest.fixture(scope="module")
def bundle(invented: Path) -> Bundle:
    return open_bundle(invented, EngineOptions(threads=1))


def test_one_evaluation_is_the_closed_form(bundle: Bundle) -> None:
    rng = np.random.default_rng(1)
    for size in ((12, 9), (3, 48), (6, 6)):
        latent = rng.standard_normal((2, 3, *size)).astype(np.float32)
        conditions = rng.random((3, 2, 3)).astype(np.float32)
        eps = bundle.denoise(latent, 0.3, conditions)
        np.testing.assert_allclose(eps, closed_form(latent, 0.3, conditions), atol=1e-6)
    with pytest.raises(UsageError, match=r"expected \[B, 3, H, W\], \[K, B, 3\]"):
        bundle.denoise(latent, 0.3, conditions[..., :2])
    with pytest.raises(UsageError, match="nearest legal size is 6x9"):
        bundle.denoise(np.zeros((2, 3, 5, 8), np.float32), 0.3, conditions)


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m"])
def test_whole_runs_are_those_of_the_closed_form(bundle: Bundle, solver: str) -> None:
    made = bundle.generate([2, None], (6, 9), steps=7, solver=solver, guidance_scale=3, seed=4)
    assert made.images.shape == (2, 3, 6, 9) and np.abs(made.images).max() <= 1
    np.testing.assert_array_equal(made.images, np.clip(made.latents, -1, 1))
    conditions = np.zeros((2, 2, 3), np.float32)
    conditions[1, 0, 2] = 1
    table = solvers.table(solver, COSINE, 7)
    weights = [np.array([w, 1 - w]).reshape(2, 1, 1, 1) for w in (-2.0, 3.0)]
    weights[0][1], weights[1][1] = 1, 0
    predict = guided(lambda x, step: closed_form(x, table.alpha_bar[step], conditions), weights)
    start = NoiseStreams(4, range(2), (3, 6, 9), "coherent").draw()
    wanted = sample(predict, start, table)
    np.testing.assert_allclose(made.latents, wanted, rtol=1e-4, atol=1e-4)
    assert made._repr_png_()[:4] == b"\x89PNG"


def test_progress_tells_and_stops(bundle: Bundle) -> None:
    seen: list[Progress] = []

    def on_step(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step == 3

    with pytest.raises(StoppedError, match="stopped after step 3 of 5"):
        bundle.generate([0], steps=5, on_step=on_step)
    assert [(p.step, p.steps) for p in seen] == [(1, 5), (2, 5), (3, 5)]
    assert seen[2].x0.shape == (1, 3, 12, 9)
    np.testing.assert_array_equal(seen[2].decode(), np.clip(seen[2].x0, -1, 1))
    assert bundle.generate([0], steps=2).images.shape == (1, 3, 12, 9)


def test_what_outlives_a_step_is_computed_once(invented: Path) -> None:
    """A graph runs again where its size, schedule or prompt has changed, and only then."""
    runs: list[str] = []

    class Counting(Engines):
        def open(self, graph: str, precision: str | None = None) -> Engine:
            runs.append(graph)
            return super().open(graph, precision)

    bundle = Bundle(read_manifest(invented), engines=Counting(read_manifest(invented)))

    def ran(**options: Any) -> list[str]:
        request = Request(**{"labels": [1], "latent": (6, 6), "steps": 3, **options})
        runs.clear()
        bundle.diffuser.prepare(request, request.latent)
        return [*runs]

    assert ran() == ["geometry", "clock", "palette"]
    assert ran() == [] and ran(seed=3) == []
    assert ran(latent=(6, 9)) == ["geometry"]
    assert ran(latent=(6, 9), steps=4) == ["clock"]
    assert ran(latent=(6, 9), steps=4, labels=[2]) == ["palette"]


def test_eight_threads_share_it(bundle: Bundle) -> None:
    def draw(index: int) -> bytes:
        return bundle.generate([index % 3], steps=3, first_index=index).images.tobytes()

    serial = [draw(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(8))) == serial


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent": (13, 9)}, "multiples of 3; the nearest legal size is 12x9. Pass --latent 12x9"),
        ({"latent": (300, 1)}, "the nearest legal size is 48x3"),
        ({"image": (24, 18)}, "invented diffuses pixels and has no resampler; expected 12x9"),
        ({"continue_at": (16, 12)}, "continue-at 16x12: .* the nearest legal size is 15x12"),
        ({"labels": [3]}, "label 3 is not in this bundle. Expected one of dawn, noon"),
    ],
)
def test_illegal_requests_name_the_nearest(
    invented: Path, options: dict[str, object], words: str
) -> None:
    fresh = open_bundle(invented)
    with pytest.raises(UsageError, match=words):
        fresh.generate(**{"labels": [1], "latent": (12, 9), **options})  # type: ignore[arg-type]
    assert not fresh.engines.opened


def test_every_command_works_on_it(invented: Path, command: Command, tmp_path: Path) -> None:
    engine = ("--engine", invented, "--threads", 1)
    done = command("runtime.generate", *engine, "--label", "0-2", "--latent", "24x12")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (12 * 3 + 4, 24)
    before = (tmp_path / "out.png").read_bytes()
    again = ("--from-png", "out.png", "--out", "again.png")
    assert command("runtime.generate", *engine, *again).returncode == 0
    assert (tmp_path / "again.png").read_bytes() == before
    larger = ("--latent", "6x9", "--continue-at", "12x18", "--preview", "--crop", "2,3,5,7")
    state = ("--state", "kept.npz", "--out", "a.png", "--label", "1", "--memory", "900MB")
    done = command("runtime.generate", *engine, *larger, *state)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (7, 5)
    assert Image.open(tmp_path / "a-preview.png").size == (12, 9)
    drawn = command("runtime.render", "kept.npz", "--size", "12x18", *engine, "--out", "b.png")
    assert drawn.returncode == 0, drawn.stderr
    cut = np.asarray(Image.open(tmp_path / "b.png"))[2:7, 3:10]
    np.testing.assert_array_equal(cut, np.asarray(Image.open(tmp_path / "a.png")))
    other = command("runtime.render", "kept.npz", "--size", "24x36", *engine)
    assert other.returncode == 2 and "expected the size 12x18" in other.stderr
    refused = command("runtime.resample", "b.png", "--size", "24x36", *engine)
    assert refused.returncode == 2 and "has no resampler" in refused.stderr
    wide = command("runtime.generate", *engine, "--latent", "3x48", "--label", "none")
    assert wide.returncode == 0 and "outside of that and may look worse" in wide.stderr
    illegal = command("runtime.generate", *engine, "--latent", "25x12")
    assert illegal.returncode == 2 and "the nearest legal size is 24x12" in illegal.stderr


def test_it_can_be_looked_at(invented: Path, command: Command) -> None:
    done = command("runtime.inspect", invented)
    assert done.returncode == 0, done.stderr
    assert "invented: images of 3 colour channels, diffused as pixels" in done.stdout
    assert "3 to 48, multiples of 3" in done.stdout and "dawn, noon, dusk" in done.stdout
    found = json.loads(command("runtime.inspect", invented, "--json").stdout)
    assert found["graphs"]["brush"]["lifetime"] == "step"
    advice = command("runtime.doctor", invented).stdout
    assert f"--engine {invented / 'brush.onnx'} --label 0-2" in advice


def test_without_labels_and_prompts_it_is_unconditional(tmp_path: Path) -> None:
    manifest = read_manifest(write_bundle(tmp_path))
    step = graph(
        tmp_path,
        "alone",
        "step",
        {"latent": LATENT, "gain": ()},
        {"eps": (1, *LATENT)},
        [("Mul", ["latent", "gain"], ["same"], {}), ("Unsqueeze", ["same", "zero"], ["eps"], {})],
        {"zero": np.array([0], np.int64)},
    )
    interface = replace(manifest.interface, labels=())
    graphs = {"clock": manifest.graphs["clock"], "alone": step}
    replace(manifest, interface=interface, graphs=graphs).write(tmp_path)
    bundle = open_bundle(tmp_path)
    assert bundle.generate([None, None], steps=3).images.shape == (2, 3, 12, 9)
    with pytest.raises(UsageError, match="label 0 is given; this bundle has none"):
        bundle.generate([0])


def test_a_prompt_may_take_the_schedule(tmp_path: Path) -> None:
    """What depends on both has steps, then conditions: indexed by the step, then gathered."""
    manifest = read_manifest(write_bundle(tmp_path))
    film = graph(
        tmp_path,
        "film",
        "prompt",
        {"alpha_bar": ("steps",), "condition": ("conditions", 3)},
        {"film": ("steps", "conditions", 3)},
        [
            ("Unsqueeze", ["alpha_bar", "behind"], ["points"], {}),
            ("Mul", ["points", "condition"], ["film"], {}),
        ],
        {"behind": np.array([1, 2], np.int64)},
    )
    step = graph(
        tmp_path,
        "stain",
        "step",
        {"latent": LATENT, "film": ("conditions", "batch", 3)},
        {"eps": ("conditions", *LATENT)},
        [
            ("Unsqueeze", ["film", "behind"], ["stain"], {}),
            ("Add", ["latent", "stain"], ["eps"], {}),
        ],
        {"behind": np.array([3, 4], np.int64)},
    )
    replace(manifest, graphs={"film": film, "stain": step}).write(tmp_path)
    bundle = open_bundle(tmp_path)
    table = solvers.table("ddim", COSINE, 5)
    options: dict[str, Any] = {
        "solver": "ddim",
        "guidance_scale": 3.0,
        "guidance_interval": (0.3, 0.7),
    }
    made = bundle.generate([1, 2], (6, 3), steps=5, **options)
    request = Request([1, 2], (6, 3), steps=5, **options)
    guidance = bundle.diffuser.guidance(request, table)
    assert {len(guidance.branches(step)) for step in range(5)} == {1, 2}

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        weights = guidance.weights[step][..., None, None, None]
        stain = table.alpha_bar[step] * guidance.conditions[..., None, None]
        return ((x + stain) * weights).sum(0)

    start = NoiseStreams(0, range(2), (3, 6, 3), "coherent").draw()
    wanted = sample(predict, start, table)
    np.testing.assert_allclose(made.latents, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gain": ["height"]}, r"brush.onnx takes gain \('height',\), but what is given has \(\)"),
        ({"shine": []}, "takes shine .*, but nothing before it gives that"),
        ({"latent": ["batch", 4, "height", "width"]}, r"takes latent \('batch', 4"),
    ],
)
def test_wires_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, list[object]], words: str
) -> None:
    write_bundle(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    inputs = content["graphs"]["brush"]["inputs"]
    for name, axes in change.items():
        found = [tensor for tensor in inputs if tensor["name"] == name]
        if not found:
            inputs.append({"name": name, "dtype": "float32", "axes": axes})
        else:
            found[0]["axes"] = axes
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=words):
        open_bundle(tmp_path)
