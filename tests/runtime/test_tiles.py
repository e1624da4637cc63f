"""Tiles: the pixels of the whole, of any size, crop and memory; and states that hold them."""

import io
import mmap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import open_bundle
from runtime.bundle.state import DecodeState
from runtime.coordinates import Grid, grid
from runtime.engines import EngineOptions
from runtime.errors import ArtefactError, ResourceError, UsageError
from runtime.memory import resident
from runtime.pipeline import tiler, tiles
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.resampler import Resampler
from runtime.pipeline.tiles import bands, sample_places, window_of

SIDES = st.integers(1, 60)
SINGLE = EngineOptions(threads=1)
LARGE = (150, 170)  # more pixels than a sample has
TOLERANCE = 1e-5  # rounding: products over other numbers of rows add up in another order


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle, SINGLE)


@pytest.fixture(scope="module")
def latent() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 4, 3, 5), np.float32)


def resampler_of(bundle: Bundle) -> Resampler:
    assert isinstance(bundle.resampler, Resampler)
    return bundle.resampler


def untiled(pipeline: Bundle, latent: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The decode of all pixels at once, by the graphs alone."""
    summary = pipeline.engines.open("r2ir_latent_summary")
    sums = summary.run({"latent": latent, "coordinates": grid(*latent.shape[2:])})
    return pipeline.engines.open("r2ir_decode").run({"coordinates": grid(*size), **sums})["pixels"]


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to 1e-5, but for a few pixels of thousands where random weights amplify rounding."""
    error = np.abs(found - wanted)
    assert np.quantile(error, 0.99) <= TOLERANCE and error.max() <= 20 * TOLERANCE


@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 500))
def test_tiles_cover_a_window_once_in_order(
    top: int, left: int, height: int, width: int, pixels: int
) -> None:
    window = tiles.Window(top, left, height, width)
    cover = np.zeros((top + height, left + width), int)
    reached = top
    for band in bands(window, pixels):
        assert {(tile.top, tile.height) for tile in band} == {(reached, band[0].height)}
        reached += band[0].height
        for tile in band:
            assert 1 <= tile.height * tile.width <= pixels
            cover[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert reached == top + height
    assert (cover[top:, left:] == 1).all() and cover.sum() == height * width


@given(SIDES, SIDES, st.data())
def test_a_part_of_a_grid_is_a_slice_of_it(height: int, width: int, data: st.DataObject) -> None:
    whole, parts = grid(height, width), Grid(height, width)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    down, across = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    wanted = whole[top : top + down, left : left + across]
    np.testing.assert_array_equal(parts.window(top, left, down, across), wanted)
    rows, columns = np.indices((height, width))
    np.testing.assert_array_equal(parts.at(rows, columns), whole)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(2, 32))
def test_a_sample_has_one_pixel_in_each_cell(height: int, width: int, side: int) -> None:
    rows, columns = sample_places((height, width), side)
    down, across = rows.shape
    assert rows.size <= side * side
    if height * width <= side * side:
        assert (rows.ravel() * width + columns.ravel() == np.arange(height * width)).all()
    # Each row of cells has rows of its own: none above the one before it, and so for columns.
    assert (rows.max(1)[:-1] < rows.min(1)[1:]).all()
    assert (columns.max(0)[:-1] < columns.min(0)[1:]).all()
    assert rows.min() >= 0 and rows.max() < height and columns.max() < width
    assert (rows.min(1) >= np.arange(down) * height // down).all()
    assert (columns.min(0) >= np.arange(across) * width // across).all()


@pytest.mark.parametrize("pixels", [64, 1000, 4096])
def test_tiles_of_any_size_give_the_same_pixels(
    pipeline: Bundle, latent: np.ndarray, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pipeline.decode(latent, LARGE)
    monkeypatch.setattr(tiler, "LARGEST_TILE", pixels)
    np.testing.assert_allclose(pipeline.decode(latent, LARGE), wanted, rtol=0, atol=TOLERANCE)


def test_exact_tiles_are_the_untiled_image(pipeline: Bundle, latent: np.ndarray) -> None:
    wanted = untiled(pipeline, latent, LARGE)
    agree(pipeline.decode(latent, LARGE, exact=True), wanted)
    sampled = np.abs(pipeline.decode(latent, LARGE) - wanted)
    # Near, and yet far enough that the passes above were needed.
    assert 20 * TOLERANCE < np.median(sampled) < 2e-3


def test_a_small_image_is_its_own_sample(pipeline: Bundle, latent: np.ndarray) -> None:
    wanted = untiled(pipeline, latent, (31, 40))
    np.testing.assert_array_equal(pipeline.decode(latent, (31, 40)), wanted)
    crop = pipeline.decode(latent, (31, 40), (3, 5, 20, 30))
    np.testing.assert_array_equal(crop, wanted[..., 3:23, 5:35])


@pytest.mark.parametrize(("size", "factor"), [((11, 20), 3), ((5, 7), 4), ((1, 1), 8), ((4, 4), 6)])
def test_a_small_picture_is_the_mean_of_a_larger_one(
    pipeline: Bundle, latent: np.ndarray, size: tuple[int, int], factor: int
) -> None:
    fine = untiled(pipeline, latent, (factor * size[0], factor * size[1]))
    wanted = fine.reshape(1, 1, size[0], factor, size[1], factor).mean((3, 5))
    np.testing.assert_allclose(pipeline.decode(latent, size), wanted, rtol=0, atol=TOLERANCE)
    state = pipeline.state(latent)
    crop = (size[0] - 1, 0, 1, size[1])
    row = pipeline.render(state, size, crop)
    np.testing.assert_allclose(row, wanted[0, :, -1:], rtol=0, atol=TOLERANCE)


def test_a_picture_at_the_trained_ratio_is_decoded_as_it_is(
    pipeline: Bundle, latent: np.ndarray
) -> None:
    np.testing.assert_array_equal(
        pipeline.decode(latent, (12, 20)), untiled(pipeline, latent, (12, 20))
    )


def test_tiles_of_a_small_picture_are_its_own(
    pipeline: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many cells that the decode before the means is larger than a sample."""
    latent, size = np.random.default_rng(0).standard_normal((1, 4, 13, 15), np.float32), (50, 55)
    wanted = pipeline.decode(latent, size)
    assert wanted.shape[2:] == size and tiles.SAMPLE**2 < 9 * 50 * 55
    monkeypatch.setattr(tiler, "LARGEST_TILE", 64)
    agree(pipeline.decode(latent, size), wanted)
    agree(pipeline.decode(latent, size, (7, 9, 20, 30)), wanted[..., 7:27, 9:39])


def test_little_memory_changes_no_pixel(
    tiny_bundle: Path, latent: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sample does not fit at once its ratios are counted in passes over its parts."""
    pipeline, opened = open_bundle(tiny_bundle, SINGLE), ("r2ir_decode", "fp32")
    monkeypatch.setattr("runtime.pipeline.resampler.resident", lambda: 1000)
    for size in ((31, 40), LARGE):
        wanted = pipeline.decode(latent, size)
        decode = pipeline.engines.open("r2ir_decode")
        with monkeypatch.context() as patch:
            patch.delitem(pipeline.engines.opened, opened)
            agree(pipeline.decode(latent, size, memory=200_000), wanted)
            assert opened not in pipeline.engines.opened  # it was not run
        pipeline.engines.opened[opened] = decode


def test_no_seams(pipeline: Bundle, latent: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps from row to row are alike across and inside tiles, in every column of tiles."""
    monkeypatch.setattr(tiler, "LARGEST_TILE", 5 * 200)
    image = pipeline.decode(latent, (200, 200))[0, 0].astype(np.float64)
    steps = np.abs(np.diff(image, axis=0)).mean(1)
    borders = np.arange(4, 199, 5)
    inside = np.delete(steps, borders)
    assert 0.9 < steps[borders].mean() / inside.mean() < 1.1
    assert inside.mean() > 100 * TOLERANCE


@given(
    top=st.integers(0, 149),
    left=st.integers(0, 169),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_a_crop_is_a_window_of_the_whole(
    pipeline: Bundle, latent: np.ndarray, top: int, left: int, height: int, width: int
) -> None:
    height, width = min(height, 150 - top), min(width, 170 - left)
    whole = pipeline.decode(latent, LARGE)
    found = pipeline.decode(latent, LARGE, (top, left, height, width))
    wanted = whole[..., top : top + height, left : left + width]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "crop", [(0, 0, 0, 5), (0, 0, 151, 1), (149, 0, 2, 1), (0, 170, 1, 1), (-1, 0, 1, 1)]
)
def test_a_crop_outside_its_image_is_refused(
    pipeline: Bundle, latent: np.ndarray, crop: tuple[int, int, int, int]
) -> None:
    with pytest.raises(UsageError, match=r"is not inside the image of 150x170"):
        pipeline.decode(latent, LARGE, crop)


@pytest.mark.parametrize("pixels", [64, 300])
def test_an_image_is_encoded_by_tiles(
    pipeline: Bundle, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(1).uniform(-1, 1, (2, 1, 57, 83)).astype(np.float32)
    summary = pipeline.engines.open("r2ir_image_summary")
    sums = summary.run({"pixels": image, "coordinates": grid(57, 83)})
    wanted = pipeline.engines.open("r2ir_encode").run({"coordinates": grid(4, 6), **sums})["latent"]
    monkeypatch.setattr(tiler, "LARGEST_TILE", pixels)
    found = pipeline.encode(image, (4, 6))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_memory_chooses_the_tile_and_says_what_is_missing(
    pipeline: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = resampler_of(pipeline).tiler()

    def tile(pixels: int, *graphs: str) -> int:
        room = own.bytes_needed("r2ir_render", pixels)
        return replace(own, room=room).tile("r2ir_render", *graphs)

    assert [tile(n) for n in (9999, 4096, 4095, 64, -1)] == [4096, 4096, 2048, 64, 64]
    assert tile(4096, "r2ir_response") == 1024  # both at once
    monkeypatch.setattr(tiles, "resident", lambda: 100_000_000)
    each = own.bytes_needed("r2ir_render", 1)
    assert each == 4 * 24 * 16
    enough = 100_000_000 + 64 * each
    tiles.check_memory(enough, each)
    with pytest.raises(ResourceError, match=r"holds 100MB and needs 101MB .* --memory 101MB"):
        tiles.check_memory(enough - 1, each)
    with pytest.raises(ResourceError, match="--memory"):
        pipeline.encode(np.zeros((1, 1, 8, 8), np.float32), (64, 64), memory=100_000_000)


def test_resident_memory_is_measured() -> None:
    before = resident()
    with mmap.mmap(-1, 50_000_000) as held:  # malloc would take what was freed before
        held.write(b"1" * len(held))
        assert 40_000_000 < resident() - before < 120_000_000


def test_a_state_draws_what_its_latent_draws(
    pipeline: Bundle, latent: np.ndarray, tmp_path: Path
) -> None:
    both = np.concatenate([latent[:, :, ::-1], latent])
    pipeline.state(both, {"a": [1, None]}).save(tmp_path / "state.npz")
    state = DecodeState.load(tmp_path / "state.npz")
    assert state.latent == (3, 5) and len(state) == 2 and state.metadata == {"a": [1, None]}
    drawn = np.concatenate([*pipeline.resampler.draw(state, LARGE, (9, 8, 70, 60), index=1)], 1)
    wanted = pipeline.decode(latent, LARGE, (9, 8, 70, 60))[0]
    np.testing.assert_allclose(drawn, wanted, rtol=0, atol=TOLERANCE)


def altered(data: bytes, **changes: object) -> bytes:
    """A state's file with other arrays; None removes one."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {**found, **changes}
    out = io.BytesIO()
    np.savez(out, **{key: np.asarray(v) for key, v in arrays.items() if v is not None})  # type: ignore[arg-type]
    return out.getvalue()


def test_states_that_are_not_whole_are_refused(
    pipeline: Bundle, latent: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "state.npz"
    state = pipeline.state(latent)
    state.save(path)
    whole, sums, bound = path.read_bytes(), dict(state.arrays), (state.bundle, state.latent)
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("kv.npy", b"no array")
    changes: list[tuple[bytes, str]] = [
        (b"", "no decode state"),
        (whole[:-40], "no decode state"),
        (plain.getvalue(), "no decode state"),
        (altered(whole, bundle=None), "has no array 'bundle'"),
        (altered(whole, more=1), "expected"),
        (altered(whole, latent=None), "has no array 'latent'"),
        (altered(whole, latent=[3, 0]), "expected float32"),
        (altered(whole, latent=3), "expected float32"),
        (altered(whole, metadata="[]"), "no decode state"),
        (altered(whole, metadata="{"), "no decode state"),
        (altered(whole, kv=state.arrays["kv"].astype(np.float64)), "float64"),
        (altered(whole, k=state.arrays["k"][[0, 0]]), "as many images"),
        (altered(whole, k=np.array([{}], object)), "no decode state"),  # a pickle is not run
    ]
    for data, words in changes:
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=words):
            DecodeState.load(path)
    broken: list[tuple[Callable[[], DecodeState], str]] = [
        (lambda: DecodeState(sums | {"k": sums["k"] * np.nan}, *bound), "finite"),
        (lambda: DecodeState(sums | {"k": sums["k"][:, :1]}, *bound), r"\[batch, 2, 16\]"),
        (lambda: DecodeState({"kv": sums["kv"]}, *bound), r"k is \(\); expected"),
        (lambda: DecodeState(sums, "0" * 64, (3, 5)), "Pass its bundle"),
    ]
    for make, words in broken:
        with pytest.raises(ArtefactError, match=words):
            pipeline.resampler.draw(make(), LARGE)


def test_window_of_defaults_to_the_whole() -> None:
    assert window_of(None, (3, 4)) == (0, 0, 3, 4)
