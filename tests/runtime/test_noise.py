"""Noise: standard normal at every size, one field behind all sizes of a picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import generate
from runtime.sampling.noise import DEPTH, KINDS, NoiseStreams, haar_axis, philox, refine, spread

SIZES = [(1, 1), (8, 8), (16, 16), (12, 20), (9, 16), (17, 5), (1, 30), (100, 100)]
kinds = pytest.mark.parametrize("kind", KINDS)
Array = NDArray[np.float64]


def overlaps(fine: int, fine_unit: int, coarse: int, coarse_unit: int) -> Array:
    """What two sets of cells have in common, over the roots of their lengths."""
    a, b = (
        (np.arange(count + 1) * 2 - count) / (2 * unit)
        for count, unit in ((fine, fine_unit), (coarse, coarse_unit))
    )
    common = np.minimum(a[1:, None], b[1:]) - np.maximum(a[:-1, None], b[:-1])
    found: Array = common.clip(0) * np.sqrt(fine_unit * coarse_unit)
    return found


def covariance(fine: tuple[int, int], coarse: tuple[int, int]) -> Array:
    """Of the noise in the cells of two axes: products of the weights that both have."""
    a, b = (haar_axis(count, unit, 0, count) for count, unit in (fine, coarse))
    _, in_a, in_b = np.intersect1d(a.names, b.names, return_indices=True)
    product: Array = a.weights[:, in_a] @ b.weights[:, in_b].T
    return product


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: list[int], key: tuple[int, int], words: str
) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


@given(st.integers(1, 300), st.integers(1, 300))
def test_cells_are_of_unit_variance_and_uncorrelated(count: int, unit: int) -> None:
    axis = haar_axis(count, min(count, unit), 0, count)
    assert len(set(axis.names.tolist())) == len(axis.names)
    np.testing.assert_allclose(axis.weights @ axis.weights.T, np.eye(count), atol=1e-12)


@given(st.integers(1, 31), st.integers(1, 31))
def test_sizes_agree_as_their_cells_overlap(fine: int, coarse: int) -> None:
    """Exact while no two edges of the sizes lie within one cell of the deepest level."""
    found = covariance((fine, fine), (coarse, coarse))
    np.testing.assert_allclose(found, overlaps(fine, fine, coarse, coarse), atol=1e-12)


def test_larger_sizes_agree_within_the_stated_bound() -> None:
    for fine, coarse in ((64, 61), (62, 58), (63, 62), (60, 40), (96, 48)):
        error = covariance((fine, fine), (coarse, coarse)) - overlaps(fine, fine, coarse, coarse)
        assert np.abs(error).max() < 0.015
    assert (
        len(haar_axis(100, 100, 0, 100).names) < 100 * DEPTH
    )  # and no field of 2^10 cells behind it


@pytest.mark.parametrize("size", SIZES)
@kinds
def test_noise_is_standard_normal_without_correlation(size: tuple[int, int], kind: str) -> None:
    count = max(1, 400_000 // (size[0] * size[1] * 16))
    noise = NoiseStreams(3, range(min(count, 3000)), (16, *size), kind).draw()
    assert noise.dtype == np.float32 and noise.shape[1:] == (16, *size)
    bound = 5 / np.sqrt(noise.size)
    assert abs(noise.mean()) < bound and abs(noise.var() - 1) < 1.5 * bound
    assert abs((noise**4).mean() - 3) < 10 * bound
    for axis in range(4):
        if noise.shape[axis] > 1:
            a, b = np.moveaxis(noise, axis, 0)[1:], np.moveaxis(noise, axis, 0)[:-1]
            assert abs((a * b).mean()) < 5 / np.sqrt(a.size)


def test_coarse_noise_is_the_average_of_finer_noise() -> None:
    small, middle, large = (
        NoiseStreams(5, [0, 7], (5, side, side)).draw().astype(float) for side in (8, 16, 32)
    )
    for coarse, fine in ((small, middle), (middle, large)):
        side = coarse.shape[-1]
        blocks = fine.reshape(2, 5, side, 2, side, 2)
        np.testing.assert_allclose(blocks.mean((3, 5)) * 2, coarse, atol=1e-5)
    thirds = NoiseStreams(5, [0, 7], (5, 24, 24)).draw().astype(float)
    blocks = thirds.reshape(2, 5, 8, 3, 8, 3)
    np.testing.assert_allclose(blocks.mean((3, 5)) * 3, small, atol=1e-5)


def test_aspect_ratios_share_the_centre() -> None:
    square = NoiseStreams(5, [3], (6, 12, 12)).draw()
    wide, tall = (NoiseStreams(5, [3], (6, *size)).draw() for size in ((12, 20), (20, 12)))
    np.testing.assert_allclose(wide[..., 4:16], square, atol=1e-5)
    np.testing.assert_allclose(tall[..., 4:16, :], square, atol=1e-5)


def test_overlapping_cells_of_12x20_and_8x8_have_the_covariance_of_their_overlap() -> None:
    count = 4000
    wide = NoiseStreams(1, range(count), (4, 12, 20)).draw().reshape(-1, 12 * 20)
    square = NoiseStreams(1, range(count), (4, 8, 8)).draw().reshape(-1, 8 * 8)
    wanted = np.kron(overlaps(12, 12, 8, 8), overlaps(20, 12, 8, 8))
    found = wide.T @ square / len(wide)
    assert wanted.max() > 0.6
    assert np.abs(found - wanted).max() < 6 / np.sqrt(len(wide))


@given(st.integers(0, 2**62), st.integers(0, 2**62))
@kinds
def test_an_image_has_its_own_noise(kind: str, seed: int, index: int) -> None:
    together = NoiseStreams(seed, [index, index + 1], (2, 3, 5), kind)
    alone = NoiseStreams(seed, [index + 1], (2, 3, 5), kind)
    for number in range(2):
        first, second = together.draw(number)
        np.testing.assert_array_equal(second, alone.draw(number)[0])
        assert not np.array_equal(first, second)


@kinds
def test_seeds_indices_draws_and_channels_are_independent(kind: str) -> None:
    shape = (12, 24, 36)
    noises = [
        *NoiseStreams(1, [0, 1, 1 << 33], shape, kind).draw(),
        *NoiseStreams(2, [0], shape, kind).draw(),
        *NoiseStreams(1 << 40, [0], shape, kind).draw(),
        *NoiseStreams(1, [0], shape, kind).draw(1),
        *NoiseStreams(1, [0], shape, kind).draw(10_000),
    ]
    flat = np.concatenate(noises).reshape(len(noises) * 12, -1)
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 5.5 / np.sqrt(flat.shape[1])


def test_tiles_of_a_large_latent_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NoiseStreams(1, [0], (5, 30, 47)).draw()
    monkeypatch.setattr("runtime.sampling.noise.TILE", 9)
    tiles = NoiseStreams(1, [0], (5, 30, 47))
    assert tiles.field is not None and len(tiles.field.columns) == 6
    np.testing.assert_allclose(tiles.draw(), whole, atol=1e-5)


@pytest.mark.parametrize("sizes", [((4, 6), (8, 12)), ((8, 8), (12, 12)), ((5, 5), (6, 6))])
def test_refined_noise_keeps_its_variance_and_takes_its_coarse_part(
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    count = 3000
    coarse = NoiseStreams(1, range(count), (1, *sizes[0]), "independent").draw()
    noise = NoiseStreams(2, range(count), (1, *sizes[1]), "independent").draw()
    refined = refine(coarse, noise).reshape(count, -1)
    found = refined.T @ refined / count
    assert np.abs(found - np.eye(len(found))).max() < 6.5 / np.sqrt(count)
    rows, columns = (spread(a, b) for a, b in zip(*sizes, strict=True))
    again = rows.T @ refine(coarse, noise) @ columns
    np.testing.assert_allclose(again, coarse, atol=1e-5)


def test_coherent_noise_is_its_own_refinement() -> None:
    coarse, fine = (NoiseStreams(1, [0], (3, side, 2 * side)).draw() for side in (4, 8))
    np.testing.assert_allclose(refine(coarse, fine), fine, atol=1e-5)


def test_the_command_line_offers_every_kind() -> None:
    (option,) = (a for a in generate.parser()._actions if a.dest == "noise")
    assert tuple(option.choices or ()) == KINDS
    assert generate.DEFAULTS["noise"] == KINDS[0]
