"""Serve bundles over HTTP: python -m serving build/mnist

OpenAI's images API at /v1, a slice of A1111's at /sdapi/v1, a page at /. Stops on SIGTERM or Ctrl-C
once what was accepted is drawn.
"""

import argparse
import contextlib
import ipaddress
import logging
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli, open_bundle
from runtime.errors import ArtefactError, IncompatibleError, ResourceError, UsageError
from serving.limits import LIMITS, Limits, add_limits

if TYPE_CHECKING:
    from serving.pictures import Model
    from serving.service import Service

DEFAULT = Limits()
SHORTEST_TOKEN = 16
INSTALL = (
    "python -m pip install 'starlette>=1.0' 'uvicorn>=0.40' 'python-multipart>=0.0.26' "
    "'prometheus-client>=0.22'"
)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("serving", __doc__)
    add = p.add_argument
    bundles = "a bundle's folder, or NAME=FOLDER (its name in requests is the folder's)"
    add("bundles", nargs="+", metavar="BUNDLE", help=bundles)
    add(
        "--host", default="127.0.0.1", help="address to listen at; beyond this machine with a token"
    )
    add("--port", type=cli.number(0, 65535, int), default=8000, help="0: any that is free (8000)")
    token = f"file of the token that requests must bear, {SHORTEST_TOKEN} characters or more"
    add("--token-file", type=Path, help=token)
    origin = "let pages of this origin ask, as in https://example.org; may be repeated"
    add("--cors", action="append", default=[], metavar="ORIGIN", help=origin)
    add_limits(p, *LIMITS)
    add("--max-body", type=cli.memory, default=DEFAULT.body, help="of a request (32MB)")
    limit = f"seconds from a request to its last picture ({DEFAULT.seconds:g})"
    add("--time-limit", type=cli.number(0.1, 86_400), default=DEFAULT.seconds, help=limit)
    add("--workers", type=cli.number(1, 64, int), default=1, help="batches drawn at once (1)")
    cli.add_provider_options(p)
    return p


def serve(args: argparse.Namespace) -> None:
    """Open the bundles, then listen until a signal comes."""
    token = read_token(args.token_file)
    check_reach(args.host, token)
    limits = limits_of(args)
    try:
        import uvicorn

        from serving.app import application
        from serving.service import Service
    except ImportError as error:
        raise IncompatibleError(
            f"{error.name} is not installed; expected it for the server. Install it with: {INSTALL}"
        ) from None
    models = open_models(args)
    with listening(args.host, args.port) as listener:
        service = Service(models, limits, args.workers)
        config = uvicorn.Config(
            application(service, token, args.cors),
            log_level="error" if args.quiet else "warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(limits.seconds),
            lifespan="on",
        )
        host, port = listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"serving {', '.join(service.models)} at http://{place}", flush=True)
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # uvicorn raises the signal that ended it again
            server = uvicorn.Server(config)
            if not args.quiet:
                server.handle_exit = telling(server.handle_exit, service)  # type: ignore[method-assign]
            server.run([listener])
    if not args.quiet:
        print("stopped: all that was accepted is drawn", file=sys.stderr)


def telling(stop: Callable[..., None], service: "Service") -> Callable[..., None]:
    """`stop`, what ends the server at a signal, after a word of what is drawn before."""

    def told(*signal: Any) -> None:
        print(
            f"stopping: {service.workshop.left} accepted pictures are drawn first", file=sys.stderr
        )
        stop(*signal)

    return told


def read_token(path: Path | None) -> str | None:
    """The token in a file; raises UsageError for one that can be guessed."""
    if path is None:
        return None
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"--token-file {path}: cannot be read ({error})") from None
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(
            f"--token-file {path}: holds {len(token)} characters; expected one line of "
            f"{SHORTEST_TOKEN} or more without spaces. Make one with: openssl rand -hex 32"
        )
    return token


def check_reach(host: str, token: str | None) -> None:
    """Raise UsageError where other machines could ask without a token."""
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if not local and token is None:
        raise UsageError(
            f"--host {host}: other machines can reach it, and anyone could draw; expected a token. "
            "Make one with: openssl rand -hex 32 > token; then pass --token-file token"
        )


def limits_of(args: argparse.Namespace) -> Limits:
    """What one request may ask."""
    limits = Limits(
        args.max_pixels,
        args.max_cells,
        args.max_steps,
        args.max_images,
        args.max_body,
        args.time_limit,
        args.queue,
        args.batch,
    )
    if limits.images > limits.queue:
        raise UsageError(
            f"--max-images {limits.images}: more than the --queue of {limits.queue} holds; "
            "expected at most as many"
        )
    return limits


def open_models(args: argparse.Namespace) -> list["Model"]:
    """Every bundle with its graphs open, so that the first request finds them."""
    from serving.pictures import Model

    options = cli.engine_options(args)
    models: dict[str, Model] = {}
    for text in args.bundles:
        name, equals, folder = text.rpartition("=")
        path = Path(folder)
        bundle = open_bundle(path, options)
        name = name if equals else bundle.manifest.folder.resolve().name
        if name in models:
            raise UsageError(f"two bundles are named {name}; name one of them: OTHER={folder}")
        models[name] = Model(name, bundle)
        logging.getLogger("serving").info("opening %s", name)
        models[name].open()
    return [*models.values()]


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ResourceError where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ResourceError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror or error}); "
            "choose another --port, or 0 for any that is free"
        ) from None


if __name__ == "__main__":
    cli.run(serve, parser())
