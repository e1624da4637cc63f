"""Labels as what networks take; the zero label is the null condition."""

import torch
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


def with_null(labels: Tensor) -> Tensor:
    """Labels `[B, N]` with a last column of what they leave to the null class, `[B, N + 1]`."""
    return torch.cat([labels, 1 - labels.sum(-1, keepdim=True)], -1)
