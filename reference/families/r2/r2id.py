"""R2ID: predicts the noise eps in a latent of any size, for several conditions at once.

Shapes: B batch, K conditions, C latent channels, H × W latent, N = H · W tokens, d width,
T text tokens, f film width.
"""

import torch
from torch import Tensor, nn

from reference.families.parts.embeddings import PositionFeatures, TimeFeatures
from reference.families.parts.layers import FFN, AdaLN, LinearAttention, scale
from reference.families.r2.config import R2IDConfig
from reference.families.r2.r2ir import grid_from_tokens, grid_tokens, tokens_from_grid


class EncoderBlock(nn.Module):
    """w = x + a1·SelfAttention(AdaLN(x)); w += a2·FFN(AdaLN(w)); out = x + a3·w."""

    def __init__(self, config: R2IDConfig, attention_dropout: float, ffn_dropout: float):
        super().__init__()
        d = config.width
        self.attention_norm = AdaLN(d, config.film_dim)
        self.attention = LinearAttention(d, config.heads, attention_dropout)
        self.attention_scale = scale(d, 1.0)
        self.ffn_norm = AdaLN(d, config.film_dim)
        self.ffn = FFN(d, ffn_dropout)
        self.ffn_scale = scale(d, 1.0)
        self.block_scale = scale(d, 0.1)

    def attend_self(self, x: Tensor, film: Tensor) -> Tensor:
        normed = self.attention_norm(x, film)
        return x + self.attention_scale * self.attention(normed, normed)

    def finish(self, x: Tensor, w: Tensor, film: Tensor) -> Tensor:
        w = w + self.ffn_scale * self.ffn(self.ffn_norm(w, film))
        return x + self.block_scale * w

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        return self.finish(x, self.attend_self(x, film), film)


class DecoderBlock(EncoderBlock):
    """The encoder block with a cross-attention to the text tokens between its two halves."""

    def __init__(
        self,
        config: R2IDConfig,
        attention_dropout: float,
        cross_dropout: float,
        ffn_dropout: float,
    ):
        super().__init__(config, attention_dropout, ffn_dropout)
        self.cross_norm = AdaLN(config.width, config.film_dim)
        self.cross = LinearAttention(config.width, config.heads, cross_dropout)
        self.cross_scale = scale(config.width, 1.0)

    def decode(self, x: Tensor, film: Tensor, text: Tensor) -> Tensor:
        """Tokens `[B, N, d]`, film `[B, f]`, text `[B, T, d]` -> `[B, N, d]`."""
        w = self.attend_self(x, film)
        w = w + self.cross_scale * self.cross(self.cross_norm(w, film), text)
        return self.finish(x, w, film)


class R2ID(nn.Module):
    """The denoiser: encoder blocks run once, decoder blocks once per condition."""

    def __init__(
        self,
        config: R2IDConfig,
        attention_dropout: float = 0.0,
        cross_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ):
        super().__init__()
        d = config.width
        self.config = config
        self.position = PositionFeatures(config.high_frequencies, config.low_frequencies)
        counts = config.time_high_frequencies, config.time_low_frequencies
        self.time = TimeFeatures(*counts, short=2e-6)
        features = 8 * (config.high_frequencies + config.low_frequencies)
        time_features = 2 * (config.time_high_frequencies + config.time_low_frequencies)
        self.film = nn.Sequential(
            nn.Linear(time_features, config.film_dim),
            nn.SiLU(),
            nn.Linear(config.film_dim, config.film_dim),
            nn.SiLU(),
        )
        self.latent_in = nn.Linear(config.latent_channels + features, d)
        self.encoder = nn.ModuleList(
            EncoderBlock(config, attention_dropout, ffn_dropout)
            for _ in range(config.encoder_blocks)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(config, attention_dropout, cross_dropout, ffn_dropout)
            for _ in range(config.decoder_blocks)
        )
        self.eps_out = nn.Linear(d, config.latent_channels)

    def forward(self, x: Tensor, alpha_bar: Tensor, text: Tensor) -> Tensor:
        """Predict eps.

        Noisy latent x `[B, C, H, W]`, alpha_bar `[B]` in [0, 1], text tokens `[K, B, T, d]`
        -> `[K, B, C, H, W]`.
        """
        height, width = x.shape[-2:]
        at = grid_tokens(height, width, x.device)
        return grid_from_tokens(
            self.predict_tokens(tokens_from_grid(x), at, alpha_bar, text), height, width
        )

    def predict_tokens(self, x: Tensor, at: Tensor, alpha_bar: Tensor, text: Tensor) -> Tensor:
        """Tokens `[B, N, C]` at coordinates `[1 or B, N, 4]` -> eps `[K, B, N, C]`."""
        position = self.position(at).expand(x.shape[0], -1, -1)
        tokens = self.latent_in(torch.cat([x, position], -1))  # [B, N, d]
        film = self.film(self.time(alpha_bar))  # [B, f]
        for block in self.encoder:
            tokens = block(tokens, film)
        branches = text.shape[0]
        tokens = tokens.repeat(branches, 1, 1)  # [K·B, N, d]
        film = film.repeat(branches, 1)
        text = text.flatten(0, 1)  # [K·B, T, d]
        for block in self.decoder:
            tokens = block.decode(tokens, film, text)
        return self.eps_out(tokens).unflatten(0, (branches, -1)).float()
