"""What a model is: the numbers that fix every tensor's shape and the schedule of its use."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime.errors import ArtefactError


@dataclass(frozen=True)
class R2IRConfig:
    """The resampler: image of any size ↔ latent of any size."""

    color_channels: int
    latent_channels: int
    width: int
    encoder_blocks: int
    decoder_blocks: int
    heads: int
    high_frequencies: int
    low_frequencies: int


@dataclass(frozen=True)
class R2IDConfig:
    """The diffusion model: predicts eps in the latent."""

    latent_channels: int
    width: int
    encoder_blocks: int
    decoder_blocks: int
    heads: int
    high_frequencies: int
    low_frequencies: int
    time_high_frequencies: int
    time_low_frequencies: int
    film_dim: int


@dataclass(frozen=True)
class ConditionConfig:
    """The label condition: `labels` classes, each embedded as `tokens` tokens."""

    labels: int
    tokens: int


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's models and the sizes it was trained around.

    `pixels_per_latent`: image pixels per latent cell along each side, the default decode size.
    """

    name: str
    r2ir: R2IRConfig
    r2id: R2IDConfig
    condition: ConditionConfig
    pixels_per_latent: int
    default_latent: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, source: str) -> "ModelConfig":
        """Read what `to_json` wrote; raises ArtefactError naming `source` and the key."""
        config = _build(cls, data, source, "model")
        if config.r2ir.latent_channels != config.r2id.latent_channels:
            raise ArtefactError(
                f"{source}: R2IR has {config.r2ir.latent_channels} latent channels but R2ID has "
                f"{config.r2id.latent_channels}; expected the same number in both"
            )
        return config


_SECTIONS = {"r2ir": R2IRConfig, "r2id": R2IDConfig, "condition": ConditionConfig}
_LARGEST = 1 << 16  # no field of a real model comes near; stops absurd allocations


def _build(cls: Any, data: Any, source: str, where: str) -> Any:
    names = [field.name for field in fields(cls)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ArtefactError(f"{source}: [{where}] has {found}; expected exactly {sorted(names)}")
    return cls(**{name: _value(name, data[name], source, where) for name in names})


def _value(name: str, value: Any, source: str, where: str) -> Any:
    if name in _SECTIONS:
        return _build(_SECTIONS[name], value, source, f"{where}.{name}")
    if name == "name" and isinstance(value, str):
        return value
    if name == "default_latent" and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_value("side", side, source, where) for side in value)
    least = 0 if name.endswith(("_blocks", "_frequencies")) else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ArtefactError(
            f"{source}: [{where}] {name} is {value!r}; expected an integer in {least}..{_LARGEST}"
        )
    return value
