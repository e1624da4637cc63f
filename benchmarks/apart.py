"""Work in a process of its own, which may fail, hang or die without taking anything with it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from runtime.errors import ToolkitError

GRACE = 10.0  # seconds for a process to end by itself, once its work is done


@dataclass(frozen=True)
class Failure:
    """Why there is no more to come, in one line."""

    reason: str


def items(
    work: Callable[..., Iterable[Any]], *args: Any, seconds: float | None = None
) -> Iterator[Any]:
    """What `work(*args)` yields in a process of its own, as it comes; where it fails, a Failure.

    After `seconds` the process and all that it started are killed. `work` can be pickled.
    """
    spawn = multiprocessing.get_context("spawn")
    reader, writer = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(writer, work, args))
    end = None if seconds is None else time.monotonic() + seconds
    process.start()
    writer.close()
    try:
        while reader.poll(None if end is None else max(0.0, end - time.monotonic())):
            item = reader.recv()
            yield item
            if isinstance(item, Failure):
                return
        yield Failure(f"stopped after {seconds:.0f} s, its share of the time")
    except EOFError:  # all was sent, or the process died
        process.join(GRACE)
        if process.exitcode:
            yield Failure(f"its process ended with {_ending(process.exitcode)}")
    finally:
        _kill(process)
        reader.close()


def _send(writer: Connection, work: Callable[..., Iterable[Any]], args: tuple[Any, ...]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, that compilers which it starts can be ended with it
    try:
        for item in work(*args):
            writer.send(item)
    except Exception as error:
        lines = str(error).strip().split("\n")
        known = isinstance(error, ToolkitError)
        writer.send(Failure(lines[0] if known else f"{type(error).__name__}: {lines[0]}"))
    writer.close()


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _kill(process: Any) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (OSError, AttributeError):  # before it has made its group, or no POSIX system
            process.kill()
    process.join()
