"""What each family hoists and how its graphs are written, registered here by its reference."""

from typing import Any, Protocol

from torch import Tensor

from export.families.hdit import bundle as hdit
from export.families.r2 import bundle as r2
from export.families.s2id import bundle as s2id
from export.families.sid2 import bundle as sid2
from export.families.siid import bundle as siid
from export.to_onnx import GraphSource
from reference.families.hdit.model import HDiTModels
from reference.families.r2.model import R2Models
from reference.families.s2id.model import S2IDModels
from reference.families.sid2.model import SiD2Models
from reference.families.siid.model import SIIDModels
from runtime.bundle.interface import Interface, ScheduleData


class Family(Protocol):
    """What a family's module gives the export; `models` are its reference models in eval mode."""

    def sources(self, models: Any) -> list[GraphSource]:
        """Every graph, in the order in which the runtime needs them."""
        ...

    def interface(self, models: Any, labels: tuple[str, ...]) -> Interface:
        """Names, channels and the size rule; `labels` as the checkpoint names them, or none."""
        ...

    def schedule(self, models: Any) -> ScheduleData:
        """The noise schedule to sample with."""
        ...

    def decode(self, models: Any, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """The reference's pixels `[B, c, *size]` of a latent `[B, C, H, W]`."""
        ...


FAMILIES: dict[type, Family] = {
    R2Models: r2,
    SIIDModels: siid,
    S2IDModels: s2id,
    HDiTModels: hdit,
    SiD2Models: sid2,
}


def family_of(models: Any) -> Family:
    """The family of a checkpoint's models."""
    return FAMILIES[type(models)]
