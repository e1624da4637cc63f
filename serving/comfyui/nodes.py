"""ComfyUI's nodes around a bundle: open, draw, edit, resample. Written in its V3 schema.

The one place where torch is imported to serve: ComfyUI's IMAGE is a torch tensor float32
`[B, h, w, 3]` in [0, 1], its MASK `[B, h, w]`. Sizes are two inputs, height and width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import ComfyAPISync, ComfyExtension, io
from numpy.typing import NDArray
from PIL import Image

from runtime import Bundle, EngineOptions, open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.interface import Size
from runtime.bundle.manifest import FILE_NAME, find_bundle
from runtime.images.pixels import to_uint8
from runtime.pipeline.diffuser import Progress
from runtime.providers import PROVIDERS
from runtime.sampling.labels import Label, Labels
from runtime.sampling.request import STRENGTH, Request

Floats = NDArray[np.float32]
OPENED = io.Custom("R2_BUNDLE")
CATEGORY = "R2"
MOST_PIXELS = 1 << 15  # of a side, for the widgets; the bundle says what it draws
PREVIEW = 256  # pixels of the longer side
# Of ITU-R BT.601, as Pillow turns RGB to grey.
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def to_pixels(image: torch.Tensor, channels: int) -> Floats:
    """An IMAGE `[B, h, w, 3 or 4]` as float32 `[B, c, h, w]` in [-1, 1]; alpha is dropped."""
    rgb = np.asarray(image.cpu(), np.float32)[..., :3]
    colours = rgb if channels == 3 else (rgb @ GREY)[..., None]
    return np.ascontiguousarray(colours.transpose(0, 3, 1, 2)) * 2 - 1


def to_image(pixels: Floats) -> torch.Tensor:
    """Pixels `[B, 1 or 3, h, w]` in [-1, 1] as an IMAGE `[B, h, w, 3]`, grey in all three."""
    unit = np.clip(pixels.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(np.broadcast_to(unit, (*unit.shape[:3], 3))))


def optional(first: int, second: int) -> Size | None:
    """A size, or None where both numbers are 0; one alone is refused by what checks sizes."""
    return (first, second) if first or second else None


def preview_size(size: Size) -> Size:
    """The size of a preview: its longer side is PREVIEW at most."""
    scale = min(1.0, PREVIEW / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def tell(value: float, most: float, preview: Image.Image | None = None) -> None:
    """Move the node's progress bar; raises ComfyUI's exception where its user interrupts."""
    throw_exception_if_processing_interrupted()
    ComfyAPISync().execution.set_progress(value, most, preview_image=preview)


def listed(bundle: Bundle, text: str) -> list[Label]:
    """The labels of a text as `--label` takes it."""
    return Labels(bundle.interface.labels, bundle.interface.parts).listed(text)


def decoded(bundle: Bundle, latents: Floats, size: Size) -> Floats:
    """Latents `[B, C, H, W]` as pixels `[B, c, *size]`; may be interrupted after each band."""
    state = bundle.state(latents)
    images = np.empty((len(latents), bundle.interface.color_channels, *size), np.float32)
    for index, image in enumerate(images):
        top = 0
        for band in bundle.resampler.draw(state, size, index=index):
            image[:, top : top + band.shape[1]] = band
            top += band.shape[1]
            tell(index * size[0] + top, len(images) * size[0])
    return images


def diffused(bundle: Bundle, request: Request) -> torch.Tensor:
    """A request's images as an IMAGE, with a preview of its first after each step."""
    bundle.check(request)
    size = request.drawn_size(bundle.interface)
    small = preview_size(size)

    def on_step(progress: Progress) -> None:
        first = to_uint8(progress.decode(small))[0]
        tell(progress.step, progress.steps, Image.fromarray(first.squeeze()))

    with bundle.opening(request):
        throw_exception_if_processing_interrupted()
    images = decoded(bundle, bundle.diffuse(request, on_step), size)
    kept = bundle.kept(request, size)
    return to_image(images if kept is None else kept.paste(images))


def side(name: str, tooltip: str, default: int = 0, least: int = 0) -> Any:
    return io.Int.Input(name, default=default, min=least, max=MOST_PIXELS, tooltip=tooltip)


def sampling() -> list[Any]:
    """The inputs that drawing and editing share: how, and how large."""
    own = "0: what the command line takes by default"
    return [
        io.String.Input("labels", default="none", tooltip="as --label takes them: 7, 0-9, 3+8"),
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("steps", default=0, min=0, max=10_000, tooltip="0: the solver's own"),
        io.Float.Input("guidance_scale", default=2.0, min=-100.0, max=100.0, step=0.1),
        side("height", f"of the picture, in pixels; {own}"),
        side("width", f"of the picture, in pixels; {own}"),
        side("latent_height", f"in cells; {own}"),
        side("latent_width", f"in cells; {own}"),
    ]


def drawn(
    bundle: Bundle, labels: list[Label], edit: dict[str, Any], **inputs: Any
) -> io.NodeOutput:
    """Draw what the inputs of `sampling` ask for; `edit` is what a `Request` takes of an edit."""
    latent = optional(inputs.pop("latent_height"), inputs.pop("latent_width"))
    image = optional(inputs.pop("height"), inputs.pop("width"))
    steps = inputs.pop("steps") or None
    own = latent or bundle.default_latent(edit.get("init"))
    return io.NodeOutput(diffused(bundle, Request(labels, own, image, steps, **inputs, **edit)))


class OpenBundle(io.ComfyNode):
    """A bundle, kept open with its weights for all that runs on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="R2OpenBundle",
            display_name="Open bundle",
            category=CATEGORY,
            inputs=[
                io.String.Input("path", default="", tooltip="a bundle's folder, or a file in it"),
                io.Combo.Input("provider", options=list(PROVIDERS), default="cpu"),
            ],
            outputs=[OPENED.Output("bundle")],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str, provider: str) -> str:
        """ComfyUI opens a bundle anew when this changes: the manifest has each file's hash."""
        return sha256((find_bundle(Path(path)) / FILE_NAME).read_bytes())

    @classmethod
    def execute(cls, path: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(open_bundle(path, EngineOptions(provider)))


class Draw(io.ComfyNode):
    """One picture per label, at any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="R2Draw",
            display_name="Draw",
            category=CATEGORY,
            inputs=[OPENED.Input("bundle"), *sampling()],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, bundle: Bundle, labels: str, **inputs: Any) -> io.NodeOutput:
        return drawn(bundle, listed(bundle, labels), {}, **inputs)


class Edit(io.ComfyNode):
    """Pictures drawn anew from a strength on, within a mask if there is one.

    One picture is edited once per label, several pictures by one label or by one each.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = "noise to begin with: 0 keeps the picture, 1 draws anew"
        return io.Schema(
            node_id="R2Edit",
            display_name="Edit",
            category=CATEGORY,
            inputs=[
                OPENED.Input("bundle"),
                io.Image.Input("image"),
                io.Float.Input(
                    "strength", default=STRENGTH, min=0.0, max=1.0, step=0.01, tooltip=strength
                ),
                *sampling(),
                io.Mask.Input("mask", optional=True, tooltip="1 is drawn anew, 0 is kept"),
            ],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(
        cls,
        bundle: Bundle,
        image: torch.Tensor,
        strength: float,
        labels: str,
        mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> io.NodeOutput:
        init = to_pixels(image, bundle.interface.color_channels)
        wanted = listed(bundle, labels)
        if len(wanted) == 1:
            wanted *= len(init)
        edit: dict[str, Any] = {"init": init, "strength": strength}
        if mask is not None:
            edit["mask"] = np.asarray(mask.cpu(), np.float32)[:, None]
        return drawn(bundle, wanted, edit, **inputs)


class Resample(io.ComfyNode):
    """Pictures at another size, through a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="R2Resample",
            display_name="Resample",
            category=CATEGORY,
            inputs=[
                OPENED.Input("bundle"),
                io.Image.Input("image"),
                side("height", "of the result, in pixels", 256, 1),
                side("width", "of the result, in pixels", 256, 1),
            ],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, bundle: Bundle, image: torch.Tensor, height: int, width: int) -> io.NodeOutput:
        size = height, width
        bundle.check_resample(size)
        pixels = to_pixels(image, bundle.interface.color_channels)
        throw_exception_if_processing_interrupted()
        between = bundle.latent_between((pixels.shape[2], pixels.shape[3]), size)
        return io.NodeOutput(to_image(decoded(bundle, bundle.encode(pixels, between), size)))


class Pack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OpenBundle, Draw, Edit, Resample]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls when it loads the folder."""
    return Pack()
