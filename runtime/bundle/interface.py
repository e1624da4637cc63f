"""What a bundle draws, as far as a request needs it: names, channels, legal sizes, the schedule."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

from msgspec import Meta, Struct

from runtime.errors import UsageError

LARGEST = 1 << 20  # no side, count or channel of a real model comes near; stops absurd allocations
Count = Annotated[int, Meta(ge=1, le=LARGEST)]
# Letters of any script, without control characters.
Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Size = tuple[int, int]  # height, width
Scale = Annotated[float, Meta(ge=-100, le=100)]
GUIDANCE = 2.0  # the scale where neither a request nor its bundle names one
FAR = 1.25  # times what training saw


class Range(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Legal values of an axis: the multiples of `multiple` from `minimum` to `maximum`."""

    minimum: Count
    maximum: Count
    multiple: Count = 1

    def __post_init__(self) -> None:
        ends = self.minimum, self.maximum
        if self.minimum > self.maximum or any(end % self.multiple for end in ends):
            raise ValueError(f"{self} is empty, or an end of it is no multiple")

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value <= self.maximum and value % self.multiple == 0

    def __str__(self) -> str:
        of = f", multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.minimum} to {self.maximum}{of}"

    def nearest(self, value: int) -> int:
        """The legal value nearest to `value`, the larger one of two."""
        rounded = (2 * value + self.multiple) // (2 * self.multiple) * self.multiple
        return min(max(rounded, self.minimum), self.maximum)

    def check(self, size: Size, name: str) -> None:
        """Raise UsageError where a side of `size`, the option `name`, is not legal."""
        if size[0] not in self or size[1] not in self:
            nearest = size_name((self.nearest(size[0]), self.nearest(size[1])))
            raise UsageError(
                f"{name} {size_name(size)}: expected sides of {self}; the nearest legal size is "
                f"{nearest}. Pass --{name} {nearest}"
            )


class Trained(Struct, frozen=True, forbid_unknown_fields=True):
    """What a model has seen: the latent's shortest and longest side, and the largest aspect."""

    shortest: Count
    longest: Count
    aspect: Annotated[float, Meta(ge=1, le=LARGEST)]

    def includes(self, latent: Size, times: float = 1.0) -> bool:
        """Whether `latent` is like what was seen, or within `times` of it in size and aspect."""
        shorter, longer = sorted(latent)
        within = self.shortest <= shorter * times and longer <= self.longest * times
        return within and longer <= self.aspect * times * shorter


class CosineData(Struct, frozen=True, tag_field="name", tag="cosine", forbid_unknown_fields=True):
    """alpha_bar(t) = cos²((t + offset) / (1 + offset) · π/2), not below `floor`."""

    offset: Annotated[float, Meta(ge=0, le=1)] = 0.008
    floor: Annotated[float, Meta(gt=0, lt=1)] = 1e-6


class ShiftedCosineData(
    Struct, frozen=True, tag_field="name", tag="shifted_cosine", forbid_unknown_fields=True
):
    """log-SNR(t) of a cosine schedule from `logsnr_max` to `logsnr_min`, moved by the size.

    By 2 · ln(side / sqrt(H · W)) for an image of H × W, the side going from `noise_high` at t = 0
    to `noise_low` at t = 1. alpha_bar is not below `floor`.
    """

    noise_low: Annotated[float, Meta(gt=0, le=LARGEST)]
    noise_high: Annotated[float, Meta(gt=0, le=LARGEST)]
    logsnr_min: Annotated[float, Meta(ge=-100, le=100)]
    logsnr_max: Annotated[float, Meta(ge=-100, le=100)]
    floor: Annotated[float, Meta(gt=0, lt=1)] = 1e-6

    def __post_init__(self) -> None:
        if self.logsnr_min >= self.logsnr_max or self.noise_low > self.noise_high:
            raise ValueError(
                f"log-SNR of {self.logsnr_min} to {self.logsnr_max}, noise of sides "
                f"{self.noise_low} to {self.noise_high}; expected both to rise"
            )


class KarrasData(Struct, frozen=True, tag_field="name", tag="karras", forbid_unknown_fields=True):
    """alpha_bar = 1 / (1 + sigma²), sigma^(1/rho) even in t from `sigma_min` to `sigma_max`."""

    sigma_min: Annotated[float, Meta(gt=0, le=LARGEST)]
    sigma_max: Annotated[float, Meta(gt=0, le=LARGEST)]
    rho: Annotated[float, Meta(ge=1, le=100)] = 7.0

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma of {self.sigma_min} to {self.sigma_max}; expected it to rise")


ScheduleData = CosineData | ShiftedCosineData | KarrasData  # each is in `sampling.schedule`


class Interface(Struct, frozen=True, forbid_unknown_fields=True):
    """What a program needs of a model. Sides are ranges of a height and a width alike.

    `labels` has a name per condition, none where a model is unconditional; `parts` says how many
    of them, in their order, belong to each part that a condition can have one label of. None given
    is one part. `pixels_per_latent`: image pixels per latent cell along each side. `guidance_scale`
    is what a request that names none is drawn with. `decoupled`: a
    resampler draws images of any legal size from latents of any legal size, and back; else pixels
    are diffused.
    """

    name: Text
    color_channels: Count
    latent_channels: Count
    labels: tuple[Text, ...]
    default_latent: tuple[Count, Count]
    pixels_per_latent: Count
    latent_sides: Range
    image_sides: Range
    decoupled: bool
    trained: Trained | None = None
    parts: tuple[Count, ...] = ()
    guidance_scale: Scale = GUIDANCE

    def __post_init__(self) -> None:
        if self.parts and sum(self.parts) != len(self.labels):
            raise ValueError(
                f"parts are {list(self.parts)}; expected them to add up to the "
                f"{len(self.labels)} labels"
            )
        if any(side not in self.latent_sides for side in self.default_latent):
            raise ValueError(
                f"default_latent is {list(self.default_latent)}; expected sides of "
                f"{self.latent_sides}"
            )
        pixels = self.pixels_per_latent == 1 and self.latent_channels == self.color_channels
        if not self.decoupled and not pixels:
            raise ValueError(
                "decoupled is false, so that pixels are diffused; expected as many latent as "
                "colour channels and 1 pixel per latent cell"
            )

    @property
    def first_part(self) -> range:
        """The numbers of the labels of the first part: what is drawn where no label is given."""
        return range(self.parts[0] if self.parts else len(self.labels))

    def image_size(self, latent: Size) -> Size:
        """The image size that a latent of this size was trained to decode to."""
        return latent[0] * self.pixels_per_latent, latent[1] * self.pixels_per_latent

    def latent_size(self, image: Size) -> Size:
        """The legal latent size nearest to what an image of this size was trained to encode to."""
        height, width = (
            self.latent_sides.nearest(round(side / self.pixels_per_latent)) for side in image
        )
        return height, width

    def latent_of_picture(self, picture: Size) -> Size:
        """The legal latent in which a picture of any size is edited, if none is asked for.

        Of its aspect, and as large as the default one; where pixels are diffused as large as the
        picture, or the largest legal.
        """
        cells = math.prod(self.default_latent)
        scale = math.sqrt(cells / math.prod(picture))
        if not self.decoupled:
            scale = min(1.0, self.latent_sides.maximum / max(picture))
        height, width = (self.latent_sides.nearest(round(side * scale)) for side in picture)
        return height, width

    def check_image(self, latent: Size, image: Size) -> None:
        """Raise UsageError where no image of size `image` can be drawn of a latent of `latent`."""
        if self.decoupled:
            self.image_sides.check(image, "image")
        elif image != self.image_size(latent):
            raise UsageError(
                f"image {size_name(image)}: {self.why_coupled}; expected "
                f"{size_name(self.image_size(latent))} for the latent {size_name(latent)}. "
                "Leave --image out, or choose another --latent"
            )

    @property
    def why_coupled(self) -> str:
        """Why an image's size follows from the latent's."""
        return f"{self.name} diffuses pixels and has no resampler"

    def warning(self, latent: Size) -> str | None:
        """What a user should know of a legal size far outside of what the model has seen."""
        if self.trained is None or self.trained.includes(latent, FAR):
            return None
        low, high, most = self.trained.shortest, self.trained.longest, self.trained.aspect
        return (
            f"{self.name} was trained on latents with sides of {low} to {high} and aspects up to "
            f"{most:g}; {size_name(latent)} is far outside of that and may look worse"
        )


def check_size(name: str, size: Any) -> None:
    """Raise UsageError where `size`, the argument `name`, is no (height, width)."""
    pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if not pair or not all(isinstance(side, Integral) for side in size):
        raise UsageError(
            f"{name} is {size!r}; expected (height, width) in whole numbers, as in (16, 9)"
        )


def size_name(size: Size) -> str:
    """A size as command lines read it: HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"
