"""Engines that keep what went through their graphs."""

from collections.abc import Mapping, Sequence

from runtime.bundle.manifest import Array, Manifest
from runtime.engines import Engine, EngineOptions
from runtime.pipeline.opened import Engines

Arrays = dict[str, Array]


class Recorder(Engines):
    """Engines that keep what their graphs took and gave last: graph -> (inputs, outputs)."""

    def __init__(self, manifest: Manifest, options: EngineOptions | None = None):
        super().__init__(manifest, options)
        self.recorded: dict[str, tuple[Arrays, Arrays]] = {}

    def open(self, graph: str, precision: str | None = None) -> Engine:
        return self.recording(graph, super().open(graph, precision))

    def recording(self, graph: str, engine: Engine) -> Engine:
        """`engine`, its runs kept."""
        return RecordingEngine(engine, graph, self.recorded)


class RecordingEngine:
    """An engine that puts the inputs and outputs of each run into `record`."""

    def __init__(self, engine: Engine, graph: str, record: dict[str, tuple[Arrays, Arrays]]):
        self.engine, self.graph, self.record = engine, graph, record
        self.provider = engine.provider

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Arrays:
        """As `Engine.run`."""
        found = self.engine.run(inputs, outputs)
        self.record[self.graph] = dict(inputs), found
        return found
