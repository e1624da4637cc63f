"""Coordinates, schedule, noise and the sampler: properties that hold at any size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.coordinates import MARGIN, grid
from runtime.errors import NumericalError, UsageError
from runtime.sampling import ddim, schedule

SIDES = st.integers(1, 40)


@given(SIDES, SIDES)
def test_a_grid_is_centred_and_keeps_the_aspect(height: int, width: int) -> None:
    c = grid(height, width)
    assert c.shape == (height, width, 4) and c.dtype == np.float32
    if height > 1 and width > 1:
        np.testing.assert_allclose(c, -c[::-1, ::-1], atol=1e-7)
    longer = max(height, width)
    spans = 0.5 * np.array([width / longer, height / longer, 1, 1])
    np.testing.assert_allclose(c[0, 0], MARGIN - spans, atol=1e-7)
    assert (np.abs(c) <= 0.5).all()


@given(SIDES, SIDES)
def test_transposing_a_grid_swaps_x_and_y(height: int, width: int) -> None:
    swapped = grid(width, height).transpose(1, 0, 2)[..., [1, 0, 3, 2]]
    np.testing.assert_array_equal(grid(height, width), swapped)


def test_a_single_pixel_is_the_first_point_of_its_axis() -> None:
    np.testing.assert_allclose(grid(1, 1)[0, 0], np.full(4, MARGIN - 0.5), atol=1e-7)


def test_square_and_edge_agree_on_a_square_and_differ_elsewhere() -> None:
    square, wide = grid(6, 6), grid(3, 6)
    np.testing.assert_array_equal(square[..., :2], square[..., 2:])
    assert np.abs(wide[..., 1]).max() < 0.26 < np.abs(wide[..., 3]).max()


@given(st.integers(1, 500))
def test_alpha_bar_rises_towards_the_image(steps: int) -> None:
    alpha_bar = schedule.sampling_alpha_bar(steps)
    assert len(alpha_bar) == steps + 1
    assert (np.diff(alpha_bar) > 0).all()
    assert alpha_bar[0] == schedule.FLOOR and alpha_bar[-1] > 0.999


@given(st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32))
def test_a_perfect_denoiser_recovers_x0(steps: int, eta: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x0, start = rng.uniform(-1, 1, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    alpha_bar = schedule.sampling_alpha_bar(steps)

    def denoise(x: np.ndarray, step: int) -> list[np.ndarray]:
        a = alpha_bar[step]
        return [(x - math.sqrt(a) * x0) / math.sqrt(1 - a)]

    found = ddim.sample(denoise, start, steps, [1.0], eta, lambda step: rng.standard_normal())
    assert np.abs(found.x0 - x0).max() < 1e-5
    # The schedule ends at alpha_bar(0) < 1: x keeps that little noise.
    left = math.sqrt(1 - alpha_bar[-1])
    assert left < 0.013 and np.abs(found.x - x0).max() < 8 * left


def test_eta_adds_noise_only_when_asked() -> None:
    assert ddim.sigma(0.2, 0.5, 0.0) == 0
    assert ddim.sigma(0.2, 0.5, 2.0) == pytest.approx(2 * ddim.sigma(0.2, 0.5, 1.0))
    expected = math.sqrt((1 - 0.5) / (1 - 0.2) * (1 - 0.2 / 0.5))
    assert ddim.sigma(0.2, 0.5, 1.0) == pytest.approx(expected, rel=1e-5)


def test_guidance_weighs_branches() -> None:
    eps = np.array([[1.0], [3.0]])
    assert ddim.guide(eps, (1 - 4, 4)) == pytest.approx(1 + 4 * (3 - 1))
    with pytest.raises(UsageError, match="3 weights for 2 branches"):
        ddim.guide(eps, (1, 2, 3))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's own word on infinity
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_stops_the_loop_and_names_the_step(bad: float) -> None:
    def denoise(x: np.ndarray, step: int) -> list[np.ndarray]:
        return [np.full_like(x, bad) if step == 3 else np.zeros_like(x)]

    with pytest.raises(NumericalError, match="step 4 of 9"):
        ddim.sample(denoise, np.ones((1, 2)), 9, [1.0])
