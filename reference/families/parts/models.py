"""What generic code asks of the models of a checkpoint, whatever the family."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Denoiser = Callable[[Tensor, int], Tensor]  # eps [K, B, C, H, W] of x [B, C, H, W] at a step


class Models(nn.Module):
    """All networks of a checkpoint; their names begin the names of its tensors.

    `config` is the family's description of them, as read from a configuration's [model].
    """

    config: Any

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at nodes `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label null."""
        raise NotImplementedError
