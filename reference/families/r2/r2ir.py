"""R2IR: resamples an image of any size into a latent of any size, and back.

Shapes: B batch, c colours, C latent channels, h × w pixels, H × W latent, d width,
N query tokens, M memory tokens. Pixels and latents live in [-1, 1].
"""

import torch
from torch import Tensor, nn

from reference.families.parts.embeddings import PositionFeatures
from reference.families.parts.layers import FFN, GRN, LinearAttention, scale
from reference.families.r2.config import R2IRConfig
from runtime.coordinates import grid

Summary = list[tuple[Tensor, Tensor]]  # of each block: kv `[B, H, e, e]` and k `[B, H, e]`


def grid_tokens(height: int, width: int, device: torch.device) -> Tensor:
    """Coordinates of a grid as tokens, `[1, height · width, 4]`."""
    return torch.from_numpy(grid(height, width)).flatten(0, 1).unsqueeze(0).to(device)


def tokens_from_grid(x: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, H · W, C]`."""
    return x.flatten(-2).transpose(-2, -1)


def grid_from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, H · W, C]` -> `[B, C, H, W]`."""
    return tokens.transpose(-2, -1).unflatten(-1, (height, width))


class Block(nn.Module):
    """w = q + a1·Attention(GRN(q), memory); w += a2·FFN(GRN(w)); out = q + a3·w."""

    def __init__(self, width: int, heads: int, attention_dropout: float, ffn_dropout: float):
        super().__init__()
        self.attention_norm = GRN(width)
        self.attention = LinearAttention(width, heads, attention_dropout)
        self.attention_scale = scale(width, 1.0)
        self.ffn_norm = GRN(width)
        self.ffn = FFN(width, ffn_dropout)
        self.ffn_scale = scale(width, 1.0)
        self.block_scale = scale(width, 0.1)

    def forward(self, query: Tensor, kv: Tensor, k: Tensor) -> Tensor:
        """Queries `[B, N, d]` over the summary of a memory, as `attention.summarise` gives it."""
        read = self.attention.attend(self.attention_norm(query), kv, k)
        w = query + self.attention_scale * read
        w = w + self.ffn_scale * self.ffn(self.ffn_norm(w))
        return query + self.block_scale * w


class R2IR(nn.Module):
    """The resampler; `encode` and `decode` take and give sizes as (height, width)."""

    def __init__(
        self, config: R2IRConfig, attention_dropout: float = 0.0, ffn_dropout: float = 0.0
    ):
        super().__init__()
        d = config.width
        self.config = config
        self.position = PositionFeatures(config.high_frequencies, config.low_frequencies)
        features = 8 * (config.high_frequencies + config.low_frequencies)
        self.color_in = nn.Linear(config.color_channels + features, d)
        self.latent_in = nn.Linear(config.latent_channels + features, d)
        self.query_in = nn.Linear(features, d)

        def blocks(count: int) -> nn.ModuleList:
            dropouts = (attention_dropout, ffn_dropout)
            return nn.ModuleList(Block(d, config.heads, *dropouts) for _ in range(count))

        self.encoder = blocks(config.encoder_blocks)
        self.decoder = blocks(config.decoder_blocks)
        self.latent_out = nn.Linear(d, config.latent_channels)
        self.color_out = nn.Linear(d, config.color_channels)

    def encode(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels `[B, c, h, w]` -> latent `[B, C, *size]`."""
        at = grid_tokens(pixels.shape[-2], pixels.shape[-1], pixels.device)
        to = grid_tokens(*size, pixels.device)
        return grid_from_tokens(self.encode_tokens(tokens_from_grid(pixels), at, to), *size)

    def decode(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent `[B, C, H, W]` -> pixels `[B, c, *size]`."""
        at = grid_tokens(latent.shape[-2], latent.shape[-1], latent.device)
        to = grid_tokens(*size, latent.device)
        return grid_from_tokens(self.decode_tokens(tokens_from_grid(latent), at, to), *size)

    def encode_tokens(self, pixels: Tensor, at: Tensor, to: Tensor) -> Tensor:
        """Pixels `[B, M, c]` at coordinates `[1 or B, M, 4]` -> latent `[B, N, C]` at `to`."""
        return self.encode_summary(self.summarise(pixels, at), to)

    def summarise(self, pixels: Tensor, at: Tensor) -> Summary:
        """All that encoding needs of pixels `[B, M, c]` at `at`, for a latent of any size."""
        return self._summarise(pixels, at, self.color_in, self.encoder)

    def encode_summary(self, summary: Summary, to: Tensor) -> Tensor:
        """A summary of B images -> latent `[B, N, C]` at coordinates `[1 or B, N, 4]`."""
        return self._read(summary, to, self.encoder, self.latent_out)

    def decode_tokens(self, latent: Tensor, at: Tensor, to: Tensor) -> Tensor:
        """Latent `[B, M, C]` at coordinates `[1 or B, M, 4]` -> pixels `[B, N, c]` at `to`."""
        summary = self._summarise(latent, at, self.latent_in, self.decoder)
        return self._read(summary, to, self.decoder, self.color_out)

    def _summarise(
        self, values: Tensor, at: Tensor, project_in: nn.Linear, blocks: nn.ModuleList
    ) -> Summary:
        position = self.position(at).expand(values.shape[0], -1, -1)
        memory = project_in(torch.cat([values, position], -1))  # [B, M, d]
        return [block.attention.summarise(memory) for block in blocks]

    def _read(
        self, summary: Summary, to: Tensor, blocks: nn.ModuleList, project_out: nn.Linear
    ) -> Tensor:
        batch = summary[0][1].shape[0]
        query = self.query_in(self.position(to)).expand(batch, -1, -1)  # [B, N, d]
        for block, (kv, k) in zip(blocks, summary, strict=True):
            query = block(query, kv, k)
        return project_out(query).float().tanh()
