"""What every command line shares: one-line errors, exit codes, sizes, ranges."""

import argparse
import contextlib
import difflib
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, NoReturn

from runtime.errors import INTERRUPTED_EXIT_CODE, ToolkitError, UsageError
from runtime.memory import memory_error
from runtime.providers import PROVIDERS

if TYPE_CHECKING:
    from runtime.engines import EngineOptions
    from runtime.pipeline.bundle import Bundle

# Of a bundle's graphs; int8w and fp8 are weights alone, int8 the tokens they meet as well.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8w", "fp8")
DEFAULT_ENGINE = Path("r2id.onnx")  # looked for here, then in build/mnist
DISTRIBUTIONS = ("r2-edge-runtime", "r2-edge-toolkit")
LARGEST_SIDE = 1 << 20
MOST_NUMBERS = 100_000
SIZE = re.compile(r"(\d+)[xX](\d+)")
MEMORY = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(MB|GB)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and every default that the help does not say itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        said = default in (None, False, argparse.SUPPRESS) or default == [] or text.endswith(")")
        return text if said else f"{text} (%(default)s)"


class Parser(argparse.ArgumentParser):
    """Errors are one line: what is wrong, the nearest option, where help is."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            wrong = next((word for word in rest if word.startswith("-")), rest[0])
            options = [
                option
                for action in self._actions
                if action.help != argparse.SUPPRESS
                for option in action.option_strings
            ]
            near = difflib.get_close_matches(wrong.partition("=")[0], options, 1)
            self.error(f"unknown {wrong}" + (f"; the nearest is {near[0]}" if near else ""))
        return found

    def error(self, message: str) -> NoReturn:
        """Exit with the code of a UsageError."""
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message}. Help: {self.prog} -h\n")


class _Note(logging.Formatter):
    """Names of files and labels in a note are printed as errors print them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Version(argparse.Action):
    """--version: what is installed, looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version())
        parser.exit()


def version() -> str:
    """The name and version of the installation that this runtime is of."""
    from importlib import metadata

    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return f"{DISTRIBUTIONS[0]}, not installed"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m name`."""
    return Parser(prog=f"python -m {name}", description=description, formatter_class=_Help)


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> NoReturn:
    """Parse, run `main` and exit: errors as one line with their code, a traceback by --debug."""
    parser.add_argument("--version", action=_Version, nargs=0, help="what is installed here")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    speak(args.quiet)
    signals = _collect_signals()
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        # numpy turns an interrupt within a comparison into a TypeError, so the signal decides.
        if signals:
            print(f"{parser.prog}: interrupted; finished files are kept", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT_CODE)
        if args.debug or not isinstance(error, ToolkitError | MemoryError):
            raise
        if isinstance(error, MemoryError):
            error = memory_error(error)
        print(printable(f"{parser.prog}: error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    gc.freeze()  # what is left goes with the process: to look through it takes as long as a decode
    sys.exit(0)


def speak(quiet: bool) -> None:
    """Notes of the runtime as lines on stderr; with `quiet` neither them nor progress bars."""
    from runtime.progress import Bar, log

    notes = logging.StreamHandler()
    notes.setFormatter(_Note("note: %(message)s"))
    log.addHandler(notes)
    log.propagate = False
    if quiet:
        log.setLevel(logging.ERROR)
        Bar.quiet = True


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The argument of a command that looks at a bundle without running it."""
    parser.add_argument(
        "bundle",
        type=Path,
        nargs="?",
        default=DEFAULT_ENGINE,
        help="a bundle's folder, or a file in it (build/mnist)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that opens a bundle; `open_bundle` reads them."""
    engine = "a bundle's folder, or a file in it"
    parser.add_argument("--engine", type=Path, default=DEFAULT_ENGINE, help=engine)
    add_provider_options(parser)
    parser.add_argument("--expect-sha256", help="refuse a manifest of any other SHA-256")


def add_provider_options(parser: argparse.ArgumentParser) -> None:
    """What runs a bundle's graphs; `engine_options` reads them."""
    add = parser.add_argument
    add("--provider", choices=tuple(PROVIDERS), default="cpu", help="what runs the graphs (cpu)")
    add(
        "--provider-option",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="passed to the provider as it is; may be repeated",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="form of the heavy graphs (fp32); openvino makes bf16 itself",
    )
    add("--allow-fallback", action="store_true", help="accept the CPU where --provider fails")
    add("--threads", type=number(0, 1024, int), default=0, help="CPU threads (0: all cores)")


def add_ground(parser: argparse.ArgumentParser) -> None:
    """What lies under the transparent pixels of a picture that is read."""
    ground = "colour under transparent pixels, by name or #rrggbb (white)"
    parser.add_argument("--ground", type=colour, help=ground)


def add_image(parser: argparse.ArgumentParser, text: str) -> None:
    """The size of the image: --image, or --size as it was called before."""
    parser.add_argument("--image", type=size, metavar="HxW", help=text)
    parser.add_argument("--size", type=size, dest="image", help=argparse.SUPPRESS)


def wanted_image(args: argparse.Namespace) -> tuple[int, int]:
    """The size of the image; raises UsageError where none is given."""
    if args.image is None:
        raise UsageError("--image is missing; expected HEIGHTxWIDTH, as in --image 512x512")
    height, width = args.image
    return height, width


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that draws an image from a latent."""
    parser.add_argument("--crop", type=crop, help="draw top,left,height,width of the image alone")
    # None where it was not given, so that a PNG's metadata can say it.
    parser.add_argument(
        "--exact",
        action="store_const",
        const=True,
        help="GRN ratios from every pixel in several passes, not from a sample",
    )
    parser.add_argument(
        "--memory",
        type=memory,
        help="what the process may hold, as in 500MB or 2GB: chooses the tiles (some 350MB more "
        "than the graphs take)",
    )
    quality = "of a JPEG or WebP, 1 to 100; at 100 WebP loses nothing (90)"
    parser.add_argument("--quality", type=number(1, 100, int), help=quality)


def open_bundle(args: argparse.Namespace) -> "Bundle":
    """The bundle that `add_engine_options` asked for; see `runtime.open_bundle`."""
    from runtime.pipeline.bundle import open_bundle

    return open_bundle(args.engine, engine_options(args), args.expect_sha256)


def engine_options(args: argparse.Namespace) -> "EngineOptions":
    """What `add_provider_options` was given."""
    from runtime.engines import EngineOptions

    return EngineOptions(
        args.provider,
        args.allow_fallback,
        args.threads,
        dict(args.provider_option),
        args.precision or "fp32",
    )


def picture_name(path: Path) -> Path:
    """A path that --out may be; raises UsageError for one that names no kind of picture."""
    from runtime.images.formats import SUFFIXES

    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {path}: expected a name that ends in one of {' '.join(SUFFIXES)}")
    return path


def key_value(text: str) -> tuple[str, str]:
    """KEY=VALUE, as two texts."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r}; expected KEY=VALUE, as in device_id=0")
    return key, value


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


def colour(text: str) -> tuple[int, int, int]:
    """RGB in 0 to 255 of a name or #rrggbb."""
    from PIL import ImageColor

    try:
        found = ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no colour; expected a name or #rrggbb, as in black or #204060"
        ) from None
    return found[0], found[1], found[2]


def sizes(text: str) -> list[tuple[int, int]]:
    """Sizes separated by commas."""
    return [size(part) for part in text.split(",")]


def memory(text: str) -> int:
    """Bytes, given as megabytes or gigabytes."""
    match = MEMORY.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one as in 500MB or 2GB")
    return int(float(match[1]) * {"MB": 1_000_000, "GB": 1_000_000_000}[match[2]])


def crop(text: str) -> tuple[int, int, int, int]:
    """top,left,height,width in pixels."""
    numbers = re.fullmatch(r"(\d{1,7}),(\d{1,7}),(\d{1,7}),(\d{1,7})", text)
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no crop; expected top,left,height,width as in 0,0,256,256"
        )
    top, left, height, width = map(int, numbers.groups())
    return top, left, height, width


def interval(text: str) -> tuple[float, float]:
    """LOW..HIGH within 0 to 1."""
    low, dots, high = text.partition("..")
    try:
        found = number(0, 1)(low), number(0, 1)(high)
    except argparse.ArgumentTypeError:
        found = (1.0, 0.0)
    if not dots or found[0] > found[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no interval; expected LOW..HIGH within 0 to 1, as in 0.2..0.8"
        )
    return found


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
        if len(numbers) + last - first >= MOST_NUMBERS:
            raise argparse.ArgumentTypeError(
                f"{text!r} lists more than the {MOST_NUMBERS} numbers that are drawn at most"
            )
        numbers += range(first, last + 1)
    return numbers


def number(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A converter for argparse: a `kind` within [low, high]; NaN is outside."""
    ends = " to ".join(str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high))

    def convert(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}; expected {'an integer' if kind is int else 'a number'} from {ends}"
            )
        return value

    return convert


def printable(text: str) -> str:
    """`text` without what would steer a terminal: control characters and reversed directions."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Rows as left-aligned columns, two spaces apart; the first row is the heading."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


def binary_size(count: float) -> str:
    """Bytes in words: 512 B, 1.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class _Signals:
    """What has come in this process; while `patient`, the first one raises nothing."""

    collected: ClassVar[list[int]] = []
    patient = False


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """While the block runs, the first signal shows in `signalled` alone: a step is finished."""
    _Signals.patient = True
    try:
        yield
    finally:
        _Signals.patient = False
    if signalled():
        raise KeyboardInterrupt


def signalled() -> bool:
    """Whether a signal asked this process to stop."""
    return bool(_Signals.collected)


def _collect_signals() -> list[int]:
    """SIGINT and SIGTERM, each raising KeyboardInterrupt; a SIGINT that is ignored stays so."""
    collected = _Signals.collected

    def interrupt(number: int, _frame: FrameType | None) -> None:
        collected.append(number)
        if not _Signals.patient or len(collected) > 1:
            raise KeyboardInterrupt
        print("\nstopping after this step; once more stops at once", file=sys.stderr)

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    return collected
