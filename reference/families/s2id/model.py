"""S2ID: predicts eps in pixels by axial attention between all of them.

Shapes: B batch, K conditions, C colours, H × W pixels, T text tokens, d width.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reference.families.parts.axial import (
    NO_DROPOUTS,
    AxialConfig,
    AxialDenoiser,
    Dropouts,
    text_denoiser,
)
from reference.families.parts.config import Section, Size, TextConfig
from reference.families.parts.models import Denoiser, Models
from reference.families.parts.text import LabelCondition


class S2ID(AxialDenoiser):
    """The denoiser; a pixel is a token, and any size is legal."""


class S2IDModel(Section, frozen=True):
    """One checkpoint's models and the image size (height, width) that it was trained at."""

    name: str
    s2id: AxialConfig
    condition: TextConfig
    default_size: Size

    @property
    def channels(self) -> int:
        return self.s2id.channels

    @property
    def labels(self) -> int:
        return self.condition.labels

    @property
    def multiple(self) -> int:
        """What height and width are multiples of."""
        return 1

    @property
    def minimum(self) -> int:
        """The least height and width."""
        return 1


class S2IDModels(Models):
    """S2ID and its label condition."""

    def __init__(self, config: S2IDModel, dropouts: Dropouts = NO_DROPOUTS):
        super().__init__()
        self.config = config
        self.s2id = S2ID(config.s2id, dropouts)
        self.condition = LabelCondition(
            config.condition.labels, config.condition.tokens, config.s2id.width
        )

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label being null."""
        return text_denoiser(self.s2id, self.condition, labels, alpha_bar)
