"""What a checkpoint's provenance says: the sizes that it saw, the parts of its labels."""

from collections.abc import Mapping
from typing import Any

from runtime.bundle.interface import Trained


def latent_stages(provenance: Mapping[str, Any]) -> tuple[list[tuple[int, int]], float] | None:
    """The lowest and highest side of each stage of a diffuser's training, and its largest aspect.

    None where the configuration does not say. `latent` in the last section that names it is
    the range of sides, or a list of stages that each end at a share of the steps: `[4, 16]` or
    `[[0.7, 4, 8], [1.0, 4, 16]]`; `aspect` bounds longer over shorter. Where pixels are diffused,
    `size` has stages of a height and a width, and without either all is `default_size`.
    """
    sections = [own for own in provenance.get("config", {}).values() if isinstance(own, dict)]
    named = [own for own in sections if isinstance(own.get("latent"), list)]
    if not named:
        sized = [own["size"] for own in sections if isinstance(own.get("size"), list)]
        sized += [[[1.0, *own["default_size"]]] for own in sections if "default_size" in own]
        sides = [(min(size), max(size)) for _, *size in sized[0]] if sized else []
        return (sides, max(high / low for low, high in sides)) if sides else None
    latent = named[-1]["latent"]
    stages = latent if isinstance(latent[0], list) else [latent]
    return [(low, high) for *_, low, high in stages], float(named[-1].get("aspect", 1))


def trained_range(provenance: Mapping[str, Any]) -> Trained | None:
    """The range of all stages; None where the provenance does not say."""
    if (found := latent_stages(provenance)) is None:
        return None
    ranges, aspect = found
    return Trained(min(low for low, _ in ranges), max(high for _, high in ranges), aspect)


def label_parts(provenance: Mapping[str, Any]) -> tuple[int, ...]:
    """How many of a checkpoint's labels each part of a condition has; () for one part."""
    parts = tuple(provenance.get("parts", ()))
    return parts if len(parts) > 1 else ()


def picture_side(provenance: Mapping[str, Any]) -> int | None:
    """The side that the pictures of a data set were cropped to in training; None if not said."""
    side = provenance.get("config", {}).get("image")
    return side if isinstance(side, int) else None
