"""How SIID is trained: one stage, as published."""

from typing import Any

from reference.families.parts.axial_training import KEYS, AxialTask, dropouts
from reference.families.parts.config import read
from reference.families.parts.training import Stage, take_over
from reference.families.siid.model import SIIDModel, SIIDModels


class SIIDTask(AxialTask):
    """The task of the family's denoiser."""

    family = "siid"


STAGES = (Stage("siid", SIIDTask, KEYS, ("siid", "condition")),)


def build(config: dict[str, Any], source: str) -> SIIDModels:
    """Fresh models with the configuration's dropouts."""
    return SIIDModels(read(SIIDModel, config["model"], source), dropouts(config["siid"]))


def start_from(models: SIIDModels, other: SIIDModels) -> list[str]:
    """Take over the weights that fit; returns the names of those that do not."""
    return take_over(models.state_dict(), other.state_dict())
