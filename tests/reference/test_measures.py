"""Measures where the answer is known: distances, precision and recall, likeness."""

import pytest
import torch

from reference.evaluation.measures import (
    frechet_distance,
    precision_and_recall,
    psnr,
    reduced,
    ssim,
)


def cloud(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    """Points whose mean is exactly 0 and whose covariance is exactly 1, float64."""
    x = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)).double()
    x -= x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_the_frechet_distance_of_gaussians_is_their_formula() -> None:
    a = cloud(500, 4)
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0]).double()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # Covariances that commute: |shift|² + Σ (scale - 1)².
    wanted = 5 + (scales - 1).square().sum().item()
    assert frechet_distance(a, cloud(300, 4, 1) * scales + shift) == pytest.approx(wanted)


def test_the_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """In two dimensions tr((AB)^½) = (tr AB + 2 (det AB)^½)^½."""
    left = torch.tensor([[2.0, 0.3], [0.0, 0.5]]).double()
    right = torch.tensor([[1.0, -0.9], [0.4, 1.5]]).double()
    a, b = left @ left.T, right @ right.T
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    wanted = (a.trace() + b.trace() - 2 * root).item()
    found = frechet_distance(cloud(200, 2) @ left.T, cloud(300, 2, 1) @ right.T)
    assert found == pytest.approx(wanted)
    assert found == pytest.approx(
        frechet_distance(cloud(300, 2, 1) @ right.T, cloud(200, 2) @ left.T)
    )


def test_a_cloud_lies_within_itself_and_not_within_another_one() -> None:
    a = cloud(200, 3)
    assert precision_and_recall(a, a) == (1, 1)
    assert precision_and_recall(a, a + 100) == (0, 0)


def test_a_generator_that_collapsed_has_precision_and_no_recall() -> None:
    real = cloud(400, 3)
    collapsed = real[:1] + 1e-3 * cloud(400, 3, 1)
    precision, recall = precision_and_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.01
    precision, recall = precision_and_recall(collapsed, real)
    assert precision < 0.01 and recall > 0.99


def test_more_neighbours_reach_farther() -> None:
    a, b = cloud(200, 3), cloud(200, 3, 1)
    few, many = (precision_and_recall(a, b, neighbours) for neighbours in (1, 5))
    assert few[0] < many[0] and few[1] < many[1]
    line = torch.tensor([[0.0], [1.0], [3.0]])
    # The nearest other is 1, 1 and 2 away, so 5 is within reach of 3 alone.
    assert precision_and_recall(line, torch.tensor([[5.0], [5.1], [-1.1]]), 1)[0] == pytest.approx(
        1 / 3
    )


def test_reduction_by_area_is_the_mean_of_what_a_pixel_covers() -> None:
    small = torch.arange(24.0).reshape(2, 1, 3, 4)
    for factor in (1, 2, 5):
        large = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        assert torch.equal(reduced(large, factor), small)
    corners = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])
    assert reduced(corners, 2).item() == 2


def test_likeness_is_greatest_with_itself() -> None:
    a, b = torch.rand(2, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(a, a) == pytest.approx(1)
    assert 0.9 < ssim(a, 0.8 * a) < 1 and abs(ssim(a, b)) < 0.1
    # An error of 0.2 everywhere, of values 2 apart.
    assert psnr(a, a + 0.2) == pytest.approx(20, abs=1e-3)
    colours = a.repeat(1, 3, 1, 1)
    assert ssim(colours, 0.8 * colours) == pytest.approx(ssim(a, 0.8 * a))
