"""A bundle's graphs as engines: opened when first needed, kept, checked against a request."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from runtime.bundle.manifest import Manifest
from runtime.bundle.profiles import choose
from runtime.engines import Engine, EngineOptions, open_engine
from runtime.engines.finite import FiniteEngine
from runtime.providers import PROVIDERS

log = logging.getLogger("runtime")


class Engines:
    """Engines by graph and precision, shared by every thread and request of a bundle.

    What they give is checked to be finite; the sampler checks that of the step, which it can name.
    """

    def __init__(self, manifest: Manifest, options: EngineOptions | None = None):
        self.manifest = manifest
        self.options = options or EngineOptions()
        manifest.check_precision(self.options.form)
        self.opened: dict[tuple[str, str], Engine] = {}
        self._opening: dict[tuple[str, str], threading.Lock] = {}
        self._said = False

    def open(self, graph: str, precision: str | None = None) -> Engine:
        """The engine of a graph, opened on first use; `precision` if not the bundle's own."""
        options = replace(self.options, precision=precision or self.options.precision)
        key = graph, options.precision
        with self._opening.setdefault(key, threading.Lock()):
            if key not in self.opened:
                self.opened[key] = open_engine(self.manifest, graph, options)
                spec = self.manifest.graph(graph, options.form)
                if spec.lifetime != "step":
                    self.opened[key] = FiniteEngine(self.opened[key], spec.file)
                self._say_fallback(graph, options)
            return self.opened[key]

    def open_all(self, graphs: Iterable[str], exact: Iterable[str] = ()) -> None:
        """Open graphs before any work, so that a damaged file does not show after it.

        Those of `exact` in fp32, the others in the bundle's own precision.
        """
        with self.opening(graphs, exact):
            pass

    @contextlib.contextmanager
    def opening(self, graphs: Iterable[str], exact: Iterable[str] = ()) -> Iterator[None]:
        """`open_all` while the block runs, which ends when all are open.

        On processors in a thread per graph; elsewhere one graph may take all that there is.
        """
        wanted = dict.fromkeys([*((name, "fp32") for name in exact), *((g, None) for g in graphs)])
        failed: dict[tuple[str, str | None], BaseException] = {}

        def open_one(graph: str, precision: str | None) -> None:
            try:
                self.open(graph, precision)
            except BaseException as error:
                failed[graph, precision] = error

        threads = [threading.Thread(target=open_one, args=one) for one in wanted]
        alone = self.options.plans or self.options.provider != "cpu"
        for thread in threads:
            thread.start()
            if alone:
                thread.join()
        yield
        for thread in threads:
            thread.join()
        for one in wanted:
            if one in failed:
                raise failed[one]

    def _say_fallback(self, graph: str, options: EngineOptions) -> None:
        """Say once what runs in place of what was asked for."""
        ran = self.opened[graph, options.precision].provider
        planned = options.plans and self.manifest.plan(graph, options.form) is None
        if self._said or not (planned or (ran != options.provider and not options.plans)):
            return
        self._said = True
        asked = "its plan" if planned else options.provider
        log.warning(
            "%s runs on %s, since %s cannot run it here; `python -m runtime.doctor` says what is "
            "missing",
            *(graph, ran, asked),
        )

    @property
    def provider(self) -> str:
        """What runs the graphs that are open: a name, or several joined by + after a fallback."""
        return "+".join(sorted({engine.provider for engine in list(self.opened.values())}))

    def whole(self, graph: str) -> bool:
        """Whether a graph runs at the sizes of a plan alone, and so at none of a tile."""
        plan = self.manifest.plan(graph, self.options.form)
        builds = bool(PROVIDERS[self.options.provider].profiles) and plan is not None
        return self.options.plans or builds

    def check(self, graph: str, sizes: Mapping[str, int], form: str | None = None) -> None:
        """Raise UsageError where a graph cannot run at `sizes` of its named axes.

        `form`: its precision, if not the bundle's own. With plans, one profile must cover all.
        """
        form = form or self.options.form
        spec = self.manifest.graph(graph, form)
        own = {axis: sizes[axis] for axis in spec.ranges if axis in sizes}
        spec.check_ranges(own)
        plan = self.manifest.plan(graph, form) if self.options.plans else None
        if plan is not None:
            choose(plan.file, plan.profiles, own)
