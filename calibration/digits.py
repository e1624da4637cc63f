"""Whether the digits that a bundle draws can be read, by the network of `reference.classifier`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.bundle.interface import Size, size_name
from runtime.engines.onnxruntime import load_library
from runtime.errors import ArtefactError
from runtime.pipeline.bundle import Bundle
from runtime.progress import Bar

CLASSIFIER_SIDE = 32
TOKENS_AT_ONCE = 5120  # of a batch: 20 digits at 16×16


def classifier(path: Path) -> Any:
    """A session of `reference.classifier`'s network, from its weights: pixels -> logits.

    Batch normalisation is folded into the convolutions. Raises ArtefactError for other weights.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        weights = load(path.read_bytes())
        nodes, constants, x = [], [], "pixels"
        for place in (0, 4, 8):
            norm = {key: weights[f"layers.{place + 1}.{key}"] for key in ("weight", "bias")}
            mean, variance = (weights[f"layers.{place + 1}.running_{k}"] for k in ("mean", "var"))
            gain = norm["weight"] / np.sqrt(variance + 1e-5)
            kernel = weights[f"layers.{place}.weight"] * gain[:, None, None, None]
            bias = (weights[f"layers.{place}.bias"] - mean) * gain + norm["bias"]
            w, b = f"kernel{place}", f"bias{place}"
            constants += [numpy_helper.from_array(kernel, w), numpy_helper.from_array(bias, b)]
            nodes += [
                helper.make_node("Conv", [x, w, b], [f"c{place}"], pads=[1, 1, 1, 1]),
                helper.make_node("Relu", [f"c{place}"], [f"r{place}"]),
                helper.make_node(
                    "MaxPool", [f"r{place}"], [f"p{place}"], kernel_shape=[2, 2], strides=[2, 2]
                ),
            ]
            x = f"p{place}"
        nodes.append(helper.make_node("Flatten", [x], ["flat"]))
        for place, given, made in ((13, "flat", "hidden"), (15, "active", "logits")):
            names = [f"layers.{place}.weight", f"layers.{place}.bias"]
            constants += [numpy_helper.from_array(weights[name], name) for name in names]
            nodes.append(helper.make_node("Gemm", [given, *names], [made], transB=1))
            if made == "hidden":
                nodes.append(helper.make_node("Relu", ["hidden"], ["active"]))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ArtefactError(
            f"{path}: no classifier of digits ({type(error).__name__}: {error}). Make it with: "
            "make evaluate"
        ) from None
    side, kind = CLASSIFIER_SIDE, onnx.TensorProto.FLOAT
    ends = [
        helper.make_tensor_value_info("pixels", kind, ["batch", 1, side, side]),
        helper.make_tensor_value_info("logits", kind, ["batch", 10]),
    ]
    graph = helper.make_graph(nodes, "classifier", ends[:1], ends[1:], constants)
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return load_library().InferenceSession(model.SerializeToString())


def digits_read(
    bundle: Bundle, size: Size, reader: Any, count: int, steps: int, guidance_scale: float
) -> float:
    """Share of `count` digits, drawn at a latent size, that are read as their label."""
    side = CLASSIFIER_SIDE
    scale = side / min(size)
    image = (round(size[0] * scale), round(size[1] * scale))
    top, left = (image[0] - side) // 2, (image[1] - side) // 2
    at_once = max(1, TOKENS_AT_ONCE // (size[0] * size[1]))
    desc = f"digits {bundle.options.precision} {size_name(size)}"
    right = 0
    for first in Bar(range(0, count, at_once), desc=desc, unit="batch"):
        labels = [i % 10 for i in range(first, min(first + at_once, count))]
        made = bundle.generate(
            labels,
            size,
            image=image,
            solver="ddim",
            steps=steps,
            guidance_scale=guidance_scale,
            seed=1234,
            first_index=first,
        ).images[..., top : top + side, left : left + side]
        read = reader.run(["logits"], {"pixels": np.ascontiguousarray(made)})[0].argmax(1)
        right += int((read == labels).sum())
    return right / count
