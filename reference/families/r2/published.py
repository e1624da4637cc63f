"""R2's published checkpoints: three state dicts, of R2IR, of R2ID and of the text encoder."""

import argparse

from torch import Tensor

from reference.families.parts.config import TextConfig
from reference.families.parts.published import Published, Renames, Shapes, holding, rename
from reference.families.r2.config import ModelConfig, R2IDConfig, R2IRConfig
from runtime.errors import UsageError

# Published key (left) to ours (right), in the order in which they are tried.
RENAMES: dict[str, Renames] = {
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
MARKS = {  # of each state dict, a key that the others have not
    "r2ir": r"color_to_embed_proj\.",
    "r2id": r"(enc|dec)_blocks\.\d+\.self_attn\.",
    "condition": r"token_proj\.",
}


def recognises(files: list[Published]) -> bool:
    """A resampler or a denoiser with linear attention."""
    return bool(holding(files, MARKS["r2ir"]) or holding(files, MARKS["r2id"]))


def convert(
    files: list[Published], args: argparse.Namespace
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and all tensors by our names, whatever the order of the files."""
    found = {part: holding(files, mark) for part, mark in MARKS.items()}
    if len(files) != len(MARKS) or any(len(of) != 1 for of in found.values()):
        counts = {part: len(of) for part, of in found.items()}
        raise UsageError(
            f"{len(files)} files hold {counts}; expected one state dict each. "
            "Pass r2ir.pt r2id.pt text.pt"
        )
    parts = {part: of[0] for part, of in found.items()}
    config = config_from_shapes({part: Shapes(file) for part, file in parts.items()}, args)
    for part, own in (("r2ir", config.r2ir), ("r2id", config.r2id)):
        if own.width % own.heads:
            raise UsageError(
                f"{parts[part].path}: --{part}-heads {own.heads} does not divide the width "
                f"{own.width}. Give the heads of this model"
            )
    tensors: dict[str, Tensor] = {}
    for part, file in parts.items():
        tensors |= rename(file.tensors, RENAMES[part], part)
    return config, tensors


def config_from_shapes(shapes: dict[str, Shapes], args: argparse.Namespace) -> ModelConfig:
    """The configuration, as far as shapes and stored frequencies tell; heads are options."""
    r2ir, r2id, text = (shapes[part] for part in ("r2ir", "r2id", "condition"))
    width = r2id.at("proj_to_latent.weight", 0)
    ir_high, ir_low = r2ir.split("pos_embed.frequencies")
    id_high, id_low = r2id.split("pos_embed.frequencies")
    time_high, time_low = r2id.split("time_embed.frequencies")
    return ModelConfig(
        name=args.name,
        r2ir=R2IRConfig(
            color_channels=r2ir.at("dec_out_proj.0.weight", 0),
            latent_channels=r2ir.at("enc_out_proj.0.weight", 0),
            width=r2ir.at("color_to_embed_proj.weight", 0),
            encoder_blocks=r2ir.blocks("enc_blocks"),
            decoder_blocks=r2ir.blocks("dec_blocks"),
            heads=args.r2ir_heads,
            high_frequencies=ir_high,
            low_frequencies=ir_low,
        ),
        r2id=R2IDConfig(
            latent_channels=r2id.at("latent_to_epsilon.weight", 0),
            width=width,
            encoder_blocks=r2id.blocks("enc_blocks"),
            decoder_blocks=r2id.blocks("dec_blocks"),
            heads=args.r2id_heads,
            high_frequencies=id_high,
            low_frequencies=id_low,
            time_high_frequencies=time_high,
            time_low_frequencies=time_low,
            film_dim=r2id.at("film_proj.0.weight", 0),
        ),
        condition=TextConfig(
            labels=text.at("token_proj.weight", 1),
            tokens=text.at("token_proj.weight", 0) // width,
        ),
        pixels_per_latent=args.pixels_per_latent,
        default_latent=(8, 8),
    )
