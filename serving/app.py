"""The application: routes, and who may ask what."""

import contextlib
import hmac
import re
from base64 import b64decode
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import ToolkitError
from serving import openai, sdapi
from serving.answers import answer, response_of
from serving.errors import ApiError
from serving.page import page
from serving.service import Service

# What needs no token: it says little, is in the package, or has a name that nobody guesses.
OPEN = re.compile(r"/|/healthz|/page/[^/]+|/pictures/[^/]+")
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


class Guard:
    """Refuses who may not ask and what is too large, and counts answers.

    With a `token` every request must bear it; without one the server listens to this machine
    alone, where a page of another origin is kept out by its Origin, and one whose name was made to
    point here by its Host.
    """

    def __init__(
        self, app: ASGIApp, service: Service, token: str | None, origins: Sequence[str]
    ) -> None:
        self.app, self.service, self.origins = app, service, origins
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
                route = scope.get("route")
                path = route.path if isinstance(route, Route) else "other"
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self.check(scope["path"], headers := Headers(scope=scope))
            limited = self.limited(headers, receive)
        except ApiError as error:
            await response_of(error)(scope, receive, tell)
            return
        await self.app(scope, limited, tell)

    def check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for who may not ask."""
        if self.token is not None:
            if not OPEN.fullmatch(path) and not hmac.compare_digest(_token(headers), self.token):
                raise ApiError(
                    401,
                    "invalid_token",
                    "no valid token; expected the server's, as in Authorization: Bearer TOKEN",
                    "authentication_error",
                    {"WWW-Authenticate": "Bearer"},
                )
            return
        host = headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in LOOPBACK:
            raise ApiError(403, "host", "Host is not this machine; expected 127.0.0.1 or localhost")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", *self.origins):
            raise ApiError(
                403, "origin", f"pages of {origin} may not ask; the server's --cors could allow it"
            )

    def limited(self, headers: Headers, receive: Receive) -> Receive:
        """`receive` up to the largest body; raises ApiError for one that says it is larger."""
        most = self.service.limits.body
        error = ApiError(
            413,
            "body_too_large",
            f"the body is too large; expected at most {most} bytes. Send a smaller picture, or "
            "start the server with a larger --max-body",
        )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise error
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise error
            return message

        return limited


def _token(headers: Headers) -> bytes:
    """The token that a request bears: as Bearer, or as the password of Basic."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return b64decode(given, validate=True).partition(b":")[2]
    return given.strip().encode() if scheme.lower() == "bearer" else b""


async def healthz(request: Request) -> Response:
    """GET /healthz: 200 while pictures are drawn, 503 once none will be."""
    service: Service = request.app.state.service
    alive = service.workshop.alive
    about = {"status": "ok" if alive else "closing", "queue": service.workshop.waiting}
    return JSONResponse(about, 200 if alive else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=service.metrics.type)


async def picture(request: Request) -> Response:
    """GET /pictures/NAME: what a `response_format` of url points at."""
    service: Service = request.app.state.service
    found = service.shelf.get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "no such picture; they are kept for an hour at most")
    return Response(found[0], media_type=found[1])


ROUTES = [
    Route("/", page),
    Route("/page/{name}", page),
    Route("/healthz", healthz),
    Route("/metrics", metrics),
    Route("/pictures/{name}", picture, name="picture"),
    Route("/v1/models", openai.models),
    Route("/v1/models/{name}", openai.model),
    Route("/v1/images/generations", openai.generations, methods=["POST"]),
    Route("/v1/images/edits", openai.edits, methods=["POST"]),
    Route("/sdapi/v1/img2img", sdapi.image_to_image, methods=["POST"]),
    Route("/sdapi/v1/txt2img", sdapi.text_to_image, methods=["POST"]),
    Route("/sdapi/v1/sd-models", sdapi.sd_models),
    Route("/sdapi/v1/samplers", sdapi.samplers),
    Route("/sdapi/v1/options", sdapi.options, methods=["GET", "POST"]),
    Route("/sdapi/v1/progress", sdapi.progress),
    Route("/sdapi/v1/interrupt", sdapi.interrupt, methods=["POST"]),
]


def application(
    service: Service, token: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """The ASGI application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.workshop.close()
        service.workshop.join()

    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    guard = Middleware(Guard, service=service, token=token, origins=origins)
    app = Starlette(
        routes=ROUTES,
        middleware=[*([cors] if origins else []), guard],
        exception_handlers=dict.fromkeys(
            (Exception, HTTPException, ApiError, ToolkitError), answer
        ),
        lifespan=lifespan,
    )
    app.state.service, app.state.sdapi = service, sdapi.State(service)
    return app
