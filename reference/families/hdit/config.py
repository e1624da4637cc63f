"""HDiT's configuration: the numbers that fix every tensor's shape, and the sizes it can draw."""

import math
from typing import Literal

from reference.families.parts.config import Count, CountOrNone, Positive, Section, Share, Size


class Level(Section, frozen=True):
    """`depth` layers each way of one width; `window`: side of a neighbourhood or window, else 0."""

    width: Count
    depth: Count
    d_ff: Count
    attention: Literal["global", "neighborhood", "shifted-window", "none"]
    head_dim: Count
    window: CountOrNone
    dropout: Share

    def __post_init__(self) -> None:
        if self.width % self.head_dim or self.head_dim % 8:
            raise ValueError(
                f"head_dim {self.head_dim} of width {self.width}; expected a multiple of 8 that "
                "divides the width"
            )
        if (self.attention in ("neighborhood", "shifted-window")) != (self.window > 0):
            raise ValueError(f"window {self.window} with {self.attention} attention")


class HDiTConfig(Section, frozen=True):
    """The numbers that fix every tensor's shape; patch is (height, width), classes 0 for none."""

    channels: Count
    patch: Size
    levels: tuple[Level, ...]
    classes: CountOrNone
    mapping_width: Count
    mapping_depth: CountOrNone
    mapping_d_ff: Count
    mapping_cond_dim: CountOrNone
    mapping_dropout: Share
    sigma_data: Positive

    def __post_init__(self) -> None:
        if not self.levels or self.mapping_width % 2:
            raise ValueError(
                f"{len(self.levels)} levels and mapping_width {self.mapping_width}; expected a "
                "level at least and an even width"
            )


class HDiTModel(Section, frozen=True):
    """One checkpoint's model, its noise levels and the image size that it was trained at."""

    name: str
    hdit: HDiTConfig
    sigma_min: Positive
    sigma_max: Positive
    default_size: Size

    @property
    def channels(self) -> int:
        return self.hdit.channels

    @property
    def labels(self) -> int:
        return self.hdit.classes

    @property
    def multiple(self) -> int:
        """What height and width are multiples of: whole patches, merges and windows."""
        patch = math.lcm(*self.hdit.patch)
        sides = [patch << (len(self.hdit.levels) - 1)]
        for depth, level in enumerate(self.hdit.levels):
            if level.attention == "shifted-window":
                sides.append((patch << depth) * level.window)
        return math.lcm(*sides)

    @property
    def minimum(self) -> int:
        """The least height and width: a neighbourhood is not smaller than its kernel."""
        patch, multiple = math.lcm(*self.hdit.patch), self.multiple
        least = max((patch << depth) * level.window for depth, level in enumerate(self.hdit.levels))
        return max(1, -(-least // multiple)) * multiple
