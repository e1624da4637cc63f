"""The label condition: a one-hot label as text tokens; the zero label is the null condition."""

from torch import Tensor, nn

from reference.families.r2.config import ConditionConfig


class LabelCondition(nn.Module):
    """Labels `[..., labels]` (one-hot, mixed or zero) -> text tokens `[..., T, d]`."""

    def __init__(self, config: ConditionConfig, width: int):
        super().__init__()
        self.tokens = config.tokens
        self.project = nn.Linear(config.labels, config.tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, label: Tensor) -> Tensor:
        return self.norm(self.project(label).unflatten(-1, (self.tokens, -1)))
