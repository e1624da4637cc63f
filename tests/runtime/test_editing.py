"""Edits: what a run begins with, what a mask keeps, in latents at every step and bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from runtime import Bundle, open_bundle
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.images.pixels import read_metadata, to_uint8
from runtime.pipeline.diffuser import Progress
from runtime.pipeline.editing import softened
from runtime.sampling import solvers
from runtime.sampling.choices import SOLVERS
from runtime.sampling.guidance import guided
from runtime.sampling.loop import sample
from runtime.sampling.noise import NoiseStreams
from runtime.sampling.schedule import COSINE
from tests.conftest import Command
from tests.runtime.invented import closed_form, write_bundle

RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (30, 21, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("invented"))


@pytest.fixture(scope="module", params=["resampled", "pixels"])
def bundle(request: pytest.FixtureRequest, invented: Path) -> Bundle:
    """A bundle with a resampler, and one that diffuses pixels."""
    decoupled = request.param == "resampled"
    folder = request.getfixturevalue("tiny_bundle") if decoupled else invented
    return open_bundle(folder, EngineOptions(threads=1))


def picture(bundle: Bundle, height: int, width: int, count: int = 1) -> np.ndarray:
    shape = (count, bundle.interface.color_channels, height, width)
    return np.random.default_rng(height).uniform(-1, 1, shape).astype(np.float32)


def left_half(height: int, width: int) -> np.ndarray:
    mask = np.zeros((1, 1, height, width), np.float32)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("solver", [*SOLVERS])
def test_the_ends_of_strength(bundle: Bundle, solver: str) -> None:
    """0 is the reconstruction, 1 what there is without a picture."""
    size = (12, 9)
    image = bundle.interface.image_size(size)
    init = picture(bundle, *image)
    options: dict[str, Any] = {"solver": solver, "image": image, "latent": size, "steps": 5}
    options |= {"labels": [1, None], "seed": 8}
    whole = bundle.generate(**options)
    same = bundle.generate(**options, init=init, strength=1)
    np.testing.assert_array_equal(same.images, whole.images)
    again = bundle.generate(**options, init=init, strength=0.0)
    latent = bundle.encode(init, size)
    np.testing.assert_array_equal(again.latents, latent.repeat(2, 0))
    np.testing.assert_array_equal(again.images[:1], bundle.decode(latent, image))
    between = bundle.generate(**options, init=init, strength=0.4)
    far, near = (np.square(between.latents - other.latents).mean() for other in (whole, again))
    assert 0 < near < far


def test_sizes_follow_the_picture(bundle: Bundle) -> None:
    made = bundle.generate([0], init=picture(bundle, 24, 12), steps=2)
    assert made.images.shape[2:] == (24, 12)
    if bundle.interface.decoupled:
        default = np.prod(bundle.interface.default_latent)
        height, width = made.latents.shape[2:]
        assert height == 2 * width and abs(height * width / default - 1) < 0.3
        assert bundle.generate([0], init=picture(bundle, 31, 7), steps=1).images.shape[3] == 7
    else:
        assert made.latents.shape[2:] == (24, 12)
        large = bundle.generate([0], init=picture(bundle, 200, 100), steps=1)
        assert large.images.shape[2:] == (48, 24)


def test_each_image_may_have_a_picture_of_its_own(bundle: Bundle) -> None:
    init, mask = picture(bundle, 12, 9, 2), np.concatenate([left_half(12, 9), 1 - left_half(12, 9)])
    options: dict[str, Any] = {"latent": (6, 9), "image": None, "steps": 3, "strength": 0.7}
    options["image"] = bundle.interface.image_size((6, 9))
    both = bundle.generate([0, 1], init=init, mask=mask, **options)
    for index in range(2):
        own = {"init": init[[index]], "mask": mask[[index]], "first_index": index, **options}
        alone = bundle.generate([index], **own)
        np.testing.assert_allclose(alone.images[0], both.images[index], atol=2e-5)


def test_what_a_mask_keeps(bundle: Bundle) -> None:
    """Latents at every step, pixels in the end and in every preview; the rest is drawn anew."""
    size = (12, 12)
    height, width = bundle.interface.image_size(size)
    init, mask = picture(bundle, height, width), left_half(40, 30)
    seen: list[np.ndarray] = []
    options: dict[str, Any] = {"latent": size, "steps": 6, "seed": 2, "init": init, "seam": 2}

    def on_step(progress: Progress) -> None:
        assert progress.steps == 6
        seen.append(progress.decode())

    made = bundle.generate([1], mask=mask, on_step=on_step, **options)
    whole = bundle.generate([1], mask=np.ones_like(mask), **options)
    half = width // 2
    assert len(seen) == 6
    for images in (made.images, *seen):
        assert (images[..., half:] == init[..., half:]).all()
    assert (np.abs(made.images - init)[..., : half - 2] > 1e-4).mean() > 0.95
    kept = bundle.encode(init, size)[..., 6:]
    np.testing.assert_array_equal(made.latents[..., 6:], kept)
    drawn = bundle.decode(made.latents, (height, width))
    np.testing.assert_array_equal(made.images[..., : half - 2], drawn[..., : half - 2])
    part = (made.images - init)[..., half - 2 : half] / (drawn - init)[..., half - 2 : half]
    np.testing.assert_allclose(part.mean((0, 1, 2)), [2 / 3, 1 / 3], atol=1e-3)
    assert np.abs(whole.latents - made.latents)[..., 6:].mean() > 0.01


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.7), ("dpm++3m", 0.0)])
def test_a_masked_run_is_that_of_the_closed_form(
    invented: Path, solver: str, eta: float, strength: float
) -> None:
    """Held to the noised picture after every step, with one noise for all of them."""
    size, steps = (6, 9), 9
    bundle = open_bundle(invented)
    options: dict[str, Any] = {"solver": solver, "eta": eta, "guidance_scale": 3.0, "seed": 4}
    init = picture(bundle, *size)
    drawn = left_half(*size) > 0
    made = bundle.generate(
        [2], init=init, mask=left_half(*size), strength=strength, steps=steps, **options
    )
    table = solvers.table(solver, COSINE, steps, eta=eta, strength=strength)
    streams = NoiseStreams(4, range(1), (3, *size), "coherent")
    noise, conditions = streams.draw(), np.zeros((2, 1, 3), np.float32)
    conditions[1, 0, 2] = 1
    nodes = [*table.alpha_bar[:-1], 1.0]

    def noised(node: int) -> np.ndarray:
        return np.sqrt(nodes[node]) * init + np.sqrt(1 - nodes[node]) * noise

    def hold(x: np.ndarray, node: int) -> np.ndarray:
        return np.where(drawn, x, noised(node))

    begin = noised(0) if strength < 1 else hold(noise, 0)
    predict = guided(lambda x, step: closed_form(x, table.alpha_bar[step], conditions), [-2.0, 3.0])
    wanted = sample(predict, begin, table, lambda step: streams.draw(step + 1), hold=hold)
    np.testing.assert_allclose(made.latents, wanted, rtol=1e-4, atol=1e-4)


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 1000), st.booleans()
)
def test_a_seam_lies_within_the_mask(
    height: int, width: int, radius: int, seed: int, grey: bool
) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((1, 1, height, width)) * 1.5).clip(0, 1).astype(np.float32)
    mask = mask if grey else np.round(mask)
    found = softened(mask, radius)
    assert found.dtype == np.float32 and (found <= mask).all() and (found >= 0).all()
    assert (softened(np.ones_like(mask), radius) == 1).all()
    assert not softened(np.zeros_like(mask), radius).any()


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_a_seam_has_its_width_at_every_edge(radius: int) -> None:
    mask = np.zeros((1, 1, 60, 50), np.float32)
    mask[..., 10:45, :20] = 1  # which meets the border on the left
    found = softened(mask, radius)[0, 0]
    ramp = np.arange(1, 2 * radius + 1) / (2 * radius + 1)
    np.testing.assert_allclose(found[10 : 10 + 2 * radius, 0], ramp, atol=1e-6)
    np.testing.assert_allclose(found[45 - 2 * radius : 45, 0], ramp[::-1], atol=1e-6)
    np.testing.assert_allclose(found[27, 20 - 2 * radius : 20], ramp[::-1], atol=1e-6)
    assert (found[27, : 20 - 2 * radius] == 1).all()


INIT = np.zeros((1, 3, 12, 9), np.float32)
MASK = np.ones((1, 1, 12, 9), np.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "photo.png"}, "init is a str; expected float32"),
        ({"init": INIT[:, :1]}, r"init is float32 \(1, 1, 12, 9\); expected float32 \[batch, 3,"),
        ({"init": INIT.astype(np.uint8)}, "init is uint8"),
        ({"init": INIT + 255}, "init reach 255; expected values in"),
        ({"init": INIT.repeat(3, 0)}, "init holds 3 pictures for 2 images"),
        ({"init": INIT, "strength": "0.6"}, "strength is '0.6'; expected a number"),
        ({"init": INIT, "strength": 1.2}, "strength is 1.2; expected 0 to 1"),
        ({"init": INIT, "strength": float("nan")}, "strength is nan; expected 0 to 1"),
        ({"strength": 0.5}, "strength is given alone; expected init with it"),
        ({"mask": MASK}, "mask is given alone; expected init with it"),
        ({"init": INIT, "seam": 2}, "seam is given alone; expected mask with it"),
        ({"init": INIT, "mask": MASK, "seam": 1.5}, "seam is 1.5; expected a whole number"),
        ({"init": INIT, "mask": MASK, "seam": 10}, "seam is 10; expected 0 to 9"),
        ({"init": INIT, "mask": MASK[0]}, r"mask is float32 .*\[batch, 1, .* in \[0, 1\]"),
        ({"init": INIT, "mask": MASK > 0}, "mask is bool"),
        ({"init": INIT, "mask": MASK * 2}, "mask has values from 2 to 2; expected some in"),
        ({"init": INIT, "mask": MASK * np.nan}, "mask has values from nan"),
        ({"init": INIT, "mask": MASK * 0}, "mask has values from 0 to 0"),
        ({"init": INIT, "continue_at": (24, 18)}, "continue_at is given with init"),
        ({"init": INIT, "latent": (300, 3)}, "nearest legal size is 48x3"),
    ],
)
def test_edits_that_cannot_be_are_refused(
    invented: Path, options: dict[str, Any], words: str
) -> None:
    fresh = open_bundle(invented)
    with pytest.raises(UsageError, match=words):
        fresh.generate([0, 1], **options)
    assert not fresh.engines.opened


def test_a_picture_is_encoded_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny_bundle)
    runs: list[int] = []
    encode = bundle.resampler.encode

    def counting(*given: Any) -> Any:
        runs.append(1)
        return encode(*given)

    monkeypatch.setattr(bundle.resampler, "encode", counting)
    init = picture(bundle, 16, 24)
    for seed in range(3):
        bundle.generate([0], init=init, steps=2, strength=0.5, seed=seed)
    assert len(runs) == 1
    lying = init.reshape(1, 1, 24, 16)  # the same bytes
    bundle.generate([0], init=lying, latent=(8, 8), steps=2, strength=0.5)
    init[0, 0, 0, 0] += 0.1
    bundle.generate([0], init=init, latent=(8, 8), steps=2, strength=0.5)
    assert len(runs) == 3


# On the command line.


def files(folder: Path) -> None:
    """A photograph in several forms, and a mask of another size: the right half is white."""
    Image.fromarray(PHOTO).save(folder / "photo.png")
    Image.fromarray(PHOTO).convert("L").save(folder / "grey.png")
    turned = Image.fromarray(np.rot90(PHOTO))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.png", exif=exif)
    alpha = np.full((30, 21, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([PHOTO, alpha], 2), "RGBA").save(folder / "clear.png")
    mask = Image.new("L", (42, 60))
    ImageDraw.Draw(mask).rectangle((21, 0, 42, 60), fill=255)
    mask.save(folder / "mask.png")


@pytest.mark.parametrize("name", ["photo", "grey", "turned", "clear"])
def test_pixels_outside_of_the_mask_are_the_files(
    name: str, invented: Path, command: Command, tmp_path: Path
) -> None:
    files(tmp_path)
    args = ("--init", f"{name}.png", "--mask", "mask.png", "--label", "noon", "--steps", 4)
    done = command("runtime.generate", "--engine", invented, *args, "--ground", "#102030")
    assert done.returncode == 0, done.stderr
    found = np.asarray(Image.open(tmp_path / "out.png"))
    own = {"grey": np.asarray(Image.open(tmp_path / "grey.png"))[..., None].repeat(3, 2)}
    own["clear"] = PHOTO.copy()
    own["clear"][:10] = (0x10, 0x20, 0x30)
    own["turned"] = np.rot90(np.rot90(PHOTO), -1)
    expected = own.get(name, PHOTO)
    assert found.shape == (30, 21, 3)
    np.testing.assert_array_equal(found[:, :10], expected[:, :10])
    assert (found[:, 12:] != expected[:, 12:]).mean() > 0.9
    assert ("transparency laid on #102030" in done.stderr) is (name == "clear")


def test_an_edit_is_repeated_with_its_files_alone(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    files(tmp_path)
    engine = ("--engine", tiny_bundle, "--steps", 3)
    args = ("--init", "photo.png", "--mask", "mask.png", "--strength", 0.7, "--vary", 3)
    done = command("runtime.generate", *engine, *args, "--preview")
    assert done.returncode == 0 and "colour dropped" in done.stderr, done.stderr
    assert Image.open(tmp_path / "out.png").size == (3 * 21 + 4, 30)
    made = read_metadata(tmp_path / "out.png")["request"]
    assert (made["label"], made["count"], made["strength"], made["seam"]) == ([None], 3, 0.7, 1)
    assert len(made["init"]) == len(made["mask"]) == 64 and made["init"] != made["mask"]
    assert "photo" not in str(made)
    whole = Image.open(tmp_path / "out.png")
    grey = np.asarray(Image.open(tmp_path / "grey.png"))
    for left in (0, 23, 46):
        np.testing.assert_array_equal(np.asarray(whole)[:, left : left + 10], grey[:, :10])
    repeat = (
        "runtime.generate",
        "--engine",
        tiny_bundle,
        "--from-png",
        "out.png",
        "--out",
        "b.png",
    )
    asked = command(*repeat)
    assert asked.returncode == 2 and f"--init, a file of SHA-256 {made['init']}" in asked.stderr
    asked = command(*repeat, "--init", "photo.png")
    assert asked.returncode == 2 and f"--mask, a file of SHA-256 {made['mask']}" in asked.stderr
    wrong = command(*repeat, "--init", "grey.png", "--mask", "mask.png")
    assert wrong.returncode == 3 and "Pass that one" in wrong.stderr
    assert not (tmp_path / "b.png").exists()
    assert command(*repeat, "--init", "photo.png", "--mask", "mask.png").returncode == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_a_crop_and_another_size_of_an_edit(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    """The window of what would be the whole; what is kept is the picture at the image's size."""
    files(tmp_path)
    edit = ("--init", "grey.png", "--mask", "mask.png", "--image", "61x47", "--label", "3")
    line = ("runtime.generate", "--engine", tiny_bundle, "--steps", 2, *edit)
    done = command(*line, "--out", "whole.png")
    assert done.returncode == 0 and "picture of 30x21 is taken at 61x47" in done.stderr
    assert command(*line, "--crop", "5,9,20,30", "--out", "crop.png").returncode == 0
    whole = np.asarray(Image.open(tmp_path / "whole.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "crop.png")), whole[5:25, 9:39])
    grey = np.asarray(Image.open(tmp_path / "grey.png")).astype(np.float32) / 127.5 - 1
    large = np.asarray(Image.fromarray(grey).resize((47, 61), Image.Resampling.BICUBIC))
    expected = to_uint8(large.clip(-1, 1)[None])[..., 0]
    np.testing.assert_array_equal(whole[:, :23], expected[:, :23])


def test_what_a_mask_loses_is_said(tiny_bundle: Path, command: Command, tmp_path: Path) -> None:
    files(tmp_path)
    red = np.zeros((30, 21, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(np.full((30, 21, 3), 255, np.uint8)).save(tmp_path / "white.png")
    Image.fromarray(np.full((30, 21), 65535, np.uint16)).save(tmp_path / "deep.png")
    line = ("runtime.generate", "--engine", tiny_bundle, "--steps", 1, "--init", "grey.png")
    for name, said in {
        "red.png": ["note: red.png: a mask is grey: colour dropped"],
        "white.png": [],
        "deep.png": ["note: deep.png: 16 bits rounded to 8"],
    }.items():
        done = command(*line, "--mask", name)
        notes = [line for line in done.stderr.splitlines() if line.startswith("note")]
        assert done.returncode == 0 and notes == said


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--vary", "3"), 2, "--vary counts variants of a picture"),
        (("--vary", "3", "--init", "photo.png", "--count", "2"), 2, "and no --count"),
        (("--mask", "mask.png"), 2, "mask is given alone"),
        (("--strength", "0.5"), 2, "strength is given alone"),
        (("--init", "photo.png", "--strength", "1.5"), 2, "expected a number from 0 to 1"),
        (("--init", "none.png"), 3, "none.png: no such file"),
        (("--init", "text.png"), 3, "cannot be read as an image"),
        (("--from-png", "text.png"), 3, "(of no known kind); expected a whole picture"),
        (("--init", "photo.png", "--mask", "photo.npy"), 3, "photo.npy: no such file"),
        (("--init", "photo.png", "--mask", "mask.png", "--state", "a.npz"), 2, "one of them"),
        (("--init", "photo.png", "--continue-at", "24x18"), 2, "continue_at is given with init"),
    ],
)
def test_what_cannot_be_edited_is_one_line(
    invented: Path, command: Command, tmp_path: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    files(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    done = command("runtime.generate", "--engine", invented, *args)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.png").exists()
