"""How R2 is exported: its graphs with their lifetimes, its interface, its reference pictures."""

import torch
from torch import Tensor, nn

from export.families.r2 import graphs
from export.to_onnx import GraphSource
from reference.families.r2.model import R2Models
from runtime.bundle.interface import CosineData, Interface, Range
from runtime.bundle.manifest import Axis, Lifetime, TensorSpec

SIDES = Range(1, 65536)
# float32 arrays of R2IR's width that a graph holds per pixel at its peak, measured by
# benchmarks.decode on ONNX Runtime and rounded up.
ARRAYS_PER_PIXEL = {
    "r2ir_image_summary": 14,
    "r2ir_latent_summary": 14,
    "r2ir_encode": 24,
    "r2ir_decode": 24,
    "r2ir_render": 24,
    "r2ir_response": 31,
}
# Sums and means of phi, which is positive, and GRN ratios.
POSITIVE = frozenset({"k", "response", "text_k"})


def interface(models: R2Models, labels: tuple[str, ...]) -> Interface:
    """R2IR makes an image of any size of a latent of any size."""
    config = models.config
    return Interface(
        name=config.name,
        color_channels=config.r2ir.color_channels,
        latent_channels=config.r2ir.latent_channels,
        labels=labels or tuple(map(str, range(config.condition.labels))),
        default_latent=config.default_latent,
        pixels_per_latent=config.pixels_per_latent,
        latent_sides=SIDES,
        image_sides=SIDES,
        decoupled=True,
        guidance_scale=config.guidance_scale,
    )


def schedule(models: R2Models) -> CosineData:
    """The schedule that every R2ID is trained with."""
    return CosineData()


def decode(models: R2Models, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """The reference's pixels `[B, c, *size]` of a latent `[B, C, H, W]`."""
    with torch.inference_mode():
        return models.r2ir.decode(latent, size)


def sources(models: R2Models) -> list[GraphSource]:
    """Every graph of R2, in the order in which the runtime needs them."""
    ir, id_, text = models.config.r2ir, models.config.r2id, models.config.condition
    film = graphs.Film(models)
    rank = id_.heads * text.tokens
    latent = ("batch", ir.latent_channels, "height", "width")
    pixels = ("batch", ir.color_channels, "height", "width")
    coordinates = ("height", "width", 4)
    text_k = (id_.decoder_blocks, id_.width, rank)
    text_v = (id_.decoder_blocks, rank, id_.width)

    def sums(blocks: int) -> dict[str, tuple[Axis, ...]]:
        return {"kv": ("batch", blocks, ir.width, ir.width), "k": ("batch", blocks, ir.width)}

    encoder, decoder = sums(ir.encoder_blocks), sums(ir.decoder_blocks)
    response = {"response": ("batch", ir.decoder_blocks, 2, ir.width)}

    def source(
        name: str,
        lifetime: Lifetime,
        module: nn.Module,
        inputs: dict[str, tuple[Axis, ...]],
        outputs: dict[str, tuple[Axis, ...]],
    ) -> GraphSource:
        taken, given = (
            tuple(TensorSpec(key, "float32", axes) for key, axes in side.items())
            for side in (inputs, outputs)
        )
        floats = ARRAYS_PER_PIXEL.get(name, 0) * ir.width
        return GraphSource(name, lifetime, module.eval(), taken, given, POSITIVE, floats)

    return [
        source(
            "r2id_position",
            "size",
            graphs.Position(models),
            {"coordinates": coordinates},
            {"position": ("height", "width", id_.width)},
        ),
        source(
            "r2id_film",
            "schedule",
            film,
            {"alpha_bar": ("steps",)},
            {"film": ("steps", film.width)},
        ),
        source(
            "r2id_condition",
            "prompt",
            graphs.Condition(models),
            {"condition": ("conditions", text.labels)},
            {"text_k": ("conditions", *text_k), "text_v": ("conditions", *text_v)},
        ),
        source(
            "r2id",
            "step",
            graphs.Denoise(models),
            {
                "latent": latent,
                "position": ("height", "width", id_.width),
                "film": (film.width,),
                "text_k": ("conditions", "batch", *text_k),
                "text_v": ("conditions", "batch", *text_v),
            },
            {"eps": ("conditions", *latent)},
        ),
        source(
            "r2ir_image_summary",
            "image",
            graphs.ResamplerSummary(models, "image"),
            {"pixels": pixels, "coordinates": coordinates},
            encoder,
        ),
        source(
            "r2ir_encode",
            "latent",
            graphs.Encode(models, "latent"),
            {"coordinates": coordinates, **encoder},
            {"latent": latent},
        ),
        source(
            "r2ir_latent_summary",
            "latent",
            graphs.ResamplerSummary(models, "latent"),
            {"latent": latent, "coordinates": coordinates},
            decoder,
        ),
        source(
            "r2ir_decode",
            "image",
            graphs.Decode(models, "image"),
            {"coordinates": coordinates, **decoder},
            {"pixels": pixels, **response},
        ),
        source(
            "r2ir_render",
            "tile",
            graphs.Render(models, "image"),
            {"coordinates": coordinates, **decoder, **response},
            {"pixels": pixels},
        ),
        source(
            "r2ir_response",
            "tile",
            graphs.Response(models, "image"),
            {"coordinates": coordinates, **decoder, **response},
            {f"squares_{site}": ("batch", ir.width) for site in range(2 * ir.decoder_blocks)},
        ),
    ]
