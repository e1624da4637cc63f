"""How S2ID is trained: one stage, as published."""

from typing import Any

from reference.families.parts.axial_training import KEYS, AxialTask, dropouts
from reference.families.parts.config import read
from reference.families.parts.training import Stage, take_over
from reference.families.s2id.model import S2IDModel, S2IDModels


class S2IDTask(AxialTask):
    """The task of the family's denoiser."""

    family = "s2id"


STAGES = (Stage("s2id", S2IDTask, KEYS, ("s2id", "condition")),)


def build(config: dict[str, Any], source: str) -> S2IDModels:
    """Fresh models with the configuration's dropouts."""
    return S2IDModels(read(S2IDModel, config["model"], source), dropouts(config["s2id"]))


def start_from(models: S2IDModels, other: S2IDModels) -> list[str]:
    """Take over the weights that fit; returns the names of those that do not."""
    return take_over(models.state_dict(), other.state_dict())
