"""The graphs of a family of axial transformers, with their tensors' axes."""

from export.families.parts import axial
from export.families.parts.pixels import cells
from export.to_onnx import GraphSource, graph_source
from reference.families.parts.axial import AxialDenoiser
from reference.families.parts.text import LabelCondition
from runtime.bundle.manifest import Axis


def sources(name: str, model: AxialDenoiser, condition: LabelCondition) -> list[GraphSource]:
    """Every graph, their names beginning with the family's."""
    config, tokens = model.config, condition.tokens
    blocks, width, rank = config.decoder_blocks, config.width, config.heads * tokens
    labels = condition.project.in_features
    film = axial.Film(model, tokens)
    latent: tuple[Axis, ...] = ("batch", config.channels, "height", "width")
    tall, wide = cells(model.fold, model.fold)
    places: dict[str, tuple[Axis, ...]] = {
        "position_y": (tall, width),
        "position_x": (wide, width),
    }
    if masked := axial.is_masked(model):
        places |= {"place_x": (wide,), "place_y": (tall,)}
    text: dict[str, tuple[Axis, ...]] = {
        "text_k": (blocks, width, rank),
        "text_bias": (blocks, rank),
        "text_v": (blocks, rank, width),
    }
    if tokens == 1:
        text = {"text": (blocks, width)}
    kind = axial.OneToken if tokens == 1 else axial.Text
    denoise = axial.MaskedDenoise if masked else axial.Denoise
    prompt = {key: ("conditions", *axes) for key, axes in text.items()}
    step = {key: ("conditions", "batch", *axes) for key, axes in text.items()}
    return [
        graph_source(
            f"{name}_position",
            "size",
            axial.Position(model),
            {"coordinates": ("height", "width", 4)},
            places,
        ),
        graph_source(
            f"{name}_film",
            "schedule",
            film,
            {"alpha_bar": ("steps",)},
            {"film": ("steps", film.width)},
        ),
        graph_source(
            f"{name}_condition",
            "prompt",
            kind(model, condition),
            {"condition": ("conditions", labels)},
            prompt,
        ),
        graph_source(
            name,
            "step",
            denoise(model, tokens),
            {"latent": latent, **places, "film": (film.width,), **step},
            {"eps": ("conditions", *latent)},
        ),
    ]
