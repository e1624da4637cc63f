"""How a family's configuration is described, read and checked."""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from runtime.errors import ArtefactError

LARGEST = 1 << 16  # no field of a real model comes near; stops absurd allocations
Count = Annotated[int, Meta(ge=1, le=LARGEST)]
CountOrNone = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Size = tuple[Count, Count]  # height, width

T = TypeVar("T")


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a configuration: exactly its fields, each within its range."""


class TextConfig(Section, frozen=True):
    """The label condition: `labels` classes, each embedded as `tokens` tokens."""

    labels: Count
    tokens: Count


def read(kind: type[T], data: Any, source: str) -> T:
    """A [model] section as a `kind`; raises ArtefactError naming `source` and the field."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise ArtefactError(f"{source}: [model] {error}; compare with reference/configs") from None
