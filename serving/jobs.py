"""What clients wait for, and the threads that draw it: a queue with a bound, batches, time limits.

A job is one client's request. Its pictures wait one by one, so that those of several jobs can be
diffused together and a large job does not keep all others waiting for its last picture.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import StoppedError
from runtime.images.png import Rows
from runtime.pipeline.diffuser import Progress
from serving.errors import busy, closing, too_late
from serving.limits import Limits
from serving.metrics import Metrics
from serving.pictures import Picture, preview_size, preview_steps

log = logging.getLogger("serving")
FIRST_GUESS = 1.0  # seconds of a picture, before one was drawn
FORGET = 0.8  # weight of what was known of a picture's seconds when another was drawn


@dataclass(frozen=True)
class Preview:
    """The estimate after a step of picture `number` of a job: uint8 `[h, w, c]`."""

    number: int
    step: int
    steps: int
    pixels: Rows


@dataclass(frozen=True)
class Drawn:
    """Picture `number` of a job: uint8 `[h, w, c]`."""

    number: int
    pixels: Rows


class Job:
    """One client's pictures, and the news of them.

    `previews` of each picture are told of on the way. Made and read on the event loop; workers
    call `tell` and read `over`.
    """

    def __init__(self, pictures: Sequence[Picture], seconds: float, previews: int = 0):
        self.pictures, self.seconds = pictures, seconds
        self.begun = time.monotonic()
        self.stopped = False  # nobody reads on
        self.interrupted = False
        self.step = self.done = 0  # of the picture that is being drawn; how many are there
        self.wanted: Preview | None = None  # the last one that `ask` brought
        self.asked = False
        self.previews, self.steps = previews, pictures[0].settings.steps
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Preview | Drawn | Exception] = asyncio.Queue()

    @property
    def over(self) -> bool:
        """Whether nobody waits for this any more."""
        return self.stopped or time.monotonic() - self.begun > self.seconds

    def interrupt(self) -> None:
        """End it at once: `drawn` gives what there is."""
        self.interrupted = True
        self._news.put_nowait(StoppedError("interrupted by another request"))

    def tell(self, news: Preview | Drawn | Exception) -> None:
        """From a worker: what the client's side gets next; nothing once that has gone."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def news(self) -> AsyncGenerator[Preview | Drawn]:
        """Everything of this job up to its last picture; raises what ended it, or its time limit.

        Whoever stops reading stops the job.
        """
        left = len(self.pictures)
        try:
            while left:
                rest = self.begun + self.seconds - time.monotonic()
                try:
                    news = await asyncio.wait_for(self._news.get(), max(0.0, rest))
                except TimeoutError:
                    raise too_late(self.seconds) from None
                if isinstance(news, Exception):
                    raise news
                if isinstance(news, Drawn):
                    left, self.done = left - 1, self.done + 1
                yield news
        finally:
            self.stopped = True

    async def drawn(self) -> dict[int, Rows]:
        """All pictures by their number; those that are there where it was interrupted."""
        found: dict[int, Rows] = {}
        with contextlib.suppress(StoppedError):
            async with contextlib.aclosing(self.news()) as news:
                async for one in news:
                    if isinstance(one, Drawn):
                        found[one.number] = one.pixels
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Task:
    """Picture `number` of a job, and when it began to wait."""

    job: Job
    number: int
    since: float

    @property
    def picture(self) -> Picture:
        return self.job.pictures[self.number]


class Workshop:
    """The queue and the threads that draw from it. Every method but the workers' is the loop's."""

    def __init__(self, limits: Limits, metrics: Metrics, workers: int = 1):
        self.limits, self.metrics = limits, metrics
        self.closed = False
        self._waiting: deque[_Task] = deque()
        self._running: list[_Task] = []
        self._seconds = FIRST_GUESS
        self._changed = threading.Condition()
        metrics.waiting.set_function(lambda: self.waiting)
        metrics.drawing.set_function(lambda: len(self._running))
        self._threads = [
            threading.Thread(target=self._work, name=f"draw-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return sum(not task.job.over for task in list(self._waiting))

    @property
    def left(self) -> int:
        """How many pictures wait or are being drawn."""
        return self.waiting + len(self._running)

    @property
    def alive(self) -> bool:
        """Whether pictures that are handed in are drawn."""
        return not self.closed and all(thread.is_alive() for thread in self._threads)

    def submit(self, job: Job) -> None:
        """Queue a job's pictures; raises ApiError where the queue is full or closed."""
        now = time.monotonic()
        with self._changed:
            if self.closed:
                raise closing()
            self._waiting = deque(task for task in self._waiting if not task.job.over)
            waiting = len(self._waiting)
            if waiting + len(job.pictures) > self.limits.queue:
                raise busy(waiting, waiting * self._seconds / len(self._threads))
            self._waiting += [_Task(job, number, now) for number in range(len(job.pictures))]
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing new; the threads end once all that waits is drawn."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads, after `close`."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            try:
                self._draw(batch)
            finally:
                with self._changed:
                    self._running = [task for task in self._running if task not in batch]

    def _take(self) -> list[_Task] | None:
        """The task that waits longest and others that are diffused with it; None at the end."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].job.over:
                    self._waiting.popleft()
                if self._waiting:
                    break
                if self.closed:
                    return None
                self._changed.wait()
            first = self._waiting[0].picture
            alike = [
                task
                for task in self._waiting
                if not task.job.over and task.picture.together == first.together
            ]
            batch = alike[: first.model.most(first, self.limits.batch)]
            chosen = set(map(id, batch))
            self._waiting = deque(task for task in self._waiting if id(task) not in chosen)
            self._running += batch
        now = time.monotonic()
        for task in batch:
            self.metrics.seconds.labels("queue").observe(now - task.since)
        return batch

    def _draw(self, batch: list[_Task]) -> None:
        """Draw a batch; where it fails, each picture alone, so that one's fault is its own."""
        begun = time.monotonic()
        try:
            latents = self._diffuse(batch)
        except StoppedError:
            return self.metrics.stopped.inc(len(batch))
        except Exception as error:
            if len(batch) == 1:
                return batch[0].job.tell(error)
            for task in batch:
                self._draw([task])
            return None
        for number, task in enumerate(batch):
            self._finish(task, latents[number : number + 1])
        seconds = (time.monotonic() - begun) / len(batch)
        self._seconds = FORGET * self._seconds + (1 - FORGET) * seconds
        return None

    def _diffuse(self, batch: list[_Task]) -> NDArray[np.float32]:
        def on_step(progress: Progress) -> bool:
            for number, task in enumerate(batch):
                self._progress(task, number, progress)
            return all(task.job.over for task in batch)

        with self.metrics.seconds.labels("diffuse").time():
            self.metrics.batches.observe(len(batch))
            first = batch[0].picture
            return first.model.diffuse([task.picture for task in batch], on_step)

    def _progress(self, task: _Task, number: int, progress: Progress) -> None:
        """Tell a job of a step of its picture, image `number` of a batch."""
        job = task.job
        job.step, job.steps = progress.step, progress.steps
        told = progress.step in preview_steps(progress.steps, job.previews)
        if job.over or not (told or job.asked) or progress.step == progress.steps:
            return
        job.asked = False
        with self.metrics.seconds.labels("preview").time():
            picture = task.picture
            size = preview_size(picture)
            pixels = picture.model.draw(picture, progress.x0[number : number + 1], size)
        job.wanted = Preview(task.number, progress.step, progress.steps, pixels)
        if told:
            job.tell(job.wanted)

    def _finish(self, task: _Task, latent: NDArray[np.float32]) -> None:
        job, picture = task.job, task.picture
        if job.over:
            return
        try:
            with self.metrics.seconds.labels("decode").time():
                size = picture.settings.image
                pixels = picture.model.draw(picture, latent, size, lambda: job.over)
        except StoppedError:
            return
        except Exception as error:
            job.tell(error)
            return
        self.metrics.pictures.labels(picture.model.name).inc()
        job.tell(Drawn(task.number, pixels))
