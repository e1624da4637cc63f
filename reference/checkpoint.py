"""Checkpoints: one safetensors file, its tensors named by the network that they belong to.

The metadata holds the family's name (R2's where there is none) and two JSON texts: `config` (what
the family's [model] says) and `provenance` (how it was made).
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from reference.families import FAMILIES, R2, Family, family_of
from reference.families.parts.models import Models
from runtime.bundle.files import atomic_write, parsing, read_bytes, sha256
from runtime.bundle.interface import Text
from runtime.errors import ArtefactError

SHIPPED = Path(__file__).parent / "weights" / "mnist.safetensors"
LONGEST_HEADER = 100 << 20  # as the safetensors format allows
HOW = "Train one with: python -m reference.train"
LISTED = 8  # differences named in one error
WHAT, AGAIN = "checkpoint", "Copy it again"
SPARE = 1000  # tensors that a file may lack and still have each of them named
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened: its family's models in eval mode and float32, provenance, file hash."""

    family: Family
    models: Any
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def save(path: Path, models: Models, provenance: dict[str, Any], dtype: torch.dtype) -> None:
    """Write `models` as `dtype` (float16 halves the file); whole or not at all.

    Buffers stay float32: what is drawn once and never learnt must come back as it was.
    """
    drawn = {name for name, _ in models.named_buffers()}
    state = {
        name: tensor.to(torch.float32 if name in drawn else dtype).contiguous()
        for name, tensor in models.state_dict().items()
    }
    metadata = {
        "family": family_of(models).name,
        "config": json.dumps(msgspec.to_builtins(models.config)),
        "provenance": json.dumps(provenance),
    }
    with atomic_write(path) as file:
        file.write(save_safetensors(state, metadata))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; raises ArtefactError listing every tensor that does not fit."""
    data = read_bytes(
        path, "a checkpoint (.safetensors)", "Train one with: python -m reference.train"
    )
    tensors, metadata = parse(data, path)
    missing = [key for key in ("config", "provenance") if key not in metadata]
    if missing:
        raise ArtefactError(
            f"{path}: metadata without {missing}; expected a checkpoint of this toolkit. "
            "Convert published weights with: python -m reference.published"
        )
    family = FAMILIES.get(metadata.get("family", R2))
    if family is None:
        raise ArtefactError(
            f"{path}: of the family {metadata['family']!r}; expected one of {sorted(FAMILIES)}"
        )
    config = _json(metadata["config"], path)
    with parsing(path, WHAT, AGAIN):
        # Tensors without numbers first: what a configuration promises takes no memory yet.
        with torch.device("meta"), at_most(len(tensors)):
            check_tensors(family.open(config, f"{path}"), tensors, path)
        models = family.open(config, f"{path}")
    load_tensors(models, tensors, path)
    provenance = _json(metadata["provenance"], path)
    with parsing(path, "provenance of a checkpoint", AGAIN):
        msgspec.convert(provenance, Provenance)
    return Checkpoint(family, models.eval().requires_grad_(False), provenance, sha256(data))


class Provenance(msgspec.Struct):
    """What is read of a checkpoint's provenance, which may hold anything else."""

    labels: tuple[Text, ...] | None = None


@contextlib.contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stop models that are built in the block at far more parameters than a file has tensors."""
    left = [2 * tensors + SPARE]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        left[0] -= parameter is not None
        if left[0] < 0:
            raise ValueError(f"its configuration promises far more than its {tensors} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def parse(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file's bytes; raises ArtefactError."""
    metadata = read_metadata(data, path)
    with parsing(path, "whole safetensors file", AGAIN):
        return load_safetensors(data), metadata


def read_metadata(data: bytes, path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file's bytes, its header's length checked first."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(LONGEST_HEADER, len(data) - 8):
        raise ArtefactError(
            f"{path}: header of {length} bytes in a file of {len(data)}; expected a whole "
            "safetensors file. Copy it again"
        )
    header = _json(data[8 : 8 + length], path)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtefactError(f"{path}: header is no JSON object; expected a safetensors file")
    return metadata


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy `tensors` into `module`; raises ArtefactError naming whatever differs."""
    check_tensors(module, tensors, path)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def check_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ArtefactError naming whatever differs between `tensors` and those of `module`."""
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        found, expected = tensors[name], wanted[name]
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)}; expected {tuple(expected.shape)}"
            problems.append(f"{name} is {shapes}")
        elif found.dtype not in DTYPES:
            problems.append(f"{name} is {found.dtype}; expected a floating-point type")
        elif not torch.isfinite(found).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "; ".join(sorted(problems)[:LISTED])
        raise ArtefactError(f"{path}: does not fit its configuration: {listed}{more}")


def _json(text: str | bytes, path: Path) -> Any:
    with parsing(path, "JSON in its metadata", AGAIN):
        return json.loads(text)
