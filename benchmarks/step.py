"""One guided denoising step: our graph, PyTorch eager and a plain export, side by side.

python -m benchmarks.step [--sizes 16x16,64x64] [--rounds 3] [--threads 2]

Published MNIST width (192, 8 + 8 blocks), random weights, guidance pair, batch 1, fp32. PyTorch and
the plain export run the model in the layout of the published code (`benchmarks/published.py`),
coordinates passed in and nothing hoisted. In each round every contender runs in a process of its
own, one after the other, so that a noisy machine disturbs them alike and no thread pool disturbs
its neighbour; what counts is the ratio of the medians over all rounds.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from tqdm import tqdm

from benchmarks.published import PublishedR2ID
from export.chunk import chunk_ffn
from export.to_onnx import OPSET, onnx_from_source, quiet, sources
from reference.checkpoint import Models
from reference.train import build_models, read_config
from runtime import cli
from runtime.coordinates import grid

CONTENDERS = ("torch eager", "plain export", "this toolkit")
ALPHA_BAR = 0.3
WARM_UP_STEPS = 3
SECONDS = 4.0  # how long a contender is timed in one round
FEWEST_STEPS = 5
Size = tuple[int, int]
Step = Callable[[], np.ndarray]


def build() -> Models:
    """The published configuration with random weights, the same in every process."""
    return build_models(read_config("published"), "published").eval().requires_grad_(False)


def export_graphs(folder: Path) -> None:
    """Our step graph for CPUs, and the model as published with its height and width dynamic."""
    models = build()
    source = next(source for source in sources(models) if source.name == "r2id")
    chunked = chunk_ffn(onnx_from_source(source))
    assert chunked is not None  # the step graph has FFNs
    onnx.save_model(chunked, folder / "this toolkit.onnx")
    dynamic = torch.export.Dim.DYNAMIC
    with quiet():
        program = torch.onnx.export(
            PublishedR2ID(models),
            tuple(plain_inputs(models, (5, 7)).values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(plain_inputs(models, (5, 7))),
            dynamic_shapes=({2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic}, {}, {}),
            verbose=False,
        )
    assert program is not None  # torch types it so for its older exporter
    program.save(str(folder / "plain export.onnx"), external_data=False)


def plain_inputs(models: Models, size: Size) -> dict[str, torch.Tensor]:
    """What the published model takes in every step."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 1, models.config.condition.labels)
    labels[1, 0, 7] = 1
    channels = models.config.r2id.latent_channels
    return {
        "latent": torch.randn(1, channels, *size, generator=generator),
        "coordinates": torch.from_numpy(grid(*size)),
        "alpha_bar": torch.tensor([ALPHA_BAR]),
        "labels": labels,
    }


def our_inputs(models: Models, size: Size) -> dict[str, torch.Tensor]:
    """What our step graph takes: the rest was computed once."""
    plain = plain_inputs(models, size)
    modules = {source.name: source.module for source in sources(models)}
    text_k, text_v = modules["r2id_condition"](plain["labels"][:, 0])
    return {
        "latent": plain["latent"],
        "position": modules["r2id_position"](plain["coordinates"]),
        "film": modules["r2id_film"](plain["alpha_bar"])[0],
        "text_k": text_k.unsqueeze(1),
        "text_v": text_v.unsqueeze(1),
    }


def contender(name: str, folder: Path, size: Size, threads: int) -> Step:
    """A callable of one step that returns eps."""
    models = build()
    if name == "torch eager":
        inputs, published = plain_inputs(models, size), PublishedR2ID(models)
        return lambda: published(*inputs.values()).numpy()
    make = our_inputs if name == "this toolkit" else plain_inputs
    feed = {key: tensor.numpy() for key, tensor in make(models, size).items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, feed)[0]


def timed(name: str, folder: Path, size: Size, threads: int) -> tuple[list[float], np.ndarray]:
    """Seconds of each step and eps `[2, C, H, W]`; runs in a process of its own."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        step = contender(name, folder, size, threads)
        for _ in range(WARM_UP_STEPS):
            eps = step()
        seconds: list[float] = []
        while len(seconds) < FEWEST_STEPS or sum(seconds) < SECONDS:
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return seconds, eps.reshape(2, -1, *size)


def compare(args: argparse.Namespace) -> None:
    """Export both graphs, time every size, print ratios to this toolkit."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as name, pool:
        folder = Path(name)
        pool.submit(export_graphs, folder).result()
        for size in args.sizes:
            seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            eps: dict[str, np.ndarray] = {}
            turns = [name for _ in range(args.rounds) for name in CONTENDERS]
            for name in tqdm(turns, desc=f"{size[0]}x{size[1]}", unit="run"):
                found, eps[name] = pool.submit(timed, name, folder, size, args.threads).result()
                seconds[name] += found
            report(size, seconds, eps)


def report(size: Size, seconds: dict[str, list[float]], eps: dict[str, np.ndarray]) -> None:
    """A table of one size: minimum, median, ratio of medians, largest difference from torch."""
    wanted = eps["torch eager"]
    own = statistics.median(seconds["this toolkit"])
    print(f"\n{size[0]}x{size[1]}: seconds per step (minimum, median), ratio, error")
    for name, times in seconds.items():
        error = np.abs(eps[name] - wanted).max() / np.abs(wanted).max()
        median = statistics.median(times)
        print(f"  {name:13} {min(times):.4f} {median:.4f}  {median / own:5.2f}×  {error:.1e}")


def sizes(text: str) -> list[Size]:
    """Sizes separated by commas."""
    return [cli.size(part) for part in text.split(",")]


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--sizes", type=sizes, default=[(16, 16), (64, 64)])
    p.add_argument("--rounds", type=cli.number(1, 1000, int), default=3)
    p.add_argument("--threads", type=cli.number(1, 256, int), default=2)
    cli.run(compare, p)


if __name__ == "__main__":
    main()
