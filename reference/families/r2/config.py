"""What an R2 model is: the numbers that fix every tensor's shape."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from runtime.errors import ArtefactError

LARGEST = 1 << 16  # no field of a real model comes near; stops absurd allocations
Size = Annotated[int, Meta(ge=1, le=LARGEST)]
Count = Annotated[int, Meta(ge=0, le=LARGEST)]


class R2IRConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The resampler: image of any size ↔ latent of any size."""

    color_channels: Size
    latent_channels: Size
    width: Size
    encoder_blocks: Count
    decoder_blocks: Count
    heads: Size
    high_frequencies: Count
    low_frequencies: Count


class R2IDConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The diffusion model: predicts eps in the latent."""

    latent_channels: Size
    width: Size
    encoder_blocks: Count
    decoder_blocks: Count
    heads: Size
    high_frequencies: Count
    low_frequencies: Count
    time_high_frequencies: Count
    time_low_frequencies: Count
    film_dim: Size


class ConditionConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The label condition: `labels` classes, each embedded as `tokens` tokens."""

    labels: Size
    tokens: Size


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One checkpoint's models and the sizes it was trained around.

    `pixels_per_latent`: image pixels per latent cell along each side, the default decode size.
    """

    name: str
    r2ir: R2IRConfig
    r2id: R2IDConfig
    condition: ConditionConfig
    pixels_per_latent: Size
    default_latent: tuple[Size, Size]

    def __post_init__(self) -> None:
        ir, id_ = self.r2ir.latent_channels, self.r2id.latent_channels
        if ir != id_:
            raise ValueError(
                f"R2IR has {ir} latent channels but R2ID has {id_}; expected the same in both"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_json(cls, data: Any, source: str) -> "ModelConfig":
        """Read what `to_json` wrote; raises ArtefactError naming `source` and the key."""
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ArtefactError(f"{source}: no configuration of R2 ({error})") from None
