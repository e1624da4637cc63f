"""Coordinates: properties that hold at any size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.coordinates import MARGIN, grid

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
