"""What every command line shares: one-line errors, exit codes, sizes, ranges."""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from runtime.errors import INTERRUPTED_EXIT_CODE, ResourceError, ToolkitError

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

PROVIDERS = ("cpu", "cuda", "directml", "coreml")
PRECISIONS = ("fp32", "fp16", "bf16")
LARGEST_SIDE = 1 << 20
SIZE = re.compile(r"(\d+)x(\d+)")


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> NoReturn:
    """Parse, run `main` and exit: errors as one line with their code, a traceback by --debug."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; finished files are kept", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except (ToolkitError, MemoryError) as error:
        if args.debug:
            raise
        if isinstance(error, MemoryError):
            error = ResourceError(f"out of memory ({error}); ask for a smaller size or batch")
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that opens a bundle; `open_bundle` reads them."""
    add = parser.add_argument
    add("--engine", type=Path, default=Path("r2id.onnx"), help="a bundle's folder, or a file in it")
    add("--provider", choices=PROVIDERS, default="cpu", help="what runs the graphs (cpu)")
    add("--precision", choices=PRECISIONS, help="form of the heavy graphs (fp32)")
    add("--allow-fallback", action="store_true", help="accept the CPU where --provider fails")
    add("--threads", type=number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--expect-sha256", help="refuse a manifest of any other SHA-256")


def open_bundle(args: argparse.Namespace) -> "Pipeline":
    """The bundle that `add_engine_options` asked for; see `runtime.open_bundle`."""
    from runtime.engines import EngineOptions
    from runtime.pipeline import open_bundle

    precision = args.precision or "fp32"
    options = EngineOptions(args.provider, args.allow_fallback, args.threads, precision)
    return open_bundle(args.engine, options, args.expect_sha256)


def size(text: str) -> tuple[int, int]:
    """HxW with both sides in 1..2^20, as (height, width)."""
    match = SIZE.fullmatch(text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected HEIGHTxWIDTH with sides of 1 to {LARGEST_SIDE}, "
            "as in 8x8 or 16x9"
        )
    return sides


def integers(text: str) -> list[int]:
    """A list of numbers and ranges: `7`, `1,3,5`, `0-9`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of numbers; expected one as in 7 or 1,3 or 0-9"
            )
        numbers += range(first, last + 1)
    return numbers


def number(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A converter for argparse: a `kind` within [low, high]; NaN is outside."""

    def convert(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}; expected {'an integer' if kind is int else 'a number'} "
                f"from {low:g} to {high:g}"
            )
        return value

    return convert


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
