"""How SiD2 is exported."""

from msgspec.structs import asdict

from export.families.parts.pixels import cells, decode, interface
from export.families.sid2 import graphs
from export.to_onnx import GraphSource, graph_source
from reference.families.sid2.model import SiD2Models
from runtime.bundle.interface import ShiftedCosineData
from runtime.bundle.manifest import Axis

__all__ = ["decode", "interface", "schedule", "sources"]


def schedule(models: SiD2Models) -> ShiftedCosineData:
    """The schedule that a checkpoint was trained with."""
    return ShiftedCosineData(**asdict(models.config.schedule))


def sources(models: SiD2Models) -> list[GraphSource]:
    """Every graph of SiD2, in the order in which the runtime needs them."""
    config, film = models.config.sid2, graphs.Film(models.sid2)
    latent: tuple[Axis, ...] = ("batch", config.channels, "height", "width")
    tables: dict[str, tuple[Axis, ...]] = {}
    for level in graphs.attending(config):
        side = config.patch << level
        axes = (*cells(side, side), config.head_dim // 2)
        tables |= {f"cos_{level}": axes, f"sin_{level}": axes}
    film_width = film.width
    found = [
        graph_source(
            "sid2_scalings",
            "schedule",
            graphs.Scalings(),
            {"log_snr": ("steps",)},
            {"scalings": ("steps", 2)},
        ),
        graph_source(
            "sid2_film",
            "prompt",
            film,
            {"log_snr": ("steps",), "condition": ("conditions", config.classes)},
            {"film": ("steps", "conditions", film_width)},
        ),
        graph_source(
            "sid2",
            "step",
            graphs.Denoise(models.sid2),
            {
                "latent": latent,
                "scalings": (2,),
                "film": ("conditions", "batch", film_width),
                **tables,
            },
            {"eps": ("conditions", *latent)},
            bounded=tables,
        ),
    ]
    if not tables:
        return found
    position = graphs.Rotations(config)
    coordinates: dict[str, tuple[Axis, ...]] = {"coordinates": ("height", "width", 4)}
    return [graph_source("sid2_position", "size", position, coordinates, tables), *found]
