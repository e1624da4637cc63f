"""How S2ID is exported."""

from export.families.parts import axial_bundle
from export.families.parts.pixels import decode, interface
from export.to_onnx import GraphSource
from reference.families.s2id.model import S2IDModels
from runtime.bundle.interface import CosineData

__all__ = ["decode", "interface", "schedule", "sources"]


def schedule(models: S2IDModels) -> CosineData:
    """The schedule that every S2ID is trained with."""
    return CosineData()


def sources(models: S2IDModels) -> list[GraphSource]:
    """Every graph of S2ID, in the order in which the runtime needs them."""
    return axial_bundle.sources("s2id", models.s2id, models.condition)
