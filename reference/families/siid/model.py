"""SIID: predicts eps in pixels, r × r of them folded into a token, by axial attention.

Shapes: B batch, K conditions, C colours, H × W pixels, h × w tokens (H = h·r, W = w·r), T text
tokens, d width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.families.parts.axial import (
    NO_DROPOUTS,
    AxialConfig,
    AxialDenoiser,
    Dropouts,
    EncoderBlock,
    Masks,
    text_denoiser,
)
from reference.families.parts.config import Count, Section, Size, TextConfig
from reference.families.parts.models import Denoiser, Models
from reference.families.parts.text import LabelCondition

MASK_WIDTH = 0.1667  # initial σ of an encoder block's Gaussian mask


class SIIDConfig(AxialConfig, frozen=True):
    """As S2ID's, and the side of the square of pixels that makes a token."""

    fold: Count


class MaskedBlock(EncoderBlock):
    """An encoder block whose attention fades with the distance by exp(-½·(distance / σ)²)."""

    def __init__(self, config: AxialConfig, dropouts: Dropouts):
        super().__init__(config, dropouts)
        logit = math.log(MASK_WIDTH / (1 - MASK_WIDTH))
        self.mask_width = nn.Parameter(torch.tensor(logit))  # σ is its sigmoid


class SIID(AxialDenoiser):
    """The denoiser; height and width are multiples of r."""

    encoder_block = MaskedBlock

    def __init__(self, config: SIIDConfig, dropouts: Dropouts = NO_DROPOUTS):
        super().__init__(config, dropouts, config.fold)

    def masks(self, block: nn.Module, at: Tensor) -> Masks:
        """-½·(x_i - x_j)² / σ² of the square system: rows' `[w, w]` and columns' `[h, h]`."""
        sigma = block.mask_width.sigmoid()
        x, y = at[0, 0, :, 0], at[0, :, 0, 1]
        rows, columns = (-(p[:, None] - p[None, :]).square() / (2 * sigma**2) for p in (x, y))
        return rows, columns


class SIIDModel(Section, frozen=True):
    """One checkpoint's models and the image size (height, width) that it was trained at."""

    name: str
    siid: SIIDConfig
    condition: TextConfig
    default_size: Size

    @property
    def channels(self) -> int:
        return self.siid.channels

    @property
    def labels(self) -> int:
        return self.condition.labels

    @property
    def multiple(self) -> int:
        """What height and width are multiples of."""
        return self.siid.fold

    @property
    def minimum(self) -> int:
        """The least height and width."""
        return self.siid.fold


class SIIDModels(Models):
    """SIID and its label condition."""

    def __init__(self, config: SIIDModel, dropouts: Dropouts = NO_DROPOUTS):
        super().__init__()
        self.config = config
        self.siid = SIID(config.siid, dropouts)
        self.condition = LabelCondition(
            config.condition.labels, config.condition.tokens, config.siid.width
        )

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label being null."""
        return text_denoiser(self.siid, self.condition, labels, alpha_bar)
