"""Requests read within limits, and answers that nobody waits for given up."""

import asyncio
import contextlib
import re
from typing import TypeVar, get_args, get_type_hints

import msgspec
from starlette.requests import Request

from runtime.images.png import Rows
from serving.errors import ApiError
from serving.jobs import Job

Body = TypeVar("Body")
MOST_FIELDS = 100  # of a form


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`; raises ApiError.

    Only as application/json: a page of another origin cannot send that without being allowed.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "content_type", f"Content-Type is {media!r}; expected application/json")
    try:
        return msgspec.json.decode(await request.body(), type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = f"the body is not as expected: {error}{names_for(error, kind)}"
        raise ApiError(400, "invalid_json", said) from None


def as_kind(fields: dict[str, str], kind: type[Body]) -> Body:
    """A form's fields as `kind`; raises ApiError."""
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        said = f"the form is not as expected: {error}{names_for(error, kind)}"
        raise ApiError(400, "invalid_form", said) from None


def names_for(error: Exception, kind: type) -> str:
    """What a field of `kind` takes, where the error is that it takes a few names alone; else ""."""
    field = re.search(r"enum value .* - at `\$\.(\w+)`", str(error))
    if field is None:
        return ""
    either = get_args(get_type_hints(kind)[field[1]])  # some names, or None
    return f"; expected {' or '.join(name for part in either for name in get_args(part))}"


async def read_form(
    request: Request, names: dict[str, str]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """A form's fields, and its files by what `names` calls them; raises ApiError.

    What a file is called by its sender is of no account.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "multipart/form-data":
        raise ApiError(
            415, "content_type", f"Content-Type is {media!r}; expected multipart/form-data"
        )
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=len(names), max_fields=MOST_FIELDS) as form:
        for key, value in form.multi_items():
            name = names.get(key)
            if isinstance(value, str):
                fields[key] = value
            elif name is None or name in files:
                raise ApiError(
                    400, "invalid_form", f"{key} is one file too many; expected {sorted(names)}"
                )
            else:
                files[name] = await value.read()
    return fields, files


async def answered(request: Request, job: Job) -> dict[int, Rows]:
    """A job's pictures by their number; raises ApiError where the client goes away."""
    drawing = asyncio.ensure_future(job.drawn())
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ApiError(499, "client_gone", "the client went away")
        return drawing.result()
    finally:
        for task in (drawing, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
