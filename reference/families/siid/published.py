"""SIID's published state dicts: the denoiser's and its text encoder's."""

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
from reference.families.siid.model import SIIDModel
from runtime.errors import UsageError


def recognises(files: list[Published]) -> bool:
    """An axial denoiser whose encoder blocks have a mask."""
    return bool(holding(files, AXIAL) and holding(files, MASK))


def convert(
    files: list[Published], args: argparse.Namespace
) -> tuple[SIIDModel, dict[str, Tensor]]:
    """The configuration and all tensors by our names."""
    denoiser, text = pair(files, "SIID")
    if args.heads is None or args.fold is None:
        raise UsageError(
            f"{denoiser.path}: SIID, whose heads and side of a token its shapes do not tell. "
            "Give --heads N --fold N (the published model: --heads 8 --fold 8)"
        )
    section, condition = axial_sections(denoiser, text, args.heads, args.fold**2)
    model = {
        "name": args.name,
        "siid": section | {"fold": args.fold},
        "condition": condition,
        "default_size": [8 * args.fold, 8 * args.fold],
    }
    tensors = axial_tensors(denoiser, text, "siid", section["share_weights"])
    return read(SIIDModel, model, str(denoiser.path)), tensors
