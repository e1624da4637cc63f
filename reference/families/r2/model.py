"""The models of an R2 checkpoint."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference.families.parts.models import Denoiser, Models
from reference.families.parts.text import LabelCondition
from reference.families.r2.config import ModelConfig
from reference.families.r2.r2id import R2ID
from reference.families.r2.r2ir import R2IR


class R2Models(Models):
    """R2IR, R2ID and the label condition."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, **dropouts: Any):
        super().__init__()
        self.config = config
        self.r2ir = R2IR(config.r2ir, **dropouts.get("r2ir", {}))
        self.r2id = R2ID(config.r2id, **dropouts.get("r2id", {}))
        self.condition = LabelCondition(
            config.condition.labels, config.condition.tokens, config.r2id.width
        )

    def denoiser(self, labels: Tensor, alpha_bar: NDArray[np.float64]) -> Denoiser:
        """eps at nodes `alpha_bar [S]` under conditions `[K, B, labels]`, the zero label null."""
        text = self.condition(labels)  # [K, B, T, d]
        levels = torch.from_numpy(alpha_bar).float().to(text.device)

        def denoise(x: Tensor, step: int) -> Tensor:
            eps: Tensor = self.r2id(x, levels[step].expand(len(x)), text)
            return eps

        return denoise
