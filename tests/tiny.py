"""A bundle of a tiny model with random weights: python -m tests.tiny build/tiny [CONFIG]."""

import sys
from pathlib import Path
from typing import Any

import torch

from export.__main__ import main as export
from reference import checkpoint
from reference.train import build_models, read_config


def tiny_models(config: str = "tiny") -> Any:
    """A tiny configuration with no weight left at a special value such as 0 or 1."""
    models = build_models(read_config(config), config).eval().requires_grad_(False)
    torch.manual_seed(1)
    for parameter in models.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return models


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tiny.safetensors"
    models = tiny_models(*sys.argv[2:])
    checkpoint.save(path, models, {"labels": list("abcdefghij")}, torch.float32)
    sys.argv = ["export", "--checkpoint", str(path), "--out", str(out)]
    export()
