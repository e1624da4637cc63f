"""What made a picture, as its PNG keeps it: read with a range for every number."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from runtime.bundle.interface import Count
from runtime.sampling.choices import SOLVERS, SPACINGS
from runtime.sampling.labels import Label

MOST_IMAGES = 100_000
Place = Annotated[int, Meta(ge=0, le=10_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
LabelNumber = Annotated[int, Meta(ge=0, le=999_999)]
Weight = Annotated[float, Meta(ge=-1e6, le=1e6)]
# `7`, `[7, 11]` of two parts, `{"7:11": 0.5}`: see `label_to_json`.
Combination = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}(:[0-9]{1,6}){0,7}\Z")]
Numbers = Annotated[list[LabelNumber], Meta(min_length=2, max_length=8)]
WrittenLabel = LabelNumber | None | Numbers | dict[Combination, Weight]
Steps = Annotated[int, Meta(ge=1, le=10_000)]


class Recipe(Struct, frozen=True):
    """The request of `runtime.generate`, by the names that its options have."""

    label: Annotated[list[WrittenLabel], Meta(min_length=1, max_length=MOST_IMAGES)]
    count: Annotated[int, Meta(ge=1, le=10_000)]
    latent: tuple[Count, Count]
    image: tuple[Count, Count]
    crop: tuple[Place, Place, Place, Place] | None
    exact: bool
    solver: Literal[tuple(SOLVERS)]  # type: ignore[valid-type]
    spacing: Literal[tuple(SPACINGS)]  # type: ignore[valid-type]
    steps: Steps
    guidance: Annotated[float, Meta(ge=-100, le=100)]
    guidance_interval: tuple[Share, Share]
    eta: Annotated[float, Meta(ge=0, le=10)]
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    first_index: Annotated[int, Meta(ge=0, le=1 << 40)]
    noise: Literal["coherent", "independent"]
    continue_at: tuple[Count, Count] | None
    continue_from: Steps | None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval {low}..{high} is empty")


def read_recipe(content: Any) -> dict[str, Any]:
    """A request out of decoded JSON; raises msgspec.ValidationError naming what is wrong in it."""
    recipe = msgspec.structs.asdict(msgspec.convert(content, Recipe, str_keys=True))
    return recipe | {"label": [*map(label_from_json, recipe["label"])]}


def label_to_json(label: Label) -> Any:
    """A label by numbers as metadata has it: `7`, `[7, 11]` of two parts, `{"7:11": 0.5}`."""
    if not isinstance(label, Mapping):
        return label
    keys = (":".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in label)
    return dict(zip(keys, label.values(), strict=True))


def label_from_json(label: Any) -> Label:
    """What `label_to_json` made."""
    if isinstance(label, dict):
        return {_numbers(key.split(":")): float(weight) for key, weight in label.items()}
    if isinstance(label, list):
        return _numbers(label)
    return None if label is None else int(label)


def _numbers(each: list[Any]) -> int | tuple[int, ...]:
    return int(each[0]) if len(each) == 1 else tuple(map(int, each))
