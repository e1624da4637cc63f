"""S2ID's published state dicts: the denoiser's and its text encoder's."""

import argparse

from torch import Tensor

from reference.families.parts.axial_published import (
    AXIAL,
    MASK,
    axial_sections,
    axial_tensors,
    pair,
)
from reference.families.parts.config import read
from reference.families.parts.published import Published, holding
from reference.families.s2id.model import S2IDModel
from runtime.errors import UsageError

DEFAULT_SIZE = (28, 28)  # what the published model was trained at


def recognises(files: list[Published]) -> bool:
    """An axial denoiser without masks."""
    return bool(holding(files, AXIAL)) and not holding(files, MASK)


def convert(
    files: list[Published], args: argparse.Namespace
) -> tuple[S2IDModel, dict[str, Tensor]]:
    """The configuration and all tensors by our names."""
    denoiser, text = pair(files, "S2ID")
    if args.heads is None:
        raise UsageError(
            f"{denoiser.path}: S2ID, whose heads its shapes do not tell. Give --heads N "
            "(the published model: --heads 8)"
        )
    section, condition = axial_sections(denoiser, text, args.heads, 1)
    model = {
        "name": args.name,
        "s2id": section,
        "condition": condition,
        "default_size": DEFAULT_SIZE,
    }
    tensors = axial_tensors(denoiser, text, "s2id", section["share_weights"])
    return read(S2IDModel, model, str(denoiser.path)), tensors
