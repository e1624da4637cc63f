"""`/sdapi/v1`: the slice of A1111's interface that its clients use.

Source of the shape: the project's own description at `/docs` of a running server.
"""

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.bundle.files import sha256
from runtime.errors import UsageError
from runtime.images.pixels import png_bytes, to_uint8
from runtime.sampling.choices import SOLVER, SOLVERS
from serving.asked import Asked
from serving.edits import Edit, from_base64, read_edit
from serving.encode import base64_of, preview_of
from serving.jobs import Job
from serving.limits import Limits
from serving.requests import answered, read_json
from serving.service import Service


class Overrides(Struct):
    """Options for one request."""

    sd_model_checkpoint: str | None = None


class TextToImage(Struct):
    """The body of txt2img; `cfg_scale` is guidance_scale, and a seed of -1 is one by lot."""

    prompt: str = ""
    seed: int = -1
    steps: int | None = None
    cfg_scale: float | None = None
    eta: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    override_settings: Overrides | None = None

    def asked(self, chosen: str) -> Asked:
        """By the runtime's names; `chosen` is the model where the request names none."""
        if (self.width is None) != (self.height is None):
            raise UsageError("one of width and height is missing; expected both, or neither")
        size = None
        if self.width is not None and self.height is not None:
            if min(self.width, self.height) < 1:
                raise UsageError(
                    f"width {self.width}, height {self.height}; expected numbers from 1"
                )
            size = self.height, self.width
        own = self.override_settings and self.override_settings.sd_model_checkpoint
        return Asked(
            self.prompt,
            own or chosen,
            self.batch_size * self.n_iter,
            size,
            None,
            self.steps,
            self.cfg_scale,
            self.eta,
            solver_of(self.sampler_name or self.sampler_index),
            None if self.seed == -1 else self.seed,
        )


def solver_of(name: str | None) -> str | None:
    """A solver by a sampler's name, as in "DPM++ 2M"; None for the default, which none means.

    Raises UsageError in the words of who asks.
    """
    plain = (name or "").lower().replace(" ", "")
    if plain in ("", "automatic"):
        return None
    if plain not in SOLVERS:
        raise UsageError(f"sampler_name is {name!r}; expected {' or '.join(SOLVERS)}")
    return plain


class ImageToImage(TextToImage, kw_only=True):
    """The body of img2img; a mask is drawn anew where it is white."""

    init_images: Annotated[list[str], Meta(min_length=1, max_length=1)]
    mask: str | None = None
    denoising_strength: float | None = None
    inpainting_mask_invert: int = 0

    def edit(self, channels: int, limits: Limits) -> Edit:
        """What is edited, and where."""
        image = from_base64("init_images", self.init_images[0])
        mask = None if self.mask is None else from_base64("mask", self.mask)
        found = read_edit(image, mask, channels, limits, self.denoising_strength, alpha=False)
        if mask is not None and self.inpainting_mask_invert:
            pixels = 1 - found.pixels["mask"]
            grey = to_uint8(pixels * 2 - 1)[0]
            hashes = found.hashes | {"mask": sha256(png_bytes(grey))}
            found = replace(found, pixels=found.pixels | {"mask": pixels}, hashes=hashes)
        return found


class State:
    """What this interface keeps between requests: the chosen model, and its jobs."""

    def __init__(self, service: Service):
        self.chosen = next(iter(service.models))
        self.jobs: list[Job] = []


async def text_to_image(request: Request) -> Response:
    """POST /sdapi/v1/txt2img."""
    body = await read_json(request, TextToImage)
    state: State = request.app.state.sdapi
    service: Service = request.app.state.service
    return await drawn(request, service.submit(body.asked(state.chosen)), body)


async def image_to_image(request: Request) -> Response:
    """POST /sdapi/v1/img2img."""
    body = await read_json(request, ImageToImage)
    state: State = request.app.state.sdapi
    service: Service = request.app.state.service
    asked = body.asked(state.chosen)
    channels = asked.chosen(service.models).interface.color_channels
    edit = await asyncio.to_thread(body.edit, channels, service.limits)
    body.init_images, body.mask = [], None  # said back to nobody
    return await drawn(request, service.submit(replace(asked, edit=edit)), body)


async def drawn(request: Request, job: Job, body: Struct) -> Response:
    """A job's pictures in A1111's answer; those that were done where it was interrupted."""
    state: State = request.app.state.sdapi
    service: Service = request.app.state.service
    state.jobs.append(job)
    try:
        found = await answered(request, job)
    finally:
        state.jobs.remove(job)
    pictures = [job.pictures[number] for number in found]
    files = await asyncio.to_thread(
        lambda: [
            base64_of(service.file(own, picture))
            for own, picture in zip(found.values(), pictures, strict=True)
        ]
    )
    first = job.pictures[0]
    info = {
        "prompt": getattr(body, "prompt", ""),
        "seed": first.seed,
        "all_seeds": [picture.seed for picture in pictures],
        "height": first.settings.image[0],
        "width": first.settings.image[1],
        "steps": first.settings.steps,
        "cfg_scale": first.settings.guidance_scale,
        "sampler_name": first.settings.solver,
        "sd_model_name": first.model.name,
        "batch_size": len(files),
        "infotexts": [msgspec.json.encode(picture.metadata).decode() for picture in pictures],
        "interrupted": job.interrupted,
    }
    return JSONResponse(
        {
            "images": files,
            "parameters": msgspec.to_builtins(body),
            "info": msgspec.json.encode(info).decode(),
        }
    )


async def sd_models(request: Request) -> Response:
    """GET /sdapi/v1/sd-models."""
    service: Service = request.app.state.service
    return JSONResponse(
        [
            {
                "title": name,
                "model_name": name,
                "hash": model.bundle.manifest.sha256[:10],
                "sha256": model.bundle.manifest.sha256,
                "filename": name,
                "config": None,
            }
            for name, model in service.models.items()
        ]
    )


async def samplers(_: Request) -> Response:
    """GET /sdapi/v1/samplers, the default first."""
    names = sorted(SOLVERS, key=lambda name: name != SOLVER)
    return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in names])


async def options(request: Request) -> Response:
    """GET and POST /sdapi/v1/options: of all options the model that is drawn with."""
    state: State = request.app.state.sdapi
    service: Service = request.app.state.service
    if request.method == "POST":
        wanted = (await read_json(request, Overrides)).sd_model_checkpoint
        state.chosen = Asked(None, wanted or state.chosen).chosen(service.models).name
        return JSONResponse(None)
    return JSONResponse({"sd_model_checkpoint": state.chosen, "samples_format": "png"})


async def progress(request: Request) -> Response:
    """GET /sdapi/v1/progress: of the job of this interface that is drawn, with a picture of it.

    The picture is made after the next step, for whoever asks a second time.
    """
    state: State = request.app.state.sdapi
    skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1")
    job = next((job for job in state.jobs if job.step), next(iter(state.jobs), None))
    if job is None:
        about = {"job_count": 0, "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
        return JSONResponse(_progress(0.0, 0.0, about, None))
    image = None
    if not skip:
        job.asked = True
        if (preview := job.wanted) is not None:
            image = await asyncio.to_thread(preview_of, preview.pixels)
    steps, count = job.steps, len(job.pictures)
    share = min(1.0, (job.done + job.step / steps * (job.done < count)) / count)
    spent = time.monotonic() - job.begun
    about = {
        "job_count": count,
        "job_no": job.done,
        "sampling_step": job.step,
        "sampling_steps": steps,
    }
    return JSONResponse(_progress(share, spent * (1 / share - 1) if share else 0.0, about, image))


def _progress(share: float, left: float, about: dict[str, Any], image: str | None) -> Any:
    state = {"skipped": False, "interrupted": False, "job": "txt2img" if about["job_count"] else ""}
    return {
        "progress": share,
        "eta_relative": left,
        "state": state | about,
        "current_image": image,
        "textinfo": None,
    }


async def interrupt(request: Request) -> Response:
    """POST /sdapi/v1/interrupt: ends what this interface draws; its answers come at once."""
    state: State = request.app.state.sdapi
    for job in state.jobs:
        job.interrupt()
    return JSONResponse({})
