"""Torch-free runtime: numpy around the engines of a bundle.

`open_bundle(path)` gives a `Pipeline` with `generate`, `encode`, `decode` and `resample`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline.pipeline import Pipeline, open_bundle

__all__ = ["Pipeline", "open_bundle"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for, so that `--help` stays quick."""
    if name in __all__:
        from runtime.pipeline import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
