"""The label condition: a one-hot label as text tokens; the zero label is the null condition."""

from torch import Tensor, nn


class LabelCondition(nn.Module):
    """Labels `[..., labels]` (one-hot, mixed or zero) -> text tokens `[..., T, d]`."""

    def __init__(self, labels: int, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(labels, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, label: Tensor) -> Tensor:
        return self.norm(self.project(label).unflatten(-1, (self.tokens, -1)))
