"""A published checkpoint as read from its files, and what all families do with one."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.families.parts.embeddings import frequencies
from runtime.errors import ArtefactError

State = Mapping[str, Tensor]
Renames = list[tuple[str, str]]  # pattern of a published key, ours, in the order of trying
LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}


@dataclass(frozen=True)
class Published:
    """One file: its tensors, and the JSON configuration that lay in it or came with it."""

    path: Path
    tensors: State
    settings: Any = None


def holding(files: Iterable[Published], key: str) -> list[Published]:
    """The files with a tensor whose name the pattern `key` matches from its start."""
    pattern = re.compile(key)
    return [file for file in files if any(map(pattern.match, file.tensors))]


def rename(state: State, renames: Renames, prefix: str) -> dict[str, Tensor]:
    """Our names under `prefix`; 1×1 convolutions `[out, in, 1, 1]` become matrices."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith(".frequencies"):
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"\.([qkvo])(?:ut)?_proj\.", lambda m: f".{LETTERS[m[1]]}.", key)
        key = re.sub(r"\.norm_([qk])\.", lambda m: f".{LETTERS[m[1]]}_norm.", key)
        renamed[f"{prefix}.{key}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return renamed


class Shapes:
    """Reads numbers of a configuration off a state dict's shapes."""

    def __init__(self, file: Published):
        self.state, self.path = file.tensors, file.path

    def at(self, key: str, dimension: int) -> int:
        if key not in self.state or self.state[key].ndim <= dimension:
            raise ArtefactError(
                f"{self.path}: no tensor {key} of {dimension + 1} dimensions or more; expected a "
                "published checkpoint, whole. Copy it again"
            )
        return self.state[key].shape[dimension]

    def blocks(self, prefix: str) -> int:
        """How many numbers follow `prefix` in names."""
        pattern = re.compile(rf"{prefix}\.(\d+)\.")
        return len({match[1] for key in self.state if (match := pattern.match(key))})

    def split(self, key: str) -> tuple[int, int]:
        """(high, low) frequencies: their buffer holds π·2^(i - low); low are those below π."""
        count = self.at(key, 0)
        stored = self.state[key].float()
        low = int((stored < 0.75 * math.pi).sum())
        if not torch.allclose(stored, frequencies(count - low, low), rtol=2e-3):
            raise ArtefactError(
                f"{self.path}: {key} holds {stored.tolist()}; expected octaves of π that begin at "
                "π or below it. Pass a published checkpoint"
            )
        return count - low, low
