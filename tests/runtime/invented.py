"""A bundle of a family that nobody has, written by hand.

It diffuses RGB pixels, with sides a multiple of 3. Its eps has a closed form:

    eps[k, b, c, y, x] = a · latent + hue[condition] + place[y, x],   a = 1 / (1 + e^log_snr)
    hue = condition · colours / 10,   place = (square x + square y) / 100 over thirds of the size
"""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from runtime.bundle.files import sha256
from runtime.bundle.interface import CosineData, Interface, Range, Trained
from runtime.bundle.manifest import Axis, GraphSpec, Lifetime, Manifest, Source, TensorSpec
from runtime.coordinates import grid

LABELS = ("dawn", "noon", "dusk")
COLOURS = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
SIDES = Range(3, 48, 3)
LATENT: tuple[Axis, ...] = ("batch", 3, "height", "width")
THIRDS: tuple[Axis, ...] = ("height/3", "width/3")
Tensors = dict[str, tuple[Axis, ...]]


def graph(
    folder: Path,
    name: str,
    lifetime: Lifetime,
    inputs: Tensors,
    outputs: Tensors,
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]],
    constants: dict[str, np.ndarray],
) -> GraphSpec:
    """A graph written by hand: its file, and its entry in a manifest."""

    def values(side: Tensors) -> list[Any]:
        make = helper.make_tensor_value_info
        return [make(key, TensorProto.FLOAT, list(axes)) for key, axes in side.items()]

    model: ModelProto = helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, i, o, **more) for kind, i, o, more in nodes],
            name,
            values(inputs),
            values(outputs),
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    data = model.SerializeToString()
    (folder / f"{name}.onnx").write_bytes(data)
    taken, given = (
        tuple(TensorSpec(key, "float32", axes) for key, axes in side.items())
        for side in (inputs, outputs)
    )
    names = {axis for spec in taken for axis in spec.names}
    ranges = {"batch": Range(1, 64), "conditions": Range(1, 16), "steps": Range(1, 2000)}
    ranges |= {"height": SIDES, "width": SIDES}
    own = {axis: legal for axis, legal in ranges.items() if axis in names}
    return GraphSpec(f"{name}.onnx", sha256(data), "fp32", lifetime, taken, given, own)


def write_bundle(folder: Path) -> Path:
    """The invented family's four graphs and their manifest."""
    third = np.array([3, 3], np.int64)
    graphs = {
        "geometry": graph(
            folder,
            "geometry",
            "size",
            {"coordinates": ("height", "width", 4)},
            {"place": THIRDS},
            [
                ("Mul", ["coordinates", "shares"], ["weighted"], {}),
                ("ReduceSum", ["weighted", "last"], ["plane"], {"keepdims": 0}),
                ("Slice", ["plane", "starts", "ends", "axes", "steps_of"], ["place"], {}),
            ],
            {
                "shares": np.array([0.01, 0.01, 0, 0], np.float32),
                "last": np.array([2], np.int64),
                "starts": np.array([1, 1], np.int64),
                "ends": np.array([9999, 9999], np.int64),
                "axes": np.array([0, 1], np.int64),
                "steps_of": third,
            },
        ),
        "clock": graph(
            folder,
            "clock",
            "schedule",
            {"log_snr": ("steps",)},
            {"gain": ("steps",)},
            [("Neg", ["log_snr"], ["noisier"], {}), ("Sigmoid", ["noisier"], ["gain"], {})],
            {},
        ),
        "palette": graph(
            folder,
            "palette",
            "prompt",
            {"condition": ("conditions", 3)},
            {"hue": ("conditions", 3)},
            [("MatMul", ["condition", "colours"], ["hue"], {})],
            {"colours": COLOURS / 10},
        ),
        "brush": graph(
            folder,
            "brush",
            "step",
            {"latent": LATENT, "gain": (), "hue": ("conditions", "batch", 3), "place": THIRDS},
            {"eps": ("conditions", *LATENT)},
            [
                ("Mul", ["latent", "gain"], ["calmed"], {}),
                ("Unsqueeze", ["hue", "behind"], ["tint"], {}),
                ("Add", ["calmed", "tint"], ["tinted"], {}),
                ("Unsqueeze", ["place", "before"], ["cells"], {}),
                ("Resize", ["cells", "", "scales"], ["wide"], {"mode": "nearest"}),
                ("Add", ["tinted", "wide"], ["eps"], {}),
            ],
            {
                "behind": np.array([3, 4], np.int64),
                "before": np.array([0, 1], np.int64),
                "scales": np.array([1, 1, 3, 3], np.float32),
            },
        ),
    }
    interface = Interface(
        name="invented",
        color_channels=3,
        latent_channels=3,
        labels=LABELS,
        default_latent=(12, 9),
        pixels_per_latent=1,
        latent_sides=SIDES,
        image_sides=SIDES,
        decoupled=False,
        trained=Trained(6, 24, 2.0),
    )
    source = Source("a" * 64, {"command": "by hand"})
    Manifest(interface, CosineData(), source, {"onnx": "1"}, None, graphs).write(folder)
    return folder


def closed_form(latent: np.ndarray, alpha_bar: float, conditions: np.ndarray) -> np.ndarray:
    """eps as the module has it: `[K, B, 3, H, W]`."""
    height, width = latent.shape[2:]
    place = (grid(height, width)[1::3, 1::3, :2] * 0.01).sum(2).repeat(3, 0).repeat(3, 1)
    hue = (conditions @ (COLOURS / 10))[..., None, None]
    return (1 - alpha_bar) * latent + hue + place
