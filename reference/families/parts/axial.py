"""What SIID and S2ID share: a denoiser of axial transformer blocks over a grid of tokens.

Shapes: B batch, K conditions, H × W grid, V values per token, d width, A heads, T text tokens,
f film width. Tokens are `[B, H, W, d]`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.families.parts.attention import Attention, AxialAttention
from reference.families.parts.config import Count, CountOrNone, Section, Share
from reference.families.parts.embeddings import GridFeatures, TimeFeatures
from reference.families.parts.layers import FFN, scale
from reference.families.parts.models import Denoiser
from reference.families.parts.text import LabelCondition
from runtime.coordinates import grid

Masks = tuple[Tensor, Tensor]  # of the scores of rows [W, W] and of columns [H, H]


class AxialConfig(Section, frozen=True):
    """The numbers that fix every tensor's shape; `share_weights`: rows and columns have one set."""

    channels: Count
    width: Count
    encoder_blocks: CountOrNone
    decoder_blocks: CountOrNone
    heads: Count
    high_frequencies: CountOrNone
    low_frequencies: CountOrNone
    time_high_frequencies: CountOrNone
    time_low_frequencies: CountOrNone
    film_dim: Count
    share_weights: bool

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")


class Dropouts(Section, frozen=True):
    """Shares that training drops: of attention weights, and in the FFN after its SiLU."""

    attention: Share = 0.0
    ffn: Share = 0.0


NO_DROPOUTS = Dropouts()


class FilmNorm(nn.Module):
    """FN(x) = GroupNorm(x)·(1 + gamma) + beta with [gamma, beta] = Linear(film).

    The statistics are those of a group's channels over the whole grid.
    """

    def __init__(self, groups: int, width: int, film_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.film = nn.Linear(film_dim, 2 * width)
        nn.init.normal_(self.film.weight, std=1e-3)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Tokens `[B, H, W, d]`, film `[B, f]` -> `[B, H, W, d]`."""
        gamma, beta = self.film(film)[:, None, None].chunk(2, -1)  # [B, 1, 1, d] each
        normed = self.norm(x.movedim(-1, 1)).movedim(1, -1)
        return normed * (1 + gamma) + beta


class EncoderBlock(nn.Module):
    """w = x + a1·Axial(FN(x)); w += a3·FFN(FN(w)); out = x + a4·w."""

    def __init__(self, config: AxialConfig, dropouts: Dropouts):
        super().__init__()
        d, f = config.width, config.film_dim
        self.attention_norm = FilmNorm(config.heads, d, f)
        self.attention = AxialAttention(d, config.heads, dropouts.attention, config.share_weights)
        self.attention_scale = scale(d, 1.0)
        self.ffn_norm = FilmNorm(1, d, f)
        self.ffn = FFN(d, dropouts.ffn)
        self.ffn_scale = scale(d, 1.0)
        self.block_scale = scale(d, 0.1)

    def attend(self, x: Tensor, film: Tensor, masks: Masks | None = None) -> Tensor:
        normed = self.attention_norm(x, film)
        return x + self.attention_scale * self.attention(normed, *(masks or (None, None)))

    def finish(self, x: Tensor, w: Tensor, film: Tensor) -> Tensor:
        w = w + self.ffn_scale * self.ffn(self.ffn_norm(w, film))
        return x + self.block_scale * w

    def forward(self, x: Tensor, film: Tensor, masks: Masks | None = None) -> Tensor:
        return self.finish(x, self.attend(x, film, masks), film)


class DecoderBlock(EncoderBlock):
    """The encoder block with a cross-attention to the text tokens between its two halves."""

    def __init__(self, config: AxialConfig, dropouts: Dropouts):
        super().__init__(config, dropouts)
        self.cross_norm = FilmNorm(config.heads, config.width, config.film_dim)
        self.cross = Attention(config.width, config.heads, dropouts.attention)
        self.cross_scale = scale(config.width, 1.0)

    def decode(self, x: Tensor, film: Tensor, text: Tensor) -> Tensor:
        """Tokens `[B, H, W, d]`, film `[B, f]`, text `[B, T, d]` -> `[B, H, W, d]`."""
        w = self.attend(x, film)
        normed = self.cross_norm(w, film).flatten(1, 2)
        read = self.cross(normed, text).unflatten(1, x.shape[1:3])
        return self.finish(x, w + self.cross_scale * read, film)


class AxialDenoiser(nn.Module):
    """Predicts eps, `fold` × `fold` pixels being a token; one encoder run for all conditions."""

    encoder_block = EncoderBlock

    def __init__(self, config: AxialConfig, dropouts: Dropouts = NO_DROPOUTS, fold: int = 1):
        super().__init__()
        d, f, values = config.width, config.film_dim, config.channels * fold**2
        self.config, self.fold = config, fold
        self.position = GridFeatures(config.high_frequencies, config.low_frequencies)
        self.time = TimeFeatures(
            config.time_high_frequencies, config.time_low_frequencies, affine=True
        )
        features = 8 * (config.high_frequencies + config.low_frequencies)
        time_features = 2 * (config.time_high_frequencies + config.time_low_frequencies)
        self.film = nn.Sequential(
            nn.Linear(time_features, f), nn.SiLU(), nn.Linear(f, f), nn.SiLU()
        )
        self.color_in = nn.Linear(values + features, d)
        self.encoder = nn.ModuleList(
            self.encoder_block(config, dropouts) for _ in range(config.encoder_blocks)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(config, dropouts) for _ in range(config.decoder_blocks)
        )
        self.eps_out = nn.Linear(d, values)
        nn.init.zeros_(self.eps_out.weight)
        nn.init.zeros_(self.eps_out.bias)

    def forward(
        self, x: Tensor, alpha_bar: Tensor, text: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """Predict eps.

        Noisy image x `[B, C, H, W]`, alpha_bar `[B]` in [0, 1], text tokens `[K, B, T, d]`,
        coordinates of the tokens `[1 or B, h, w, 4]` (default: the grid's) -> `[K, B, C, H, W]`.
        """
        folded = F.pixel_unshuffle(x, self.fold).movedim(1, -1)  # [B, h, w, C·r²]
        at = coordinates(folded.shape[1], folded.shape[2], x.device) if at is None else at
        eps = self.predict_tokens(folded, at, alpha_bar, text).movedim(-1, 2)
        return F.pixel_shuffle(eps, self.fold)

    def masks(self, block: nn.Module, at: Tensor) -> Masks | None:
        """What an encoder block adds to its scores at coordinates `[1 or B, H, W, 4]`."""
        return None

    def encode(self, x: Tensor, at: Tensor, film: Tensor) -> Tensor:
        """Values `[B, H, W, V]` at coordinates `[1 or B, H, W, 4]` -> tokens `[B, H, W, d]`."""
        position = self.position(at).expand(len(x), -1, -1, -1)
        tokens = self.color_in(torch.cat([x, position], -1))
        for block in self.encoder:
            tokens = block(tokens, film, self.masks(block, at))
        return tokens

    def predict_tokens(self, x: Tensor, at: Tensor, alpha_bar: Tensor, text: Tensor) -> Tensor:
        """Values `[B, H, W, V]`, alpha_bar `[B]`, text `[K, B, T, d]` -> eps `[K, B, H, W, V]`."""
        film = self.film(self.time(alpha_bar))  # [B, f]
        tokens = self.encode(x, at, film)
        branches = len(text)
        tokens, film = tokens.repeat(branches, 1, 1, 1), film.repeat(branches, 1)
        text = text.flatten(0, 1)  # [K·B, T, d]
        for block in self.decoder:
            tokens = block.decode(tokens, film, text)
        return self.eps_out(tokens).unflatten(0, (branches, -1)).float()


def text_denoiser(
    model: AxialDenoiser, condition: LabelCondition, labels: Tensor, alpha_bar: NDArray[np.float64]
) -> Denoiser:
    """eps of step i at `alpha_bar[i]` under conditions `[K, B, labels]`, zero being null."""
    text = condition(labels)  # [K, B, T, d]
    levels = torch.from_numpy(alpha_bar).float().to(text.device)

    def denoise(x: Tensor, step: int) -> Tensor:
        eps: Tensor = model(x, levels[step].expand(len(x)), text)
        return eps

    return denoise


def coordinates(height: int, width: int, device: torch.device) -> Tensor:
    """Coordinates of a grid, `[1, height, width, 4]`."""
    return torch.from_numpy(grid(height, width)).unsqueeze(0).to(device)
