"""R2IR's render beside the machine's rate of products: python -m benchmarks.rate.

GFLOP/s by pixels per tile, counting the products that every pixel takes part in, and their share of
a square product's. One thread; medians of processor time over rounds in which all take turns.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from runtime import cli, open_bundle
from runtime.bundle.manifest import DEFAULT_BUNDLE
from runtime.coordinates import Grid
from runtime.engines import EngineOptions

TILE_COLUMNS = 32
TILES = (512, 1024, 2048, 4096)  # pixels
IMAGE_SIDE = 512
PRODUCT_SIDE = 1536


def rate(args: argparse.Namespace) -> None:
    """The render's share of the machine's rate of products, by pixels per tile."""
    bundle = open_bundle(args.bundle, EngineOptions(threads=1))
    spec, engine = bundle.manifest.graph("r2ir_render"), bundle.engines.open("r2ir_render")
    product, place = square_product(PRODUCT_SIDE), Grid(IMAGE_SIDE, IMAGE_SIDE)
    contenders: dict[str, tuple[Callable[[], object], float]] = {
        f"product of {PRODUCT_SIDE}²": (product, 2 * PRODUCT_SIDE**3)
    }
    for pixels in TILES:
        sizes = {"batch": 1, "height": pixels // TILE_COLUMNS, "width": TILE_COLUMNS}
        given = {t.name: np.ones(t.shape(sizes), np.float32) for t in spec.inputs}
        given["coordinates"] = place.window(0, 0, sizes["height"], TILE_COLUMNS)
        own = partial(engine.run, given)
        contenders[f"tiles of {pixels}"] = own, pixels * render_flops(args.checkpoint)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, (work, flops) in contenders.items():
            start = time.process_time()
            work()
            found[name].append(flops / (time.process_time() - start) / 1e9)
    rates = {name: float(np.median(values)) for name, values in found.items()}
    print("\nrender of the shipped model, one thread: GFLOP/s, share of the product's")
    for name, value in rates.items():
        print(f"  {name:18} {value:6.0f} {value / next(iter(rates.values())):6.2f}", flush=True)


def square_product(side: int) -> Callable[[], object]:
    """A product of two matrices `[side, side]` by ONNX Runtime on one thread."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [side, side])],
        [onnx.numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"a": weight})


def render_flops(checkpoint: Path | None) -> float:
    """Of the products that a pixel takes part in: 10 d² in a block, and its features' d · 8F."""
    from reference.checkpoint import SHIPPED, load

    config = load(checkpoint or SHIPPED).models.config.r2ir
    features = 8 * (config.high_frequencies + config.low_frequencies)
    return 2.0 * config.width * (10 * config.width * config.decoder_blocks + features)


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.rate", __doc__)
    p.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="of the shipped model")
    p.add_argument("--checkpoint", type=Path, help="what the bundle was made of (the shipped one)")
    p.add_argument("--rounds", type=cli.number(1, 1000, int), default=20, help="(20)")
    cli.run(rate, p)


if __name__ == "__main__":
    main()
