"""A bundle of a tiny model with random weights: python -m tests.tiny build/tiny."""

import sys
from pathlib import Path

import torch

from export.__main__ import main as export
from reference import checkpoint
from reference.families.r2.model import R2Models
from reference.train import build_models, read_config


def tiny_models() -> R2Models:
    """The tiny configuration with no weight left at a special value such as 0 or 1."""
    models = build_models(read_config("tiny"), "tiny").eval().requires_grad_(False)
    torch.manual_seed(1)
    for parameter in models.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return models


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tiny.safetensors"
    checkpoint.save(path, tiny_models(), {"labels": list("abcdefghij")}, torch.float32)
    sys.argv = ["export", "--checkpoint", str(path), "--out", str(out)]
    export()
