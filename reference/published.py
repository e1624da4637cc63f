"""Convert checkpoints of the published code: three state dicts (`.pt`) into one checkpoint.

python -m reference.published r2ir.pt r2id.pt text.pt out.safetensors
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference import checkpoint
from reference.families.parts.embeddings import frequencies
from reference.families.r2.model import R2Models
from runtime import cli
from runtime.bundle.files import check_writable, read_bytes, sha256
from runtime.config import ConditionConfig, ModelConfig, R2IDConfig, R2IRConfig
from runtime.errors import ArtefactError, UsageError

# Published key (left) to ours (right), in the order in which they are tried.
RENAMES = {
    "r2ir": [
        (r"^enc_blocks\.", "encoder."),
        (r"^dec_blocks\.", "decoder."),
        (r"^color_to_embed_proj\.", "color_in."),
        (r"^pos_to_embed_proj\.", "query_in."),
        (r"^latent_to_embed_proj\.", "latent_in."),
        (r"^enc_out_proj\.0\.", "latent_out."),
        (r"^dec_out_proj\.0\.", "color_out."),
        (r"\.attn_ada\.", ".attention_norm."),
        (r"\.attn\.", ".attention."),
        (r"\.attn_scalar$", ".attention_scale"),
        (r"\.ffn_scalar$", ".ffn_scale"),
        (r"\.final_scalar$", ".block_scale"),
        (r"\.ffn\.0\.", ".ffn.up."),
        (r"\.ffn\.3\.", ".ffn.down."),
    ],
    "r2id": [
        (r"^enc_blocks\.", "encoder."),
        (r"^dec_blocks\.", "decoder."),
        (r"^proj_to_latent\.", "latent_in."),
        (r"^latent_to_epsilon\.", "eps_out."),
        (r"^film_proj\.", "film."),
        (r"\.self_ada\.", ".attention_norm."),
        (r"\.cross_ada\.", ".cross_norm."),
        (r"\.ffn_ada\.", ".ffn_norm."),
        (r"\.gb\.0\.", ".film."),
        (r"\.self_attn\.mha\.", ".attention."),
        (r"\.cross_attn\.mha\.", ".cross."),
        (r"\.self_scalar$", ".attention_scale"),
        (r"\.cross_scalar$", ".cross_scale"),
        (r"\.ffn_scalar$", ".ffn_scale"),
        (r"\.final_scalar$", ".block_scale"),
        (r"\.ffn\.net\.0\.", ".ffn.up."),
        (r"\.ffn\.net\.3\.", ".ffn.down."),
    ],
    "condition": [(r"^token_proj\.", "project."), (r"^token_norm\.", "norm.")],
}
LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
FREQUENCIES = ("pos_embed.frequencies", "time_embed.frequencies")
State = Mapping[str, Tensor]


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, read without running code; raises ArtefactError for anything more."""
    data = read_bytes(path, "a state dict (.pt)", "Pass r2ir.pt r2id.pt text.pt in this order")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ArtefactError(
            f"{path}: refused, since its pickle asks for more than tensors ({reason}). "
            "Save a plain state dict: torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ArtefactError(
            f"{path}: {len(data)} bytes that torch cannot read ({reason}); copy it again"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtefactError(f"{path}: holds {type(state).__name__}; expected a dict of tensors")
    return dict(state)


def rename(state: State, part: str) -> dict[str, Tensor]:
    """Our names and shapes: 1×1 convolutions `[out, in, 1, 1]` become matrices."""
    renamed = {}
    for key, tensor in state.items():
        if key in FREQUENCIES:
            continue
        for pattern, replacement in RENAMES[part]:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"\.([qkvo])(?:ut)?_proj\.", lambda m: f".{LETTERS[m[1]]}.", key)
        key = re.sub(r"\.norm_([qk])\.", lambda m: f".{LETTERS[m[1]]}_norm.", key)
        renamed[f"{part}.{key}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return renamed


class Shapes:
    """Reads numbers of a configuration off a state dict's shapes."""

    def __init__(self, state: State, path: Path):
        self.state, self.path = state, path

    def at(self, key: str, dimension: int) -> int:
        if key not in self.state or self.state[key].ndim <= dimension:
            raise ArtefactError(
                f"{self.path}: no tensor {key} of {dimension + 1} dimensions or more; expected a "
                "published checkpoint. Pass r2ir.pt r2id.pt text.pt in this order"
            )
        return self.state[key].shape[dimension]

    def blocks(self, prefix: str) -> int:
        pattern = re.compile(rf"{prefix}\.(\d+)\.")
        numbers = {int(match[1]) for key in self.state if (match := pattern.match(key))}
        return len(numbers)

    def low(self, key: str, high: int) -> int:
        """Low frequencies: what is left of all of them, checked against the stored values."""
        low = self.at(key, 0) - high
        if low < 0 or not torch.allclose(self.state[key], frequencies(high, low)):
            raise UsageError(
                f"{self.path}: {key} does not begin at π/2^{low}, as {high} high frequencies "
                f"of {low + high} would have it. Give the high frequencies of this model"
            )
        return low


def config_from_shapes(shapes: dict[str, Shapes], args: argparse.Namespace) -> ModelConfig:
    """The configuration, as far as shapes tell; heads and frequency splits are options."""
    r2ir, r2id, text = (shapes[part] for part in ("r2ir", "r2id", "condition"))
    width = r2id.at("proj_to_latent.weight", 0)
    return ModelConfig(
        name=args.name,
        r2ir=R2IRConfig(
            color_channels=r2ir.at("dec_out_proj.0.weight", 0),
            latent_channels=r2ir.at("enc_out_proj.0.weight", 0),
            width=r2ir.at("color_to_embed_proj.weight", 0),
            encoder_blocks=r2ir.blocks("enc_blocks"),
            decoder_blocks=r2ir.blocks("dec_blocks"),
            heads=args.r2ir_heads,
            high_frequencies=args.high_frequencies,
            low_frequencies=r2ir.low("pos_embed.frequencies", args.high_frequencies),
        ),
        r2id=R2IDConfig(
            latent_channels=r2id.at("latent_to_epsilon.weight", 0),
            width=width,
            encoder_blocks=r2id.blocks("enc_blocks"),
            decoder_blocks=r2id.blocks("dec_blocks"),
            heads=args.r2id_heads,
            high_frequencies=args.high_frequencies,
            low_frequencies=r2id.low("pos_embed.frequencies", args.high_frequencies),
            time_high_frequencies=args.time_high_frequencies,
            time_low_frequencies=r2id.low("time_embed.frequencies", args.time_high_frequencies),
            film_dim=r2id.at("film_proj.0.weight", 0),
        ),
        condition=ConditionConfig(
            labels=text.at("token_proj.weight", 1),
            tokens=text.at("token_proj.weight", 0) // width,
        ),
        pixels_per_latent=args.pixels_per_latent,
        default_latent=(8, 8),
    )


def convert(args: argparse.Namespace) -> None:
    """Read the three state dicts and write the checkpoint."""
    check_writable(args.out)
    paths = {"r2ir": args.r2ir, "r2id": args.r2id, "condition": args.text}
    states = {part: read_state(path) for part, path in paths.items()}
    shapes = {part: Shapes(states[part], path) for part, path in paths.items()}
    config = config_from_shapes(shapes, args)
    for part, heads in (("r2ir", config.r2ir), ("r2id", config.r2id)):
        if heads.width % heads.heads:
            raise UsageError(
                f"--{part}-heads {heads.heads} does not divide the width {heads.width}"
            )
    models = R2Models(config)
    renamed = {k: v for part, state in states.items() for k, v in rename(state, part).items()}
    checkpoint.load_tensors(models, renamed, args.r2ir.parent)
    sources = {part: sha256(path.read_bytes()) for part, path in paths.items()}
    checkpoint.save(args.out, models, {"published": sources}, torch.float32)
    print(f"checkpoint: {args.out}")


def parser() -> argparse.ArgumentParser:
    """The command line's options; their defaults are the published values."""
    p = cli.parser("reference.published", __doc__)
    p.add_argument("r2ir", type=Path, help="state dict of R2IR")
    p.add_argument("r2id", type=Path, help="state dict of R2ID")
    p.add_argument("text", type=Path, help="state dict of the label condition")
    p.add_argument("out", type=Path, help="checkpoint to write (.safetensors)")
    options: list[tuple[str, Any, str]] = [
        ("r2ir-heads", 6, "attention heads of R2IR"),
        ("r2id-heads", 6, "attention heads of R2ID"),
        ("high-frequencies", 10, "positional frequencies from π up"),
        ("time-high-frequencies", 7, "time frequencies from π up"),
        ("pixels-per-latent", 8, "image pixels per latent cell in training"),
    ]
    for name, default, text in options:
        kind = cli.number(0 if "frequencies" in name else 1, 1024, int)
        p.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")
    p.add_argument("--name", default="published", help="the model's name")
    return p


if __name__ == "__main__":
    cli.run(convert, parser())
