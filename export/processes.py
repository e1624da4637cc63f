"""Work shared by processes: tracing a graph is Python and keeps one core busy, however many are."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import parent_process
from typing import Any, TypeVar

import torch

from runtime.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESSES = 2  # one graph of the model takes as long as all others together


def in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    busy: Callable[[Sequence[Item]], None] = lambda items: None,
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, as they are ready; items are begun in their order.

    `busy` is told the items that are being worked on, at first and whenever one has ended. Raises
    what `work` raises, ResourceError where a process is ended from outside. Then, and where the
    caller stops early, the others are ended.
    """
    count = min(PROCESSES, os.cpu_count() or 1, len(items))
    threads = max(1, torch.get_num_threads() // count)
    # Not forked: a fork beside the threads of torch can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _prepare, (threads,)) as pool:
        # As bytes: torch would share its tensors by descriptors that a process which is ended never
        # fetches, and print of it.
        jobs = {pool.submit(_unpacked, pickle.dumps((work, item))): item for item in items}
        left = dict(jobs)
        try:
            busy([*left.values()][:count])
            for job in as_completed(jobs):
                item, result = left.pop(job), job.result()
                busy([*left.values()][:count])
                yield item, result
        except BrokenProcessPool:
            raise ResourceError(
                "a process that worked on a graph was ended from outside, as a system does that is "
                "short of memory; what was there before is intact. Free some and try again"
            ) from None
        except BaseException:
            # The pool gives up what waits by itself; a job cancelled here would trip it.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _unpacked(packed: bytes) -> Any:
    work, item = pickle.loads(packed)
    return work(item)


def _prepare(threads: int) -> None:
    """In a new process: leave interrupts to the parent, and end when it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
