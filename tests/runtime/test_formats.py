"""JPEG and WebP beside PNG: by the name's end, with the metadata that they can hold."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import ArtefactError, UsageError
from runtime.images.formats import check_size
from runtime.images.pixels import read_metadata, save_png, save_rows
from tests.conftest import Command

SMOOTH = (np.add.outer(np.arange(40), 2 * np.arange(30)) + 50).astype(np.uint8)[..., None]
RGB = np.concatenate([SMOOTH, SMOOTH[::-1], SMOOTH[:, ::-1]], 2)
KINDS = {"a.png": "PNG", "a.jpg": "JPEG", "a.JPEG": "JPEG", "a.webp": "WEBP"}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("image", [SMOOTH, RGB], ids=["grey", "rgb"])
def test_a_name_says_what_is_written(name: str, image: np.ndarray, tmp_path: Path) -> None:
    path, metadata = tmp_path / name, {"request": {"seed": 3}, "é": [1, None]}
    assert save_rows(path, [image[:7], image[7:]], image.shape, metadata)
    with Image.open(path) as found:
        assert found.format == KINDS[name] and found.size == (30, 40)
        pixels = np.asarray(found.convert("RGB")).astype(int)
    assert np.abs(pixels - image).max() <= (0 if name == "a.png" else 12)
    assert read_metadata(path) == metadata


def test_quality_is_size_and_webp_can_lose_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for end in ("jpg", "webp"):
        sizes = []
        for quality in (20, None, 100):
            path = tmp_path / f"{quality}.{end}"
            save_rows(path, [noise], noise.shape, {}, quality)
            sizes.append(path.stat().st_size)
        assert sizes[0] < sizes[1] < sizes[2]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "100.webp")), noise)


def test_what_a_jpeg_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    long = {"request": "x" * 70_000}
    assert not save_rows(tmp_path / "a.jpg", [RGB], RGB.shape, long)
    with pytest.raises(ArtefactError, match=r"a\.jpg: holds no 'r2' metadata"):
        read_metadata(tmp_path / "a.jpg")
    assert save_rows(tmp_path / "a.webp", [RGB], RGB.shape, long)
    assert read_metadata(tmp_path / "a.webp") == long


def test_pictures_of_others_hold_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0{}"
    Image.fromarray(RGB).save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(RGB).save(tmp_path / "plain.webp")
    for name in ("phone.jpg", "plain.webp"):
        with pytest.raises(ArtefactError, match="holds no 'r2' metadata"):
            read_metadata(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ArtefactError, match=r"text\.jpg: cannot be .*\(of no known kind"):
        read_metadata(tmp_path / "text.jpg")


def test_sizes_that_a_file_cannot_hold_are_refused() -> None:
    for name, size in (("a.png", (1 << 20, 1 << 20)), ("a.jpg", (65500, 100)), ("a.webp", (9, 9))):
        check_size(Path(name), size)
    for name, size in (("a.jpg", (65501, 1)), ("a.webp", (1, 16384)), ("a.jpg", (20000, 20000))):
        with pytest.raises(UsageError, match="expected sides of at most"):
            check_size(Path(name), size)


def test_every_command_writes_them(tiny_bundle: Path, command: Command, tmp_path: Path) -> None:
    engine = ("--engine", tiny_bundle)
    args = ("--steps", 2, "--label", "1,2", "--out", "a-{index}.jpg", "--preview")
    done = command("runtime.generate", *engine, *args, "--quality", 70)
    assert done.returncode == 0, done.stderr
    names = ["a-0-preview.jpg", "a-0.jpg", "a-1-preview.jpg", "a-1.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    repeat = ("--from-png", "a-1.jpg", "--state", "a.npz")
    assert command("runtime.generate", *engine, *repeat, "--out", "b.jpg").returncode == 0
    assert (tmp_path / "b.jpg").read_bytes() == (tmp_path / "a-1.jpg").read_bytes()
    large = ("a.npz", "--image", "50x40", "--out", "large.webp", "--quality", 100)
    assert command("runtime.render", *large, *engine).returncode == 0
    assert read_metadata(tmp_path / "large.webp")["request"]["image"] == [50, 40]
    assert command("runtime.render", *large[:3], "--out", "large.png", *engine).returncode == 0
    exact, kept = (Image.open(tmp_path / f"large.{end}").convert("L") for end in ("png", "webp"))
    np.testing.assert_array_equal(np.asarray(exact), np.asarray(kept))
    resampled = ("large.webp", "--image", "8x9", "--out", "small.webp")
    assert command("runtime.resample", *resampled, *engine).returncode == 0
    assert Image.open(tmp_path / "small.webp").size == (9, 8)


def test_a_sheet_that_a_file_cannot_hold_is_refused_before_any_work(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    args = ("--label", "0-9", "--image", "8x2000", "--out", "a.webp")
    done = command("runtime.generate", "--engine", tiny_bundle, *args)
    assert done.returncode == 2 and "8x20018 pixels; expected sides of at most 16383" in done.stderr
    assert not list(tmp_path.iterdir())
    save_png(tmp_path / "a.png", SMOOTH, {})
    wrong = command("runtime.resample", "a.png", "--image", "8x8", "--out", "a.gif")
    assert wrong.returncode == 2 and "ends in one of .png .jpg .jpeg .webp" in wrong.stderr
