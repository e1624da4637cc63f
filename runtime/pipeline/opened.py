"""A bundle's graphs as engines: opened when first needed, kept, checked against a request."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace

from runtime.bundle.manifest import Manifest
from runtime.bundle.profiles import choose
from runtime.engines import Engine, EngineOptions, open_engine
from runtime.engines.finite import FiniteEngine
from runtime.providers import PROVIDERS


class Engines:
    """Engines by graph and precision, shared by every thread and request of a bundle.

    What they give is checked to be finite; the sampler checks that of the step, which it can name.
    """

    def __init__(self, manifest: Manifest, options: EngineOptions | None = None):
        self.manifest = manifest
        self.options = options or EngineOptions()
        manifest.check_precision(self.options.form)
        self.opened: dict[tuple[str, str], Engine] = {}
        self._opening = threading.Lock()

    def open(self, graph: str, precision: str | None = None) -> Engine:
        """The engine of a graph, opened on first use; `precision` if not the bundle's own."""
        options = replace(self.options, precision=precision or self.options.precision)
        key = graph, options.precision
        with self._opening:
            if key not in self.opened:
                self.opened[key] = open_engine(self.manifest, graph, options)
                spec = self.manifest.graph(graph, options.form)
                if spec.lifetime != "step":
                    self.opened[key] = FiniteEngine(self.opened[key], spec.file)
            return self.opened[key]

    def open_all(self, graphs: Iterable[str]) -> None:
        """Open graphs before any work, so that a damaged file does not show after it."""
        for graph in graphs:
            self.open(graph)

    @property
    def provider(self) -> str:
        """What runs the graphs that are open: a name, or several joined by + after a fallback."""
        with self._opening:
            return "+".join(sorted({engine.provider for engine in self.opened.values()}))

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
