"""`/v1`: images in OpenAI's shape, with `seed`, `num_inference_steps`, `latent` … at top level.

Source of the shape: OpenAI's API reference, "Images", and the types of its Python package.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.answers import as_api_error, body_of
from serving.asked import Asked
from serving.edits import read_edit
from serving.encode import Format, base64_of, preview_of
from serving.errors import ApiError
from serving.generation import Generation
from serving.jobs import Drawn, Job, Preview
from serving.pictures import Picture, write_size
from serving.requests import answered, as_kind, read_form, read_json
from serving.service import Service


class Editing(Generation):
    """The fields of a form for edits: `strength` 0 keeps the picture, 1 begins with noise alone."""

    prompt: str = ""
    strength: float | None = None
    seam: int | None = None


async def models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [*map(service.described, service.models)]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    service: Service = request.app.state.service
    name = Asked(None, request.path_params["name"]).chosen(service.models).name
    return JSONResponse(service.described(name))


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    service: Service = request.app.state.service
    body = await read_json(request, Generation)
    job = service.submit(body.asked(), (body.partial_images or 0) if body.stream else 0)
    return await respond(request, job, body, "image_generation")


async def edits(request: Request) -> Response:
    """POST /v1/images/edits: a form with `image`, perhaps `mask`, and fields as a generation's."""
    service: Service = request.app.state.service
    fields, files = await read_form(request, {"image": "image", "image[]": "image", "mask": "mask"})
    if "image" not in files:
        raise ApiError(400, "invalid_form", "image is missing; expected a picture's file")
    body = as_kind(fields, Editing)
    asked = body.asked()
    channels = asked.chosen(service.models).interface.color_channels
    edit = await asyncio.to_thread(
        lambda: read_edit(
            files["image"],
            files.get("mask"),
            channels,
            service.limits,
            body.strength,
            body.seam,
        )
    )
    previews = (body.partial_images or 0) if body.stream else 0
    job = service.submit(replace(asked, edit=edit), previews)
    return await respond(request, job, body, "image_edit")


async def respond(request: Request, job: Job, body: Generation, kind: str) -> Response:
    """A job's pictures as one answer, or as they come."""
    form: Format = body.output_format or "png"
    if body.stream:
        events = stream(request.app.state.service, job, body, kind)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    service: Service = request.app.state.service
    drawn = await answered(request, job)
    files = await asyncio.to_thread(
        lambda: [
            service.file(pixels, picture, form, body.output_compression)
            for pixels, picture in zip(drawn.values(), job.pictures, strict=True)
        ]
    )
    data: list[dict[str, Any]] = []
    for file, picture in zip(files, job.pictures, strict=True):
        if body.response_format == "url":
            place = service.shelf.put(file, f"image/{form}")
            own = {"url": str(request.url_for("picture", name=place))}
        else:
            own = {"b64_json": base64_of(file)}
        data.append(own | described(picture))
    size = write_size(job.pictures[0].settings.image)
    return JSONResponse(
        {"created": int(time.time()), "data": data, "output_format": form, "size": size}
    )


def described(picture: Picture) -> dict[str, Any]:
    """What OpenAI's answer has no place for: what the picture can be drawn again from."""
    return {"seed": picture.seed, "index": picture.index}


async def stream(service: Service, job: Job, body: Generation, kind: str) -> AsyncIterator[str]:
    """Server-sent events: each preview, then each picture, or what went wrong."""
    previews, form = 0, body.output_format or "png"
    try:
        async with contextlib.aclosing(job.news()) as news:
            async for one in news:
                picture = job.pictures[one.number]
                if isinstance(one, Preview):
                    text = await asyncio.to_thread(preview_of, one.pixels)
                    own: dict[str, Any] = {
                        "partial_image_index": previews,
                        "step": one.step,
                        "steps": one.steps,
                    }
                    previews += 1
                else:
                    given = (one.pixels, picture, form, body.output_compression)
                    text = base64_of(await asyncio.to_thread(service.file, *given))
                    own = {"usage": USAGE}
                name = f"{kind}.{'completed' if isinstance(one, Drawn) else 'partial_image'}"
                event = {
                    "type": name,
                    "b64_json": text,
                    "created_at": int(time.time()),
                    "size": write_size(picture.settings.image),
                    "output_format": form if isinstance(one, Drawn) else "png",
                    "quality": "auto",
                    "background": "opaque",
                    **described(picture),
                }
                yield sent(name, event | own)
    except Exception as error:
        yield sent("error", body_of(as_api_error(error)))


# Clients expect the counts; no picture of ours takes tokens.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def sent(name: str, content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {msgspec.json.encode(content).decode()}\n\n"
