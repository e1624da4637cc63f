"""k-diffusion's HDiT: a slim .safetensors or a training .pt, with its JSON configuration."""

import argparse
from typing import Any

import torch
from torch import Tensor

from reference.families.hdit.config import HDiTModel
from reference.families.hdit.layers import rotation_frequencies
from reference.families.hdit.model import AUGMENTATIONS
from reference.families.parts.config import read
from reference.families.parts.published import Published, Shapes, holding
from runtime.errors import ArtefactError, UsageError

TYPE = "image_transformer_v2"
HEAD_DIM, KERNEL = 64, 7  # what k-diffusion takes where a configuration names no attention
EXTRA = "mapping_cond_in_proj.weight"
FREQUENCIES = ".pos_emb.freqs"
ROUNDING = 2e-3  # of frequencies that were stored in half precision


def recognises(files: list[Published]) -> bool:
    """A network with a patch map and a mapping network."""
    return bool(holding(files, r"patch_in\.proj\.weight$") and holding(files, r"mapping\.in_norm"))


def convert(
    files: list[Published], args: argparse.Namespace
) -> tuple[HDiTModel, dict[str, Tensor]]:
    """The configuration and all tensors by our names, which are k-diffusion's."""
    if len(files) != 1:
        raise UsageError(f"{len(files)} files of tensors; expected HDiT's one. Pass it alone")
    file = files[0]
    model, classes = settings_of(file)
    config = read(HDiTModel, sections(file, model, classes, args.name), str(file.path))
    check_frequencies(file, config)
    tensors = {k: v for k, v in file.tensors.items() if not k.endswith(FREQUENCIES)}
    for name, tensor in tensors.items():
        if name.endswith("self_attn.scale") and bool((tensor < 0).any()):
            raise ArtefactError(f"{file.path}: {name} is negative; expected the scale of cosines")
    return config, {f"hdit.{name}": tensor for name, tensor in tensors.items()}


def settings_of(file: Published) -> tuple[dict[str, Any], int | None]:
    """The model's settings and its classes, where they are named; raises for another model."""
    settings = file.settings
    if settings is None:
        raise UsageError(
            f"{file.path}: HDiT, whose patch, attention and noise levels its shapes do not tell. "
            "Give k-diffusion's configuration: --config FILE.json"
        )
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict) or model.get("type") != TYPE:
        found = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise ArtefactError(f"{file.path}: a model of type {found!r}; expected {TYPE!r}")
    if model.get("has_variance"):
        raise ArtefactError(f"{file.path}: has_variance is set; expected a model of x0 alone")
    dataset = settings.get("dataset", {})
    classes = dataset.get("num_classes") if isinstance(dataset, dict) else None
    return model, classes


def sections(
    file: Published, model: dict[str, Any], classes: int | None, name: str
) -> dict[str, Any]:
    """The configuration: sizes off the shapes, the rest out of k-diffusion's settings."""
    shapes = Shapes(file)
    try:
        patch = model["patch_size"]
        patch = [patch, patch] if isinstance(patch, int) else list(patch)
        count = shapes.blocks("down_levels") + 1
        attentions = model.get("self_attns") or [{"type": "neighborhood"}] * (count - 1) + [
            {"type": "global"}
        ]
        dropouts = model.get("dropout_rate", 0.0)
        dropouts = dropouts if isinstance(dropouts, list) else [dropouts] * count
        levels = [
            level(shapes, index, count, *given)
            for index, given in enumerate(zip(attentions, dropouts, strict=True))
        ]
        found = shapes.at("class_emb.weight", 0) - 1 if "class_emb.weight" in shapes.state else 0
        mapping_width = shapes.at("mapping.in_norm.scale", 0)
        config = {
            "channels": shapes.at("patch_in.proj.weight", 1) // (patch[0] * patch[1]),
            "patch": patch,
            "levels": levels,
            "classes": found,
            "mapping_width": mapping_width,
            "mapping_depth": shapes.blocks(r"mapping\.blocks"),
            "mapping_d_ff": mapping_d_ff(shapes, 3 * mapping_width),
            "mapping_cond_dim": shapes.at(EXTRA, 1) if EXTRA in shapes.state else 0,
            "mapping_dropout": float(model.get("mapping_dropout_rate", 0.0)),
            "sigma_data": float(model.get("sigma_data", 1.0)),
        }
        sizes = {key: float(model[key]) for key in ("sigma_min", "sigma_max")}
        told = {
            "widths": [level["width"] for level in levels],
            "depths": [level["depth"] for level in levels],
            "input_channels": config["channels"],
            "num_classes": found,
        }
        given = {key: model.get(key, value) for key, value in told.items()}
        given["num_classes"] = found if classes is None else classes
        size = model["input_size"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtefactError(
            f"{file.path}: its configuration has no usable {error}; expected k-diffusion's, with "
            "patch_size, sigma_min, sigma_max, input_size and one self_attns per level"
        ) from None
    if told != given:
        raise ArtefactError(
            f"{file.path}: tensors of {told} with a configuration of {given}; expected one model's"
        )
    return {"name": name, "hdit": config, "default_size": size, **sizes}


def level(
    shapes: Shapes, index: int, count: int, attention: dict[str, Any], dropout: float
) -> dict[str, Any]:
    """One level's section."""
    prefix = "mid_level" if index == count - 1 else rf"down_levels\.{index}"
    key = prefix.replace("\\", "") + ".0."
    width = shapes.at(f"{key}ff.up_proj.weight", 1)
    kind = attention["type"]
    windows = {"neighborhood": "kernel_size", "shifted-window": "window_size"}
    heads = shapes.at(f"{key}self_attn.scale", 0) if kind != "none" else 0
    head_dim = width // heads if heads else int(attention.get("d_head", HEAD_DIM))
    if head_dim != attention.get("d_head", head_dim):
        raise ValueError(f"d_head ({attention['d_head']} for {heads} heads of width {width})")
    window = attention.get(windows[kind], KERNEL) if kind in windows else 0
    return {
        "width": width,
        "depth": shapes.blocks(prefix),
        "d_ff": shapes.at(f"{key}ff.down_proj.weight", 1),
        "attention": kind,
        "head_dim": head_dim,
        "window": window,
        "dropout": float(dropout),
    }


def mapping_d_ff(shapes: Shapes, default: int) -> int:
    """The mapping network's hidden width; a network without blocks has none to tell."""
    key = "mapping.blocks.0.down_proj.weight"
    return shapes.at(key, 1) if key in shapes.state else default


def check_frequencies(file: Published, config: HDiTModel) -> None:
    """Raise ArtefactError where stored frequencies are not those that are computed anew."""
    for key, stored in file.tensors.items():
        if not key.endswith(FREQUENCIES):
            continue
        heads, count = stored.shape
        wanted = rotation_frequencies(heads, 8 * count).float()
        if not torch.allclose(stored.float(), wanted, rtol=ROUNDING):
            raise ArtefactError(
                f"{file.path}: {key} is not log-spaced from π to 10π; expected {TYPE}'s"
            )
    if Shapes(file).at("aug_emb.weight", 1) != AUGMENTATIONS:
        raise ArtefactError(f"{file.path}: aug_emb.weight; expected {AUGMENTATIONS} columns")
