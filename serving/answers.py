"""Errors as clients read them: a status, and {"error": {"message", "type", "code"}}."""

import difflib
import logging
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.errors import NumericalError, ResourceError, StoppedError, ToolkitError, UsageError
from serving.errors import ApiError

log = logging.getLogger("serving")
UNSAID = "the server cannot draw this; its log says why. Ask whoever runs it"


def as_api_error(error: BaseException) -> ApiError:
    """Any error as a client may read it.

    What a request can be to blame for is said in the runtime's own sentence; what it cannot be
    (a damaged bundle, a missing library) names files of this machine, and goes to the log alone.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, "invalid_request", str(error))
    if isinstance(error, StoppedError):
        return ApiError(409, "interrupted", str(error))
    if isinstance(error, ResourceError):
        return ApiError(503, "out_of_resources", str(error), "server_error")
    if isinstance(error, NumericalError):
        return ApiError(500, "not_finite", str(error), "server_error")
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "refused")
        return ApiError(error.status_code, code, error.detail, headers=dict(error.headers or {}))
    log.error("%s", error, exc_info=None if isinstance(error, ToolkitError) else error)
    return ApiError(500, "server_error", UNSAID, "server_error")


def body_of(error: ApiError) -> dict[str, object]:
    """The JSON of an error."""
    return {"error": {"message": str(error), "type": error.kind, "code": error.code}}


def response_of(error: BaseException) -> JSONResponse:
    """The answer to a request that failed."""
    found = as_api_error(error)
    return JSONResponse(body_of(found), found.status, found.headers)


async def answer(request: Request, error: Exception) -> Response:
    """Starlette's handler of every exception."""
    if isinstance(error, HTTPException) and error.detail == HTTPStatus(error.status_code).phrase:
        error = told(request, error)
    return response_of(error)


def told(request: Request, error: HTTPException) -> HTTPException:
    """An error of the router with what would be right: another method, or the nearest path."""
    path, said = request.url.path, error.detail
    if error.status_code == 405 and error.headers:
        said = f"{request.method} of {path} is not served; expected {error.headers['Allow']}"
    elif error.status_code == 404:
        paths = [route.path for route in request.app.routes if "{" not in route.path]
        near = difflib.get_close_matches(path, paths, 1, 0.0)
        said = f"nothing is served at {path}; the nearest is {near[0]}"
    return HTTPException(error.status_code, said, error.headers)
