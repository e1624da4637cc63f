"""What an R2 model is: the numbers that fix every tensor's shape."""

from reference.families.parts.config import Count, CountOrNone, Section, Size, TextConfig
from runtime.bundle.interface import GUIDANCE, Scale


class R2IRConfig(Section, frozen=True):
    """The resampler: image of any size ↔ latent of any size."""

    color_channels: Count
    latent_channels: Count
    width: Count
    encoder_blocks: CountOrNone
    decoder_blocks: CountOrNone
    heads: Count
    high_frequencies: CountOrNone
    low_frequencies: CountOrNone


class R2IDConfig(Section, frozen=True):
    """The diffusion model: predicts eps in the latent."""

    latent_channels: Count
    width: Count
    encoder_blocks: CountOrNone
    decoder_blocks: CountOrNone
    heads: Count
    high_frequencies: CountOrNone
    low_frequencies: CountOrNone
    time_high_frequencies: CountOrNone
    time_low_frequencies: CountOrNone
    film_dim: Count


class ModelConfig(Section, frozen=True):
    """One checkpoint's models and the sizes it was trained around.

    `pixels_per_latent`: image pixels per latent cell along each side, the default decode size.
    `guidance_scale`: what it draws with where nothing else is asked for.
    """

    name: str
    r2ir: R2IRConfig
    r2id: R2IDConfig
    condition: TextConfig
    pixels_per_latent: Count
    default_latent: Size
    guidance_scale: Scale = GUIDANCE

    def __post_init__(self) -> None:
        for name, own in (("r2ir", self.r2ir), ("r2id", self.r2id)):
            if own.width % own.heads:
                raise ValueError(
                    f"{name}.width is {own.width}; expected a multiple of heads, {own.heads}"
                )
        ir, id_ = self.r2ir.latent_channels, self.r2id.latent_channels
        if ir != id_:
            raise ValueError(
                f"R2IR has {ir} latent channels but R2ID has {id_}; expected the same in both"
            )

    @property
    def channels(self) -> int:
        return self.r2ir.color_channels

    @property
    def labels(self) -> int:
        return self.condition.labels
