"""How SiD2 learns: v under the sigmoid loss, t spread evenly over a batch."""

import numpy as np
from numpy.typing import NDArray

from reference.families.sid2.schedule import sigmoid


def weight_v(
    logsnr: NDArray[np.float64], slope: NDArray[np.float64], bias: float
) -> NDArray[np.float64]:
    """What mean (v - v̂)² counts: -½·dλ/dt · sigmoid(b - λ) · sigmoid(λ).

    The same loss counts mean (eps - ε̂)² by this over sigmoid(λ). Source: Kingma and Gao,
    "Understanding Diffusion Objectives as the ELBO", and Hoogeboom et al., arXiv 2410.19324.
    """
    return -slope / 2 * sigmoid(bias - logsnr) * sigmoid(logsnr)
