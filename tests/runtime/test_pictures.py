"""Pictures that are read: every mode with a right reading, what it loses said, others refused."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.errors import ArtefactError
from runtime.images.picture import ImageFile
from runtime.images.png import SIGNATURE
from runtime.memory import peak_resident
from tests.conftest import Command

GREY = (np.arange(12 * 20).reshape(12, 20) * 273).astype(np.uint16)  # all of 0 to 65535
RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def read(path: Path, channels: int = 3, **options: Any) -> tuple[np.ndarray, list[str]]:
    """Pixels `[h, w, c]` as uint8, and what was said of them."""
    with ImageFile(path, channels, **options) as image:
        pixels = image(0, 0, *image.size)[0]
        return np.rint((np.moveaxis(pixels, 0, -1) + 1) * 127.5).astype(np.uint8), image.notes


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, colour: int, key: bytes = b"", bits: int = 16) -> bytes:
    """A PNG of values `[h, w]` or `[h, w, c]`, packed where they have less than 8 bits."""
    wide = values.reshape(len(values), -1)
    rows = wide.astype(">u2").view(np.uint8) if bits == 16 else wide.astype(np.uint8)
    if bits < 8:
        shifts = np.arange(8 - bits, -1, -bits)
        rows = (rows.reshape(len(rows), -1, 8 // bits) << shifts).sum(2).astype(np.uint8)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    parts = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    parts[1:1] = [(b"tRNS", key)] if key else []
    return SIGNATURE + b"".join(chunk(*part) for part in parts)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(GREY).save(tmp_path / name)
        found, notes = read(tmp_path / name, 1)
        np.testing.assert_array_equal(found[..., 0], np.rint(GREY / 257))
        assert notes == ["16 bits rounded to 8"]


def test_transparency_is_laid_on_a_ground(tmp_path: Path) -> None:
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[:6], alpha[6:9] = 0, 51
    Image.fromarray(np.concatenate([RGB, alpha], 2), "RGBA").save(tmp_path / "a.png")
    for ground in ((255, 255, 255), (0, 80, 0)):
        found, notes = read(tmp_path / "a.png", ground=ground)
        assert (found[:6] == ground).all() and (found[9:] == RGB[9:]).all()
        mixed = RGB[6:9] * 0.2 + np.array(ground) * 0.8
        assert np.abs(found[6:9] - mixed).max() <= 1
        assert notes == ["transparency laid on #{:02x}{:02x}{:02x}".format(*ground)]
    grey = Image.fromarray(np.concatenate([RGB[..., :1], alpha], 2), "LA")
    grey.save(tmp_path / "la.png")
    found, notes = read(tmp_path / "la.png", 1)
    assert (found[:6] == 255).all() and (found[9:] == RGB[9:, :, :1]).all()
    keyed = Image.fromarray(np.zeros((4, 4), np.uint8))  # one value of grey is transparent
    keyed.save(tmp_path / "key.png", transparency=0)
    assert (read(tmp_path / "key.png", 1)[0] == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_of_a_png_is_transparent_at_every_depth(tmp_path: Path, bits: int) -> None:
    largest = (1 << bits) - 1
    values = (np.arange(8 * 16) * 257).reshape(8, 16) & largest
    key = int(values[0, 1])  # 257 at 16 bits, which neighbours would share at 8
    values[1, 2:4] = min(key + 1, largest), max(key - 1, 0)
    (tmp_path / "a.png").write_bytes(png(values, 0, struct.pack(">H", key), bits))
    opaque = np.rint(values / largest * 255)
    for channels in (1, 3):
        found, notes = read(tmp_path / "a.png", channels, ground=(9, 9, 9))
        expected = np.where(values == key, 9, opaque)[..., None].repeat(channels, 2)
        np.testing.assert_array_equal(found, expected)
        said = ["16 bits rounded to 8"] * (bits == 16)
        assert notes == [*said, "transparency laid on #090909"]


def test_what_is_said_of_depth_and_colour_is_true(tmp_path: Path) -> None:
    alike = np.stack([GREY] * 3, -1)
    alpha = np.full_like(GREY, 65535)
    cut, laid, dropped = (
        "16 bits cut to 8",
        "transparency laid on #ffffff",
        "the model is grey: colour dropped",
    )
    files = {
        "rgb.png": (png(np.stack([GREY, GREY[::-1], GREY], -1), 2), [cut, dropped]),
        "alike.png": (png(alike, 2), [cut]),
        "la.png": (png(np.stack([GREY, alpha], -1), 4), [cut, laid]),
        "rows.png": (png(alike >> 8, 2, bits=8), []),
        "coloured-rows.png": (png(RGB, 2, bits=8), [dropped]),
    }
    for name, (data, expected) in files.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name, 1)[1] == expected, name
    palette = Image.fromarray((GREY >> 8).astype(np.uint8)).convert("P")
    palette.save(tmp_path / "grey.gif")
    palette.convert("RGB").save(tmp_path / "grey.jpg")
    assert Image.open(tmp_path / "grey.gif").mode == "P"
    assert Image.open(tmp_path / "grey.jpg").mode == "RGB"
    for name in ("grey.gif", "grey.jpg"):
        assert read(tmp_path / name, 1)[1] == []
    late = np.stack([GREY >> 8] * 3, -1).astype(np.uint8).repeat(40, 0)
    late[-1, -1] = 255, 0, 0
    Image.fromarray(late).save(tmp_path / "late.bmp")
    assert read(tmp_path / "late.bmp", 1)[1] == [dropped]


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "1", "L"])
def test_other_modes_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RGB).convert(mode)
    path = tmp_path / ("a.png" if mode in ("P", "1", "L") else "a.tif")
    picture.save(path)
    found, notes = read(path)
    np.testing.assert_array_equal(found, np.asarray(Image.open(path).convert("RGB")))
    assert notes == []
    expected = [] if mode in ("1", "L") else ["the model is grey: colour dropped"]
    assert read(path, 1)[1] == expected


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_picture_stands_as_its_exif_says(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = {1: RGB, 3: RGB[::-1, ::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}[turn]
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0], upright)
    large = np.kron(RGB, np.ones((40, 40, 1), np.uint8))
    Image.fromarray(large).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with ImageFile(tmp_path / "a.jpg", 3) as image:
        assert image.size == (upright.shape[0] * 40, upright.shape[1] * 40)
        image.shrink((upright.shape[0] * 10, upright.shape[1] * 10))
        assert image.size == (upright.shape[0] * 10, upright.shape[1] * 10)
        assert image.notes == ["read at 1/4 of its size"]
        pixels = (image(0, 0, *image.size)[0] + 1) * 127.5
    blocks = pixels.reshape(3, upright.shape[0], 10, upright.shape[1], 10)
    middle = blocks[:, :, 4:6, :, 4:6].mean((2, 4))
    assert np.abs(np.moveaxis(middle, 0, -1) - upright).mean() < 25  # chroma is halved


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("float.tif", "pixels of mode F, whose range"),
        ("deep.tif", "pixels of mode I, whose range"),
        ("moving.gif", "holds 2 pictures; expected one"),
        ("moving.png", "holds 2 pictures; expected one"),
        (
            "bomb.png",
            "more than 100000000 pixels; expected at most 100000000 of a file that is not",
        ),
        ("large.png", "12000x10000 pixels; expected at most"),
        ("wide.png", "expected sides of at most"),
        ("cut.jpg", r"cannot be read as an image \(image .* expected a whole picture.* Make or"),
        ("empty.png", "empty.png: is empty; expected a whole picture, such as a PNG or JPEG. Make"),
        ("text.png", r"cannot be read as an image \(of no known kind\); expected a whole picture"),
        ("keyed.png", "one colour of 16 bits is transparent, .* Save it so"),
    ],
)
def test_what_has_no_right_reading_is_refused(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / name
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    sides = {"bomb.png": (60000, 60000), "wide.png": (1 << 30, 1), "large.png": (10000, 12000)}
    if name.startswith("moving"):
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif name in ("float.tif", "deep.tif"):
        Image.fromarray(GREY.astype("f4" if name == "float.tif" else "i4")).save(path)
    elif name == "cut.jpg":
        frames[0].save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif name in ("empty.png", "text.png"):
        path.write_text("" if name == "empty.png" else "text")
    elif name == "keyed.png":
        path.write_bytes(png(np.stack([GREY] * 3, -1), 2, bytes(6)))
    else:  # two bits a pixel, so that it is not read by rows
        head = struct.pack(">IIBBBBB", *sides[name], 2, 0, 0, 0, 0)
        packed = zlib.compress(bytes(1 << 20))
        parts = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
        path.write_bytes(SIGNATURE + b"".join(chunk(*part) for part in parts))
    before = peak_resident()
    with pytest.raises(ArtefactError, match=words):
        read(path)
    assert peak_resident() < before + 50_000_000


def test_what_was_reduced_is_said_in_one_line(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    Image.fromarray(RGB).convert("RGBA").save(tmp_path / "photo.png")
    args = ("photo.png", "--image", "31x17", "--engine", tiny_bundle)
    done = command("runtime.resample", *args, "--ground", "black")
    assert done.returncode == 0
    note = "photo.png: transparency laid on #000000; the model is grey: colour dropped"
    assert done.stderr.splitlines() == [f"note: {note}"] and "\r" not in done.stderr
    quiet = command("runtime.resample", *args, "--quiet")
    assert quiet.returncode == 0 and not quiet.stderr
    wrong = command("runtime.resample", *args, "--ground", "blakc")
    assert wrong.returncode == 2 and "'blakc' is no colour" in wrong.stderr


def test_a_photograph_is_resampled_in_bounded_memory(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    small.resize((2400, 1800)).save(tmp_path / "photo.jpg")
    args = ("photo.jpg", "--image", "64x64", "--engine", tiny_bundle)
    done = command("runtime.resample", *args)
    assert done.returncode == 0 and "read at 1/8 of its size" in done.stderr
