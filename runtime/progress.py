"""Progress bars on terminals, a line a minute in logs, and a word before hours of work."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LONG = 3600.0  # seconds to go that are said
MEASURED = 5.0  # seconds after the first update before they are estimated
EVERY = 60.0  # seconds between lines where there is no terminal
log = logging.getLogger("runtime")


class Bar:
    """A bar of tqdm where stderr is a terminal; else plain lines, so that logs stay readable.

    `total` defaults to the length of `iterable`; `unit` is one of what is counted; `look` is
    tqdm's, which is imported where it shows: that takes a quarter of the time that all of the
    runtime's imports take.
    """

    quiet: ClassVar[bool] = False

    def __init__(
        self,
        iterable: Iterable[Any] = (),
        total: float | None = None,
        desc: str = "work",
        unit: str = "item",
        initial: float = 0,
        leave: bool = True,
        **look: Any,
    ):
        self.iterable, self.what, self.unit, self.leave = iterable, desc, unit, leave
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._n = initial
        self.postfix = ""
        self._drawn: tqdm[Any] | None = None
        self.plain = not sys.stderr.isatty()
        if not (self.plain or Bar.quiet):
            from tqdm import tqdm as drawn

            look |= {"desc": desc, "unit": unit, "initial": initial, "leave": leave}
            self._drawn = drawn(total=self.total, **look)
        self.first: tuple[float, float] | None = None  # seconds and count at the first update
        self.begun = self.said = time.monotonic()
        self.long_said = self.closed = False

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n(self) -> float:
        """How much is done; what is set shows at the next `refresh`."""
        return self._n

    @n.setter
    def n(self, value: float) -> None:
        self._n = value
        if self._drawn is not None:
            self._drawn.n = value

    def update(self, n: float = 1) -> None:
        """So much more is done."""
        self._n += n
        if self._drawn is not None:
            self._drawn.update(n)
        if not Bar.quiet:
            self._tell()

    def refresh(self) -> None:
        """Draw the bar as it is."""
        if self._drawn is not None:
            self._drawn.refresh()

    def set_postfix_str(self, text: str) -> None:
        """What is worked on, behind the bar."""
        self.postfix = text
        if self._drawn is not None:
            self._drawn.set_postfix_str(text)

    @staticmethod
    def write(text: str, file: TextIO) -> None:
        """A line above the bars that are shown."""
        if Bar.quiet or not sys.stderr.isatty():
            print(text, file=file)
            return
        from tqdm import tqdm

        tqdm.write(text, file=file)

    def close(self) -> None:
        """End the bar; where there is no terminal, say in a line what was done in what time."""
        if self._drawn is not None:
            self._drawn.close()
        if self.plain and self.leave and not (self.closed or Bar.quiet):
            self._print(f"{duration(time.monotonic() - self.begun)} spent")
        self.closed = True

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
        several = "es" if self.unit.endswith("ch") else "s"
        unit = self.unit if round(self.total or self.n) == 1 else self.unit + several
        line = f"{self.what}: {self.n:.0f}{of} {unit}, {rest}"
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
