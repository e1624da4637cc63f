"""Readers in a process of their own, which may crash, hang or run out of memory and be told of it.

The process is kept from one file to the next and begun anew where it has died.
"""

import faulthandler
import multiprocessing
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ToolkitError
from tests.fuzz.damage import Sample

if TYPE_CHECKING:
    from tests.fuzz.reader import Reader

MEMORY = 512 << 20  # bytes above what a reader has taken for whole files
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SECONDS = 5.0  # of the processor, for one file
PATIENCE = 90.0  # by the clock, on a machine that is busy with other things
OPENING = 600.0  # until a reader's whole files are made
WARM = 3  # times that whole files are read before memory is measured


@dataclass(frozen=True)
class Verdict:
    """What became of a file: the toolkit's error by its class and words, or a fault.

    `seconds` of the processor and bytes of `memory`, at the most, that it took.
    """

    refusal: str = ""
    said: str = ""
    fault: str = ""
    seconds: float = 0.0
    memory: int = 0


class Child:
    """The process, and what it is asked."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._reader = ""

    def open(self, reader: str) -> list[Sample]:
        """Choose a reader; gives the whole files that it reads."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
        self._reader = reader
        found: list[Sample] = self._ask(reader, OPENING)
        return found

    def read(self, index: int, data: bytes) -> Verdict:
        """Read `data` as the file of number `index` is; a process that has died is a fault."""
        if self._process is None:
            self.open(self._reader)
        process = self._process
        try:
            verdict: Verdict = self._ask((index, data), PATIENCE)
        except TimeoutError:
            self.close()
            return Verdict(fault=f"no answer in {PATIENCE:g} s")
        except (EOFError, OSError):
            assert process is not None
            process.join()
            self.close()
            return Verdict(fault=f"the process died: {process.exitcode}")
        return verdict

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _ask(self, question: object, seconds: float) -> Any:
        assert self._pipe is not None
        self._pipe.send(question)
        if not self._pipe.poll(seconds):
            raise TimeoutError
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise AssertionError(answer)
        return answer


def judged(read: Callable[[int, bytes], object], index: int, data: bytes) -> Verdict:
    """What becomes of a file."""
    FORGET.write_text("5")  # the peak; see proc_pid_clear_refs(5)
    before, began, refusal, said, fault = held("VmRSS"), time.process_time(), "", "", ""
    try:
        read(index, data)
    except ToolkitError as error:
        refusal, said = type(error).__name__, str(error)
    except BaseException:
        fault = traceback.format_exc()
    seconds = time.process_time() - began
    return Verdict(refusal, said, fault, seconds, held("VmHWM") - before)


def held(name: str) -> int:
    """Bytes that this process holds or has held, by the system's name for them."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) << 10


def serve(pipe: Connection) -> None:
    """Answer until the pipe's other end is gone."""
    faulthandler.enable()
    reader: Reader | None = None
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            if reader is not None and isinstance(question, tuple):
                pipe.send(judged(reader.read, *question))
                continue
            try:
                reader = opened(question, Path(scratch))
                pipe.send(reader.samples)
            except Exception:
                pipe.send(traceback.format_exc())


def opened(name: str, scratch: Path) -> "Reader":
    """A reader that has read its whole files, with so much memory left."""
    from tests.fuzz.readers import READERS

    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    reader = READERS[name](folder)
    for _ in range(WARM):
        for index, sample in enumerate(reader.samples):
            if fault := judged(reader.read, index, sample.data).fault:
                raise AssertionError(fault)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + reader.room
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    return reader
