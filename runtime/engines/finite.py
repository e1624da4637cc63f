"""Engines whose results are checked: no NaN and no infinity reaches a picture or a file."""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.bundle.manifest import REBUILD, Array
from runtime.engines import Engine
from runtime.errors import NumericalError


class FiniteEngine:
    """An engine of a graph in `file` that raises NumericalError where a result is not finite."""

    def __init__(self, engine: Engine, file: str):
        self.engine, self.file, self.provider = engine, file, engine.provider

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph and check what it gives; see `Engine.run`."""
        found = self.engine.run(inputs, outputs)
        for name, array in found.items():
            if not is_finite(array):
                given = [f"{key} too" for key, value in inputs.items() if not is_finite(value)]
                raise NumericalError(
                    f"{self.file}: found NaN or infinity in {', '.join([name, *given])}; expected "
                    f"finite numbers. Try --precision fp32; if it stays: {REBUILD}"
                )
        return found


def is_finite(array: Array) -> bool:
    """Whether no number is NaN or infinite; whole numbers never are."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
