"""What the exported modules of several families are made of.

Letters: B batch, N tokens, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from reference.families.parts.layers import FFN


def tokens_of(x: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, H · W, C]`."""
    return x.flatten(2).transpose(1, 2)


def token_mean(x: Tensor) -> Tensor:
    """Mean over tokens, `[B, N, d]` -> `[B, 1, d]`, as a product: threads share its work."""
    count = x.shape[1]
    return x.new_full((1, 1, count), 1.0) / count @ x


def signal_share(log_snr: Tensor) -> Tensor:
    """alpha_bar of a log-SNR; 1 - alpha_bar is that of its negative.

    Not as a Sigmoid, whose small numbers ONNX Runtime gives to few digits: their roots need all.
    """
    return 1 / (1 + (-log_snr).exp())


class Projection(nn.Module):
    """A linear layer as a matrix on the right, its output scaled per channel.

    With `shift`, its input lacks that shift and the bias makes up for it.
    """

    def __init__(self, linear: nn.Linear, scale: Tensor | float = 1.0, shift: Tensor | None = None):
        super().__init__()
        weight, bias = linear.weight.T * scale, linear.bias * scale
        self.weight = nn.Parameter(weight.contiguous())  # [in, out]
        self.bias = nn.Parameter(bias if shift is None else bias + shift @ weight)

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., in]` -> `[.., out]`."""
        return x @ self.weight + self.bias


class ScaledFFN(nn.Module):
    """FFN with its output times `scale`; `shift` is what its input lacks (see Projection)."""

    def __init__(self, ffn: FFN, scale: Tensor, shift: Tensor | None = None):
        super().__init__()
        self.up, self.down = Projection(ffn.up, 1.0, shift), Projection(ffn.down, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class SplitInput(nn.Module):
    """A projection of values ‖ positional features, each half on its own."""

    def __init__(self, linear: nn.Linear, values: int):
        super().__init__()
        self.value_weight = nn.Parameter(linear.weight[:, :values].T.contiguous())
        self.position_weight = nn.Parameter(linear.weight[:, values:].T.contiguous())
        self.bias = nn.Parameter(linear.bias)

    def values(self, x: Tensor) -> Tensor:
        return x @ self.value_weight

    def position(self, features: Tensor) -> Tensor:
        return features @ self.position_weight + self.bias
