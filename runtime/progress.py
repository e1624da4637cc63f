"""Progress bars on terminals, a line a minute in logs, and a word before hours of work."""

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from tqdm import tqdm

LONG = 3600.0  # seconds to go that are said
MEASURED = 5.0  # seconds after the first update before they are estimated
EVERY = 60.0  # seconds between lines where there is no terminal
log = logging.getLogger("runtime")


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm where stderr is a terminal; else plain lines, so that logs stay readable."""

    quiet: ClassVar[bool] = False

    def __init__(self, *args: Any, **options: Any):
        self.plain = not sys.stderr.isatty()
        options["disable"] = self.plain or Bar.quiet
        super().__init__(*args, **options)
        self.what, self.unit = options.get("desc", "work"), options.get("unit", "it")
        self.n = options.get("initial", 0)
        self.postfix = getattr(self, "postfix", None)  # which tqdm leaves out where it is disabled
        self.first: tuple[float, float] | None = None  # seconds and count at the first update
        self.begun = self.said = time.monotonic()
        self.long_said = False

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self.disable:
            self.n += n or 0
        if not Bar.quiet:
            self._tell()
        return shown

    def close(self) -> None:
        """End the bar; where there is no terminal, say in a line what was done in what time."""
        super().close()
        if self.plain and self.leave and not Bar.quiet:
            self.leave = False  # said once
            self._print(f"{duration(time.monotonic() - self.begun)} spent")

    def _tell(self) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now, self.n
            return
        seconds, count = now - self.first[0], self.n - self.first[1]
        if seconds < MEASURED or count <= 0 or not self.total:
            return
        left = seconds / count * (self.total - self.n)
        if left > LONG and not self.long_said:
            self.long_said = True
            log.warning("%s will take about %s; Ctrl-C stops it", self.what, duration(left))
        if self.plain and now - self.said >= EVERY:
            self.said = now
            beside = f"{self.postfix}, " if self.postfix else ""
            self._print(f"{beside}{duration(left)} left")

    def _print(self, rest: str) -> None:
        of = f" of {self.total:.0f}" if self.total else ""
        line = f"{self.what}: {self.n:.0f}{of} {self.unit}, {rest}"
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
