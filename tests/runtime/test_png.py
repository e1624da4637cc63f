"""PNG row by row: Pillow reads what is written, and what Pillow writes is read."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import ArtefactError
from runtime.images.picture import ImageFile
from runtime.images.pixels import psnr, save_rows
from runtime.images.png import (
    BANDS_AHEAD,
    PngWriter,
    filtered,
    open_rows,
    read_text,
    unfilter,
    write_beside,
)

NAME = Path("name.png")


def picture(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Smooth where `seed` is even, noise else."""
    if seed % 2:
        return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    y, x, c = np.indices((height, width, channels))
    return (y * 3 + x * 2 + c * 50 + seed).astype(np.uint8)


def written(image: np.ndarray, band: int, **text: str) -> bytes:
    file = io.BytesIO()
    height, width, channels = image.shape
    png = PngWriter(file, height, width, channels, text)
    for top in range(0, len(image), band):
        png.write(image[top : top + band])
    png.close()
    return file.getvalue()


SHAPES = st.tuples(
    st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 3]), st.integers(0, 9)
)


@given(SHAPES, st.integers(1, 30))
def test_pillow_reads_what_is_written(shape: tuple[int, int, int, int], band: int) -> None:
    image = picture(*shape)
    data = written(image, band, r2="{}")
    found = Image.open(io.BytesIO(data))
    assert found.info["r2"] == "{}"
    np.testing.assert_array_equal(np.asarray(found).reshape(image.shape), image)
    assert data == written(image, 1, r2="{}")  # bands leave no mark in the file


@given(SHAPES, st.integers(1, 30))
def test_what_pillow_writes_is_read(shape: tuple[int, int, int, int], band: int) -> None:
    image = picture(*shape)
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if shape[2] == 1 else image).save(file, "PNG")
    file.seek(0)
    rows = open_rows(NAME, file)
    assert rows is not None and rows.size == image.shape[:2] and rows.channels == shape[2]
    counts = [min(band, len(image) - top) for top in range(0, len(image), band)]
    np.testing.assert_array_equal(np.concatenate([rows.read(n) for n in counts]), image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", range(5))
def test_every_filter_is_undone(kind: int, channels: int) -> None:
    """Against the definition in the PNG specification, section 9.2, byte by byte."""
    above, row = np.random.default_rng(kind).integers(0, 256, (2, 12 * channels), np.uint8)

    def guess(i: int) -> int:
        a = int(row[i - channels]) if i >= channels else 0
        c = int(above[i - channels]) if i >= channels else 0
        b = int(above[i])
        paeth = min((abs(a + b - c - x), order, x) for order, x in enumerate((a, b, c)))[2]
        return (0, a, b, (a + b) // 2, paeth)[kind]

    coded = np.array([(int(value) - guess(i)) % 256 for i, value in enumerate(row)], np.uint8)
    unfilter(kind, coded, above, channels)
    np.testing.assert_array_equal(coded, row)


def test_smooth_rows_are_filtered() -> None:
    image = picture(64, 64, 1, 0)[..., 0]
    kinds = {filtered(image[i : i + 1], image[i - 1], 1)[0] for i in range(1, 64)}
    assert kinds <= {1, 2}
    assert len(written(image[..., None], 7)) < image.size / 4


def test_rows_must_fit_the_image() -> None:
    png = PngWriter(io.BytesIO(), 2, 3, 1, {})
    with pytest.raises(ValueError, match="expected at most 2"):
        png.write(np.zeros((3, 3, 1), np.uint8))
    with pytest.raises(ValueError, match="2 rows are missing"):
        png.close()


def test_bands_are_written_in_order_while_others_are_made() -> None:
    image, file, made = picture(40, 9, 3, 1), io.BytesIO(), 0
    png = PngWriter(file, 40, 9, 3, {})
    slow, write, writers = threading.Event(), png.write, set()

    def write_slowly(rows: np.ndarray) -> None:
        slow.wait(60)
        writers.add(threading.current_thread())
        write(rows)

    def bands() -> Iterator[np.ndarray]:
        nonlocal made
        for top in range(40):
            made += 1
            if made == BANDS_AHEAD + 2:  # those that wait, the one that is written, this one
                slow.set()
            assert slow.is_set() or made <= BANDS_AHEAD + 2
            yield image[top : top + 1]

    png.write = write_slowly  # type: ignore[method-assign]
    write_beside(png, bands())
    assert file.getvalue() == written(image, 7)
    assert len(writers) == 1 and threading.current_thread() not in writers


@pytest.mark.parametrize("side", ["made", "written", "interrupted"])
def test_what_goes_wrong_beside_leaves_the_old_file(side: str, tmp_path: Path) -> None:
    path, image = tmp_path / "a.png", picture(40, 9, 1, 1)
    path.write_bytes(b"old")
    error = KeyboardInterrupt if side == "interrupted" else ValueError
    drawn = 0

    def bands() -> Iterator[np.ndarray]:
        nonlocal drawn
        for drawn in range(40):
            if drawn == 20 and side != "written":
                raise error("made")
            yield image[drawn : drawn + 1] if drawn != 5 or side != "written" else image[:, :3]

    before = threading.active_count()
    with pytest.raises(error, match="made" if side != "written" else "expected at most"):
        save_rows(path, bands(), image.shape, {})
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    assert threading.active_count() == before
    if side == "written":
        assert drawn <= 5 + BANDS_AHEAD + 2  # the rest is not drawn in vain


def test_damage_is_found() -> None:
    image = picture(9, 7, 1, 1)
    data = written(image, 9, r2="text")
    for cut in range(len(data) - 12):
        file = io.BytesIO(data[:cut])
        with pytest.raises(ArtefactError, match="Make or fetch"):
            rows = open_rows(NAME, file)
            if rows is None:
                raise ArtefactError("no PNG: Make or fetch")
            rows.read(9)
    for place in range(8, data.index(b"IEND") - 4):
        changed = data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]
        with pytest.raises(ArtefactError):
            rows = open_rows(NAME, io.BytesIO(changed))
            assert rows is not None
            rows.read(9)
    assert read_text(NAME, io.BytesIO(b"GIF89a"), "r2") is None


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_file_is_what_pillow_makes_of_it(mode: str, channels: int, tmp_path: Path) -> None:
    image = Image.fromarray(picture(20, 31, 3, 1)).convert(mode)
    image.save(tmp_path / "a.png")
    wanted = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
    wanted = np.moveaxis(wanted.reshape(20, 31, channels), -1, 0)[None] / 127.5 - 1
    with ImageFile(tmp_path / "a.png", channels) as found:
        assert found.size == (20, 31)
        for top, left, height, width in ((0, 0, 4, 31), (4, 0, 1, 9), (4, 9, 1, 22), (9, 2, 11, 5)):
            part = wanted[..., top : top + height, left : left + width]
            np.testing.assert_allclose(found(top, left, height, width), part, atol=1e-6)


def test_a_mapped_array_is_an_image(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", picture(5, 6, 3, 1))
    with ImageFile(tmp_path / "a.npy", 3) as found:
        assert found.size == (5, 6) and found(2, 0, 3, 6).shape == (1, 3, 3, 6)
    np.save(tmp_path / "a.npy", np.zeros((5, 6)))
    with pytest.raises(ArtefactError, match="expected uint8"):
        ImageFile(tmp_path / "a.npy", 1)
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="no array"):
        ImageFile(tmp_path / "a.npy", 1)


def test_psnr() -> None:
    zero = np.zeros((1, 1, 2, 2), np.float32)
    assert psnr(zero, zero) == pytest.approx(200)
    assert psnr(zero + 0.02, zero) == pytest.approx(40, abs=1e-4)
    assert psnr(zero + 3, zero + 1) == pytest.approx(200)  # both are white
