"""What a bundle cannot draw is refused before any engine is opened."""

from typing import Any

import numpy as np

from runtime.bundle.interface import Interface, Size
from runtime.errors import UsageError
from runtime.pipeline.diffuser import Diffuser
from runtime.pipeline.inputs import distinct
from runtime.sampling.request import Request

LARGEST_PIXEL = 8.0  # far above what a model overshoots [-1, 1] by, far below 255


def check_pixels(interface: Interface, pixels: Any, name: str = "pixels") -> None:
    """Raise UsageError for pixels that are not float32 `[B, c, h, w]` about [-1, 1]."""
    check_images(name, pixels, interface.color_channels)
    largest = max(float(pixels.max()), -float(pixels.min()))
    if not largest <= LARGEST_PIXEL:
        raise UsageError(
            f"{name} reach {largest:g}; expected values in [-1, 1]. Of 0 to 255 make them by "
            "pixels / 127.5 - 1"
        )


def check_images(name: str, values: Any, channels: int, low: int = -1) -> None:
    """Raise UsageError for what is no float32 `[B, channels, height, width]`, `name` in the error.

    None of the axes may be empty. `low`: the least of the values expected, for the error.
    """
    whole = isinstance(values, np.ndarray) and values.dtype == np.float32 and values.ndim == 4
    if not whole or values.shape[1] != channels or not values.size:
        found = (
            f"{values.dtype} {values.shape}"
            if isinstance(values, np.ndarray)
            else f"a {type(values).__name__}"
        )
        raise UsageError(
            f"{name} is {found}; expected float32 [batch, {channels}, height, width] in [{low}, 1]"
        )


def check_request(diffuser: Diffuser, request: Request, batch: int | None = None) -> None:
    """Raise UsageError for a request that the bundle cannot meet.

    `batch`: images drawn at once, where not all of them are.
    """
    manifest, resampler = diffuser.manifest, diffuser.resampler
    interface = manifest.interface
    if request.init is not None:
        check_pixels(interface, request.init, "init")
    request.check(interface)
    interface.latent_sides.check(request.latent, "latent")
    if request.continue_at is not None:
        interface.latent_sides.check(request.continue_at, "continue-at")
    image = request.drawn_size(interface)
    interface.check_image(request.largest, image)
    images = min(len(request.labels), batch or len(request.labels))
    for size in dict.fromkeys((request.latent, request.largest)):
        check_steps(diffuser, request, size, images)
    resampler.check_state(request.largest)
    resampler.check_draw(image)
    if request.continue_at is not None:
        resampler.check_enlarge(request.latent, request.continue_at, images)
    if request.init is not None:
        check_edit(diffuser, request, image)


def check_edit(diffuser: Diffuser, request: Request, image: Size) -> None:
    """Raise UsageError for a picture or a mask that images of a size cannot be edited by."""
    init, mask, count = request.init, request.mask, len(request.labels)
    assert init is not None
    for name, values in (("init", init), ("mask", mask)):
        if values is not None and name == "mask":
            check_images(name, values, 1, low=0)
        if values is not None and len(values) not in (1, count):
            raise UsageError(
                f"{name} holds {len(values)} pictures for {count} images; expected one for all, "
                "or one for each"
            )
    if request.begins_with_picture and diffuser.manifest.interface.decoupled:
        own = (init.shape[2], init.shape[3])
        diffuser.resampler.check_encode(own, request.latent, len(init))
    if mask is None:
        return
    low, high = float(mask.min()), float(mask.max())
    if not (low >= 0 and 0 < high <= 1):
        raise UsageError(
            f"mask has values from {low:g} to {high:g}; expected some in (0, 1], where the picture "
            "is drawn anew, and 0 where it is kept"
        )
    if (request.seam or 0) > min(image):
        raise UsageError(
            f"seam is {request.seam}; expected 0 to {min(image)}, the image's shorter side"
        )


def check_steps(diffuser: Diffuser, request: Request, latent: Size, images: int) -> None:
    """Raise UsageError where a graph of the diffuser cannot run a request at a latent size."""
    table = request.table(diffuser.schedule)
    if not len(table):
        return
    guidance = diffuser.guidance(request, table)
    rows, _ = distinct(guidance.conditions)
    counts = {len(guidance.branches(step)) for step in range(len(table))}
    sizes = {"height": latent[0], "width": latent[1], "batch": images}
    sizes["steps"] = len(table.alpha_bar)
    forms = {diffuser.engines.options.form}
    if diffuser.exact_steps(table):
        forms.add("fp32")
    for form in forms:  # each has a plan, and profiles, of its own
        for count in counts:
            own = sizes | {"conditions": count}
            diffuser.engines.check(diffuser.step_graph, own, form)
    for name in diffuser.kept:
        diffuser.engines.check(name, sizes | {"conditions": len(rows)})
