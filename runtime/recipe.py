"""What made a picture, as its file keeps it: read with a range for every number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from runtime import cli
from runtime.bundle.interface import Count
from runtime.errors import ArtefactError
from runtime.sampling.choices import SOLVERS, SPACINGS, WHOLE
from runtime.sampling.labels import Label

MOST_IMAGES = 100_000
BEFORE = {"solver": "ddim", "spacing": "time", "guidance_interval": WHOLE}
Place = Annotated[int, Meta(ge=0, le=10_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
LabelNumber = Annotated[int, Meta(ge=0, le=999_999)]
Weight = Annotated[float, Meta(ge=-1e6, le=1e6)]
# `7`, `[7, 11]` of two parts, `{"7:11": 0.5}`: see `label_to_json`.
Combination = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}(:[0-9]{1,6}){0,7}\Z")]
Numbers = Annotated[list[LabelNumber], Meta(min_length=2, max_length=8)]
WrittenLabel = LabelNumber | None | Numbers | dict[Combination, Weight]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # SHA-256 of a file
Byte = Annotated[int, Meta(ge=0, le=255)]
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
    # What files from before there were edits, and other kinds of files, do not name.
    init: Digest | None = None
    mask: Digest | None = None
    strength: Share | None = None
    seam: Place | None = None
    ground: tuple[Byte, Byte, Byte] | None = None
    quality: Annotated[int, Meta(ge=1, le=100)] | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval {low}..{high} is empty")
        if self.mask is not None and self.init is None:
            raise ValueError("a mask without the picture that it is of")


def repeated(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The request in a picture's metadata; raises ArtefactError where it is not whole.

    A picture that names no solver was drawn before there was a choice: by DDIM.
    """
    made = metadata.get("request")
    if isinstance(made, dict) and "solver" not in made:
        made = BEFORE | made
    try:
        return read_recipe(made)
    except msgspec.ValidationError as error:
        raise ArtefactError(
            f"{path}: its metadata holds no whole request ({error}); expected a picture made by "
            "runtime.generate, unaltered"
        ) from None


def made_in(path: Path, metadata: dict[str, Any]) -> str:
    """The precision that a picture was drawn in; raises ArtefactError where there is none such."""
    precision = metadata.get("precision")
    if precision not in cli.PRECISIONS:
        raise ArtefactError(
            f"{path}: its metadata names precision {precision!r}; expected one of "
            f"{', '.join(cli.PRECISIONS)}. Choose one with --precision"
        )
    return str(precision)


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
