"""SiD2's configuration: the numbers that fix every tensor's shape, and its noise schedule."""

from typing import Literal

from reference.families.parts.config import Count, Positive, Section, Share, Size


class SiD2Config(Section, frozen=True):
    """One entry per level from the image side on; the last level is the middle.

    `blocks` each way of all levels but the middle, `groups` of the group norms, `cond` width of
    the condition, `time_features` frequencies of the log SNR.
    """

    channels: Count
    patch: Count
    widths: tuple[Count, ...]
    types: tuple[Literal["res", "transformer"], ...]
    blocks: tuple[Count, ...]
    mid_blocks: Count
    dropouts: tuple[Share, ...]
    head_dim: Count
    groups: Count
    cond: Count
    time_features: Count
    classes: Count

    def __post_init__(self) -> None:
        levels = len(self.widths)
        counts = (len(self.types), len(self.dropouts), len(self.blocks) + 1)
        if levels == 0 or set(counts) != {levels}:
            raise ValueError(
                f"{levels} widths with {counts[0]} types, {counts[1]} dropouts and {counts[2] - 1} "
                "blocks; expected one of each per level, and blocks for all but the last"
            )
        if self.head_dim % 4 or self.head_dim < 8 or self.time_features < 2:
            raise ValueError(
                f"head_dim {self.head_dim}, time_features {self.time_features}; expected a "
                "multiple of 4 from 8 on, and 2 features at least"
            )
        for width, kind in zip(self.widths, self.types, strict=True):
            # The output is normalised in groups too, at the first level's width.
            divisor = self.groups if kind == "res" else self.head_dim
            if width % divisor or self.widths[0] % self.groups:
                raise ValueError(f"width {width} is no multiple of {divisor}")


class ScheduleConfig(Section, frozen=True):
    """The shifted cosine schedule: sides of the square pictures that noise is measured by."""

    noise_low: Positive
    noise_high: Positive
    logsnr_min: float
    logsnr_max: float


class SiD2Model(Section, frozen=True):
    """One checkpoint's model, its schedule and the image size that it was trained at."""

    name: str
    sid2: SiD2Config
    schedule: ScheduleConfig
    default_size: Size

    @property
    def channels(self) -> int:
        return self.sid2.channels

    @property
    def labels(self) -> int:
        return self.sid2.classes

    @property
    def multiple(self) -> int:
        """What height and width are multiples of, so that halving and doubling agree."""
        return self.sid2.patch << (len(self.sid2.widths) - 1)

    @property
    def minimum(self) -> int:
        """The least height and width: two tokens in the middle."""
        return 2 * self.multiple
