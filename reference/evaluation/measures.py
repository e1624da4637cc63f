"""Measures of pictures and of their features, each a few lines of algebra on float64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5  # as in most comparisons of generators


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of features `[N, D]` and `[M, D]`.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^½ C_b C_a^½, which is
    symmetric. Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return (apart + covariance_a.trace() + covariance_b.trace() - 2 * shared).item()


def precision_and_recall(
    real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The share of `generated` `[N, D]` among the `real` `[M, D]`, and of `real` among generated.

    One is among the others where it is no farther from any of them than that one's
    `neighbours`-th nearest of its own kind. Compare equal counts: more points lie denser.
    Source: Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2.
    """
    real, generated = real.double(), generated.double()
    apart = _distances(generated, real)
    return _within(apart, _radii(real, neighbours)), _within(apart.T, _radii(generated, neighbours))


def _within(apart: Tensor, radii: Tensor) -> float:
    """The share of rows of `[N, M]` with a distance within its column's radius `[M]`."""
    return (apart <= radii).any(1).double().mean().item()


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """The distance of each point's `neighbours`-th nearest other, `[N]`."""
    return _distances(points, points).kthvalue(min(neighbours + 1, len(points)), 1).values


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, `[N, M]`; a point is at 0 from itself, which matrix products do not give."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def reduced(images: Tensor, factor: int) -> Tensor:
    """`[B, c, k·h, k·w]` -> `[B, c, h, w]`: each pixel the mean of the k × k that it covers."""
    return F.avg_pool2d(images, factor)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of the mean squared error over all images; pixels in [-1, 1]."""
    return 10 * math.log10(4 / max(F.mse_loss(a, b).item(), 1e-10))


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of images `[B, c, h, w]` in [-1, 1], of 11 × 11 pixels at least.

    Source: Wang et al. 2004, "Image Quality Assessment", with its Gaussian window.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True)
    own = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    found = [
        structural_similarity(one, other, data_range=2, channel_axis=0, **own)
        for one, other in pairs
    ]
    return sum(map(float, found)) / len(found)
