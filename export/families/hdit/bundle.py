"""How HDiT is exported."""

from export.families.hdit import graphs
from export.families.parts.pixels import cells, decode, interface
from export.to_onnx import GraphSource, graph_source
from reference.families.hdit.model import HDiTModels
from runtime.bundle.interface import KarrasData
from runtime.bundle.manifest import Axis

__all__ = ["decode", "interface", "schedule", "sources"]


def schedule(models: HDiTModels) -> KarrasData:
    """The noise levels that a checkpoint was trained for, spaced as the paper draws."""
    return KarrasData(models.config.sigma_min, models.config.sigma_max)


def sources(models: HDiTModels) -> list[GraphSource]:
    """Every graph of HDiT, in the order in which the runtime needs them."""
    config, model = models.config.hdit, models.hdit
    film, classes = graphs.Film(model), config.classes
    latent: tuple[Axis, ...] = ("batch", config.channels, "height", "width")
    rotations: dict[str, tuple[Axis, ...]] = {}
    for depth, level in graphs.attending(config):
        grid = cells(config.patch[0] << depth, config.patch[1] << depth)
        axes = (*grid, level.width // level.head_dim, level.head_dim // 4)
        rotations |= {f"cos_{depth}": axes, f"sin_{depth}": axes}
    prompt: dict[str, tuple[Axis, ...]] = {"log_snr": ("steps",)}
    if classes:
        prompt["condition"] = ("conditions", classes)
    branches: tuple[Axis, ...] = ("conditions",) if classes else ()
    own: tuple[Axis, ...] = ("conditions", "batch") if classes else ()
    return [
        graph_source(
            "hdit_position",
            "size",
            graphs.Rotations(config),
            {"coordinates": ("height", "width", 4)},
            rotations,
        ),
        graph_source(
            "hdit_scalings",
            "schedule",
            graphs.Scalings(config),
            {"log_snr": ("steps",)},
            {"scalings": ("steps", 3)},
        ),
        graph_source(
            "hdit_film",
            "prompt" if classes else "schedule",
            film,
            prompt,
            {"film": ("steps", *branches, film.width)},
        ),
        graph_source(
            "hdit",
            "step",
            graphs.Denoise(model),
            {"latent": latent, "scalings": (3,), "film": (*own, film.width), **rotations},
            {"eps": ("conditions" if classes else 1, *latent)},
            bounded=rotations,
        ),
    ]
