"""A bundle opened: batches, branches, sizes, faults."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import Array, Manifest, read_manifest
from runtime.engines import EngineOptions
from runtime.errors import ArtefactError, IncompatibleError, NumericalError, UsageError
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.diffuser import Progress
from runtime.sampling import solvers
from runtime.sampling.guidance import guidance
from runtime.sampling.labels import Label, Labels
from runtime.sampling.noise import NoiseStreams, spread
from runtime.sampling.request import Request
from runtime.sampling.schedule import COSINE
from tests.conftest import poison_film

SINGLE = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle / "r2id.onnx", SINGLE)


def test_sizes_and_ranges_of_what_is_generated(pipeline: Bundle) -> None:
    made = pipeline.generate([1, None], latent=(3, 5), image=(7, 40), steps=2)
    assert made.images.shape == (2, 1, 7, 40) and made.images.dtype == np.float32
    assert made.latents.shape == (2, 4, 3, 5)
    assert np.abs(made.images).max() <= 1 + 1e-6  # tanh of ONNX Runtime may round up
    default = pipeline.generate([1], latent=(3, 5), steps=1)
    assert default.images.shape == (1, 1, 12, 20)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3)])
def test_an_image_does_not_depend_on_its_batch(pipeline: Bundle, size: tuple[int, int]) -> None:
    labels: list[Label] = [3, None, {1: 0.5, 2: 0.5}, 9, 0]
    together = pipeline.generate(labels, latent=size, steps=3, seed=5, eta=1.0)
    for index, label in enumerate(labels):
        alone = pipeline.generate([label], latent=size, steps=3, seed=5, eta=1.0, first_index=index)
        np.testing.assert_array_equal(alone.images[0], together.images[index])


@pytest.mark.parametrize("kind", ["coherent", "independent"])
def test_steps_go_on_at_a_larger_latent(pipeline: Bundle, kind: str) -> None:
    labels: list[Label] = [3, None, 7]
    options: dict[str, Any] = {"steps": 6, "seed": 5, "eta": 1.0, "noise": kind, "latent": (4, 6)}
    seen: list[Progress] = []
    made = pipeline.generate(labels, **options, continue_at=(6, 9), on_step=seen.append)
    assert made.latents.shape == (3, 4, 6, 9) and made.images.shape == (3, 1, 24, 36)
    assert [(p.step, p.steps) for p in seen] == [(step, 6) for step in range(1, 7)]
    assert [p.x0.shape[2:] for p in seen] == [(4, 6)] * 3 + [(6, 9)] * 3
    np.testing.assert_allclose(seen[-1].decode((5, 7)), pipeline.decode(seen[-1].x0, (5, 7)))
    for index, label in enumerate(labels):
        alone = pipeline.generate(
            [label], **options, continue_at=(6, 9), continue_from=3, first_index=index
        )
        np.testing.assert_array_equal(alone.images[0], made.images[index])
    other = pipeline.generate(labels, **options, continue_at=(6, 9), continue_from=2)
    assert not np.array_equal(other.images, made.images)


def test_every_step_has_a_draw_of_its_own(
    pipeline: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    draw = NoiseStreams.draw

    def counted(streams: NoiseStreams, number: int = 0) -> np.ndarray:
        numbers.append(number)
        return draw(streams, number)

    monkeypatch.setattr(NoiseStreams, "draw", counted)
    larger: dict[str, Any] = {"latent": (2, 2), "continue_at": (4, 4), "continue_from": 2}
    for solver, wanted in (("ddim", [0, 1, 2, 0, 3, 4]), ("dpm++3m", [0, 1, 2, 0, 3])):
        numbers.clear()
        pipeline.generate([1], **larger, steps=4, eta=1.0, solver=solver)
        assert numbers == wanted


def test_an_enlarged_sample_has_its_noise_and_its_picture(pipeline: Bundle) -> None:
    """x0 as R2IR enlarges it, noise of the variance that the step has."""
    count, steps, step = 64, 10, 6
    a = float(solvers.table("ddim", COSINE, steps).alpha_bar[step])
    request = Request([None] * count, (6, 6), seed=1)
    small, large = (pipeline.diffuser.noise(request, side).draw() for side in ((6, 6), (9, 9)))
    x0 = pipeline.encode(np.zeros((count, 1, 24, 24), np.float32), (6, 6))
    x = (a**0.5 * x0 + (1 - a) ** 0.5 * small).astype(np.float32)
    found = pipeline.diffuser.enlarge(x, small, a, large)
    larger = pipeline.encode(pipeline.decode(x0, (36, 36)), (9, 9))
    noise = (found - a**0.5 * larger) / (1 - a) ** 0.5
    assert abs(noise.var() - 1) < 0.03 and abs(noise.mean()) < 0.03
    rows = spread(6, 9)
    np.testing.assert_allclose(rows.T @ noise @ rows, small, atol=1e-3)


def test_one_seed_draws_alike_at_every_size(pipeline: Bundle) -> None:
    """Even random weights see the same low frequencies; of independent noise they do not."""

    def latents(kind: str, side: int) -> np.ndarray:
        made = pipeline.generate([1] * 8, latent=(side, side), steps=4, noise=kind).latents
        return made.reshape(8, 4, 6, side // 6, 6, side // 6).mean((3, 5)).ravel()

    likeness = {
        kind: np.corrcoef(latents(kind, 6), latents(kind, 12))[0, 1]
        for kind in ("coherent", "independent")
    }
    assert likeness["coherent"] > likeness["independent"] + 0.2


def test_guidance_one_runs_the_label_alone() -> None:
    def branches(labels: list[Label], guidance_scale: float) -> tuple[Array, list[Array]]:
        each = Labels("0123456789").of_images(labels)
        made = guidance(each, 10, guidance_scale, np.array([0.5]))
        return made.conditions, made.at(0)

    assert len(branches([3, 4], 1.0)[0]) == 1
    assert len(branches([None], 7.0)[0]) == 1
    conditions, weights = branches([3, {1: 0.25, 2: 0.75}], 2.0)
    assert conditions.shape == (3, 2, 10)
    weights_by_image = [[float(w[image, 0, 0, 0]) for w in weights] for image in (0, 1)]
    assert weights_by_image == [[-1, 2, 0], [-1, 0.5, 1.5]]


def test_guidance_is_linear_in_its_branches(pipeline: Bundle) -> None:
    """One step from the same noise: eps at g = 3 is 3 · eps at 1 minus 2 · eps at 0."""
    latents = {
        g: pipeline.generate([4], latent=(4, 6), steps=1, guidance_scale=g).latents
        for g in (0, 1, 3)
    }
    np.testing.assert_allclose(latents[3], 3 * latents[1] - 2 * latents[0], rtol=1e-3, atol=1e-2)


def test_encode_and_decode_take_any_size(pipeline: Bundle) -> None:
    pixels = np.linspace(-1, 1, 2 * 9 * 14, dtype=np.float32).reshape(2, 1, 9, 14)
    latent = pipeline.encode(pixels, (1, 3))
    assert latent.shape == (2, 4, 1, 3) and np.abs(latent).max() <= 1
    assert pipeline.decode(latent, (5, 1)).shape == (2, 1, 5, 1)
    assert pipeline.resample(pixels, (18, 28)).shape == (2, 1, 18, 28)


def test_eight_threads_draw_what_one_draws(pipeline: Bundle) -> None:
    def draw(index: int) -> bytes:
        return pipeline.generate([index], steps=3, first_index=index).images.tobytes()

    serial = [draw(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(8))) == serial


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [10]}, "label 10 is not in this bundle"),
        ({"labels": []}, "no label"),
        (
            {"latent": (0, 8)},
            "latent 0x8: .* 1 to 65536; the nearest legal size is 1x8",
        ),
        ({"image": (1, 1 << 20)}, "the nearest legal size is 1x65536"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"noise": "pink"}, "noise is 'pink'; expected coherent or independent"),
        ({"continue_from": 3}, "continue_from is given alone"),
        ({"latent": (4, 6), "continue_at": (8, 8)}, r"as 8x12"),
        ({"latent": (4, 6), "continue_at": (2, 3)}, "a larger size"),
        ({"continue_at": (8, 8), "continue_from": 50}, "continue_from is 50 of 12"),
        ({"solver": "euler"}, "solver is 'euler'; expected ddim or"),
        ({"spacing": "even"}, "spacing is 'even'; expected time or"),
        ({"guidance_interval": (0.7, 0.2)}, r"guidance_interval is 0\.7\.\.0\.2"),
        ({"continue_at": (30_000, 30_000), "image": (8, 8)}, "image 120000x120000"),
        ({"continue_at": (8, 8), "steps": 1}, "continue_from is 0 of 1"),
        ({"continue_at": (1 << 20, 1 << 20), "image": (8, 8)}, "continue-at 1048576x1048576"),
    ],
)
def test_bad_requests_are_refused_before_any_engine(
    tiny_bundle: Path, options: dict[str, object], words: str
) -> None:
    fresh = open_bundle(tiny_bundle)
    with pytest.raises(UsageError, match=words):
        fresh.generate(**{"labels": [1], **options})  # type: ignore[arg-type]
    assert not fresh.engines.opened


def test_a_wrong_input_is_named(pipeline: Bundle) -> None:
    engine = pipeline.engines.open("r2ir_latent_summary")
    latent = np.zeros((1, 4, 2, 3), np.float32)
    coordinates = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(UsageError, match="coordinates is missing"):
        engine.run({"latent": latent})
    with pytest.raises(UsageError, match="float64"):
        engine.run({"latent": latent.astype(np.float64), "coordinates": coordinates})
    with pytest.raises(UsageError, match="height = 2"):
        engine.run({"latent": latent, "coordinates": np.zeros((3, 3, 4), np.float32)})


def test_nan_in_the_loop_names_its_step(tiny_bundle: Path) -> None:
    broken = open_bundle(tiny_bundle)
    poison_film(broken, step=2)
    with pytest.raises(NumericalError, match="step 3 of 5"):
        broken.generate([1], steps=5)


def rewrite(bundle: Path, change: dict[str, object]) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_altered_missing_and_foreign_graphs_are_refused(own_bundle: Path) -> None:
    graph = own_bundle / "r2id.cpu.onnx"
    whole = graph.read_bytes()
    for data in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        graph.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"SHA-256 .* the manifest expects"):
            open_bundle(own_bundle).engines.open("r2id")
    graph.write_bytes((own_bundle / "r2id_film.onnx").read_bytes())
    with pytest.raises(ArtefactError, match="of another bundle"):
        open_bundle(own_bundle).engines.open("r2id")
    graph.unlink()
    with pytest.raises(ArtefactError, match=r"no such file.*python -m export"):
        open_bundle(own_bundle).engines.open("r2id")


def test_bytes_that_match_but_are_no_graph_are_refused(own_bundle: Path) -> None:
    (own_bundle / "r2id.cpu.onnx").write_bytes(b"not a graph")
    graphs = json.loads((own_bundle / "manifest.json").read_text())["for_cpu"]
    graphs["r2id"]["sha256"] = sha256(b"not a graph")
    rewrite(own_bundle, {"for_cpu": graphs})
    with pytest.raises(ArtefactError, match="is no ONNX graph"):
        open_bundle(own_bundle).engines.open("r2id")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2; this version reads 3. Make .* python -m export --checkpoint"),
        ({"graphs": {}}, "no graph of the resampler has the lifetime and tensors of read_image"),
        ({"graphs": {"r2id": {}}}, r"missing required field `file` - at `\$.graphs\[...\]`"),
        ({"interface": {"name": "a\nb"}}, r"matching regex .* at `\$.interface.name`"),
        ({"versions": {"torch": 2}}, r"Expected `str`, got `int` - at `\$.versions\[...\]`"),
        ({"model": {"name": "x"}}, "unknown field `model`"),
        ({"schedule": {"name": "linear"}}, "Invalid value 'linear' - at `\\$.schedule.name`"),
    ],
)
def test_edited_manifests_are_refused(
    own_bundle: Path, change: dict[str, object], words: str
) -> None:
    rewrite(own_bundle, change)
    with pytest.raises(ArtefactError, match=words):
        open_bundle(own_bundle).generate([1])


def test_a_manifest_cannot_point_outside_its_folder(own_bundle: Path) -> None:
    graphs = json.loads((own_bundle / "manifest.json").read_text())["graphs"]
    graphs["r2id"]["file"] = "../r2id.onnx"
    rewrite(own_bundle, {"graphs": graphs})
    with pytest.raises(ArtefactError, match="outside the bundle"):
        open_bundle(own_bundle)


def test_a_manifest_can_be_pinned(tiny_bundle: Path) -> None:
    found = read_manifest(tiny_bundle).sha256
    assert open_bundle(tiny_bundle, expect_sha256=found).manifest.sha256 == found
    with pytest.raises(ArtefactError, match="Do not use it"):
        open_bundle(tiny_bundle, expect_sha256="0" * 64)


def test_a_manifest_reads_back_as_written(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest: Manifest = read_manifest(tiny_bundle)
    manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (tiny_bundle / "manifest.json").read_bytes()


def test_a_plan_without_tensorrt_offers_the_onnx_graph(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engines.tensorrt.installed", list)
    with pytest.raises(IncompatibleError, match=r"TensorRT.*r2id\.onnx"):
        open_bundle(tiny_bundle / "r2id.plan")
