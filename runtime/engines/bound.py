"""ONNX Runtime with tensors that stay on a CUDA device between runs, and captured CUDA graphs.

`InferenceSession.run` copies every input to the device in every run. Here each has memory of its
own there, and an array that nobody can have written to since the run before is not copied again.
A captured CUDA graph reads and writes the addresses that it was captured with and allows one run at
a time, so it needs this.

Source: ONNX Runtime, "CUDA Execution Provider", Using CUDA Graphs.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bundle.manifest import Array, GraphSpec

MOST_CAPTURED = 4  # graphs of a session, one per set of sizes: each keeps the memory of its tensors
NOT_CAPTURED = -1  # the library's name for a run outside of all graphs


class BoundSession:
    """A session whose inputs and outputs are bound to memory of `device`; one run at a time.

    With `capture` the session was opened for CUDA graphs: the first MOST_CAPTURED sets of sizes
    that it runs are captured, each at the third run or before; others run as without.
    """

    def __init__(
        self, library: Any, session: Any, spec: GraphSpec, device: tuple[str, int], capture: bool
    ):
        self.library, self.session, self.spec = library, session, spec
        self.device, self.capture = device, capture
        self._captured: dict[object, Binding] = {}
        self._latest: tuple[object, Binding | None] = (None, None)
        self._lock = threading.Lock()

    def run(
        self, inputs: Mapping[str, Array], sizes: Mapping[str, int], names: Sequence[str]
    ) -> dict[str, Array]:
        """The outputs `names` of a run on inputs that were checked, as arrays of the caller's."""
        with self._lock:
            binding = self._binding(sizes, names)
            binding.upload(inputs)
            self.session.run_with_iobinding(binding.native, binding.options)
            return {name: own(value.numpy()) for name, value in binding.outputs.items()}

    def _binding(self, sizes: Mapping[str, int], names: Sequence[str]) -> "Binding":
        """The memory of these sizes and outputs; that of the run before is given back for it."""
        key = tuple(sorted(sizes.items())), tuple(names)
        if key in self._captured:
            return self._captured[key]
        if self.capture and len(self._captured) < MOST_CAPTURED:
            made = self._captured[key] = Binding(self, sizes, names, len(self._captured) + 1)
            return made
        known, binding = self._latest
        if binding is None or known != key:
            binding = None
            self._latest = None, None
            binding = Binding(self, sizes, names, NOT_CAPTURED)
            self._latest = key, binding
        return binding


def own(array: Array) -> Array:
    """An array that the next run leaves alone: of memory on the host the library gives a view."""
    return array if array.flags.owndata else array.copy()


class Binding:
    """Memory for the inputs and outputs of one set of sizes; `graph` numbers a captured graph."""

    def __init__(
        self, owner: BoundSession, sizes: Mapping[str, int], names: Sequence[str], graph: int
    ):
        library, spec = owner.library, owner.spec
        make = library.OrtValue.ortvalue_from_shape_and_type

        def memory(tensor: Any) -> Any:
            return make(tensor.shape(sizes), np.dtype(tensor.dtype).type, *owner.device)

        self.inputs = {tensor.name: memory(tensor) for tensor in spec.inputs}
        self.outputs = {t.name: memory(t) for t in spec.outputs if t.name in names}
        self.native = owner.session.io_binding()
        for name, value in self.inputs.items():
            self.native.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self.native.bind_ortvalue_output(name, value)
        self.options = library.RunOptions()
        self.options.only_execute_path_to_fetches = len(self.outputs) < len(spec.outputs)
        if owner.capture:
            self.options.add_run_config_entry("gpu_graph_id", str(graph))
        self._held: dict[str, Array] = {}

    def upload(self, inputs: Mapping[str, Array]) -> None:
        """Copy to the device what may differ from the run before: all but read-only arrays."""
        for name, value in self.inputs.items():
            array = inputs[name]
            if self._held.get(name) is array:
                continue
            self._held.pop(name, None)
            value.update_inplace(np.ascontiguousarray(array))
            if not array.flags.writeable:
                self._held[name] = array
