"""Model families, a line each: what reading, training and converting their checkpoints needs."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from reference.families.hdit import published as hdit_published
from reference.families.hdit import training as hdit_training
from reference.families.hdit.config import HDiTModel
from reference.families.hdit.model import HDiTModels
from reference.families.parts.config import read
from reference.families.parts.models import Models
from reference.families.parts.published import Published
from reference.families.parts.training import Stage
from reference.families.r2 import published as r2_published
from reference.families.r2 import training as r2_training
from reference.families.r2.config import ModelConfig
from reference.families.r2.model import R2Models
from reference.families.s2id import published as s2id_published
from reference.families.s2id import training as s2id_training
from reference.families.s2id.model import S2IDModel, S2IDModels
from reference.families.sid2 import training as sid2_training
from reference.families.sid2.config import SiD2Model
from reference.families.sid2.model import SiD2Models
from reference.families.siid import published as siid_published
from reference.families.siid import training as siid_training
from reference.families.siid.model import SIIDModel, SIIDModels


class Training(Protocol):
    """A family's module `training`."""

    STAGES: tuple[Stage, ...]

    def build(self, config: dict[str, Any], source: str) -> Models:
        """Fresh models of a whole training configuration, drawn from torch's generator."""
        ...

    def start_from(self, models: Any, other: Any) -> list[str]:
        """Take over weights in place; returns the names of those that do not fit."""
        ...


class Conversion(Protocol):
    """A family's module `published`."""

    def recognises(self, files: list[Published]) -> bool:
        """Are these published checkpoints of the family?"""
        ...

    def convert(
        self, files: list[Published], args: argparse.Namespace
    ) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and all tensors by our names."""
        ...


@dataclass(frozen=True)
class Family:
    """A family: its configuration, its models, how it learns, how published weights are read.

    `published` is None where nothing is published.
    """

    name: str
    config: type
    models: Callable[[Any], Models]
    training: Training
    published: Conversion | None = None

    def open(self, config: Any, source: str) -> Models:
        """Models of a [model] section; raises ArtefactError naming `source`."""
        return self.models(read(self.config, config, source))


R2 = "r2"  # the family of checkpoints and configurations that name none
FAMILIES = {
    family.name: family
    for family in (
        Family(R2, ModelConfig, R2Models, r2_training, r2_published),
        Family("siid", SIIDModel, SIIDModels, siid_training, siid_published),
        Family("s2id", S2IDModel, S2IDModels, s2id_training, s2id_published),
        Family("hdit", HDiTModel, HDiTModels, hdit_training, hdit_published),
        Family("sid2", SiD2Model, SiD2Models, sid2_training),
    )
}


def family_of(models: Models) -> Family:
    """The family that `models` are of."""
    return next(family for family in FAMILIES.values() if family.models is type(models))
