"""Published SIID and S2ID state dicts, which share all names but two."""

from typing import Any

import torch
from torch import Tensor

from reference.families.parts.published import Published, Renames, Shapes, holding, rename
from runtime.errors import ArtefactError, UsageError

DENOISER: Renames = [
    (r"^enc_blocks\.", "encoder."),
    (r"^dec_blocks\.", "decoder."),
    (r"^proj_to_latent\.", "color_in."),
    (r"^latent_to_epsilon\.(?:0\.)?", "eps_out."),
    (r"^film_proj\.", "film."),
    (r"^pos_embed\.", "position."),
    (r"^time_embed\.", "time."),
    (r"\.axial_norm\.", ".attention_norm.norm."),
    (r"\.cross_norm\.", ".cross_norm.norm."),
    (r"\.ffn_norm\.", ".ffn_norm.norm."),
    (r"\.axial_film\.film\.0\.", ".attention_norm.film."),
    (r"\.cross_film\.film\.0\.", ".cross_norm.film."),
    (r"\.ffn_film\.film\.0\.", ".ffn_norm.film."),
    (r"\.axial_attn\.row_mha\.", ".attention.row."),
    (r"\.axial_attn\.col_mha\.", ".attention.column."),
    (r"\.cross_attn\.mha\.", ".cross."),
    (r"\.ffn\.0\.", ".ffn.up."),
    (r"\.ffn\.3\.", ".ffn.down."),
    (r"\.axial_scalar$", ".attention_scale"),
    (r"\.cross_scalar$", ".cross_scale"),
    (r"\.ffn_scalar$", ".ffn_scale"),
    (r"\.final_scalar$", ".block_scale"),
    (r"\.sigma$", ".mask_width"),
]
TEXT: Renames = [(r"^token_proj\.", "project."), (r"^token_norm\.", "norm.")]
AXIAL = r"(enc|dec)_blocks\.\d+\.axial_attn\."
MASK = r"enc_blocks\.\d+\.sigma$"


def pair(files: list[Published], name: str) -> tuple[Published, Published]:
    """The denoiser's file and the text encoder's; raises UsageError where one is not there."""
    denoisers, texts = holding(files, AXIAL), holding(files, r"token_proj\.")
    if len(denoisers) != 1 or len(texts) != 1 or len(files) != 2:
        raise UsageError(
            f"{len(denoisers)} state dicts of {name} and {len(texts)} of a text encoder among "
            f"{len(files)} files; expected one of each: both are needed to draw. Pass both files"
        )
    return denoisers[0], texts[0]


def axial_sections(
    denoiser: Published, text: Published, heads: int, values: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The denoiser's section, `values` times the colours it has, and the condition's."""
    shapes, text_shapes = Shapes(denoiser), Shapes(text)
    width = shapes.at("proj_to_latent.weight", 0)
    out = next((key for key in denoiser.tensors if key.startswith("latent_to_epsilon.")), "")
    channels, rest = divmod(shapes.at(out, 0), values)
    if rest or width % heads:
        raise UsageError(
            f"{denoiser.path}: {shapes.at(out, 0)} values a token and width {width}; expected "
            f"multiples of {values} and {heads}. Give other --fold and --heads"
        )
    high, low = shapes.split("pos_embed.frequencies")
    time_high, time_low = shapes.split("time_embed.frequencies")
    section = {
        "channels": channels,
        "width": width,
        "encoder_blocks": shapes.blocks("enc_blocks"),
        "decoder_blocks": shapes.blocks("dec_blocks"),
        "heads": heads,
        "high_frequencies": high,
        "low_frequencies": low,
        "time_high_frequencies": time_high,
        "time_low_frequencies": time_low,
        "film_dim": shapes.at("film_proj.0.weight", 0),
        "share_weights": shares_weights(denoiser),
    }
    labels, tokens = text_shapes.at("token_proj.weight", 1), text_shapes.at("token_proj.weight", 0)
    if tokens % width:
        raise ArtefactError(f"{text.path}: {tokens} numbers; expected a multiple of width {width}")
    return section, {"labels": labels, "tokens": tokens // width}


def shares_weights(denoiser: Published) -> bool:
    """Whether rows and columns have one set of weights: stored twice, under both names."""
    state = denoiser.tensors
    rows = [key for key in state if ".axial_attn.row_mha." in key]
    return all(
        key.replace("row_mha", "col_mha") in state
        and torch.equal(state[key], state[key.replace("row_mha", "col_mha")])
        for key in rows
    )


def axial_tensors(
    denoiser: Published, text: Published, name: str, shared: bool
) -> dict[str, Tensor]:
    """All tensors by our names."""
    found = {}
    for key, tensor in rename(denoiser.tensors, DENOISER, name).items():
        if shared and ".attention.column." in key:
            continue
        parent, _, kind = key.rpartition(".in_proj_")
        if not parent:
            found[key.replace(".out_proj.", ".out.")] = tensor
            continue
        if len(tensor) % 3:
            raise ArtefactError(f"{denoiser.path}: {key} has {len(tensor)} rows; expected 3·d")
        for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[f"{parent}.{part}.{kind}"] = piece
    return found | rename(text.tensors, TEXT, "condition")
