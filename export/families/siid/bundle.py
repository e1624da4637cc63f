"""How SIID is exported."""

from export.families.parts import axial_bundle
from export.families.parts.pixels import decode, interface
from export.to_onnx import GraphSource
from reference.families.siid.model import SIIDModels
from runtime.bundle.interface import CosineData

__all__ = ["decode", "interface", "schedule", "sources"]


def schedule(models: SIIDModels) -> CosineData:
    """The schedule that every SIID is trained with."""
    return CosineData()


def sources(models: SIIDModels) -> list[GraphSource]:
    """Every graph of SIID, in the order in which the runtime needs them."""
    return axial_bundle.sources("siid", models.siid, models.condition)
