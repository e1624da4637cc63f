"""One guided denoising step: our graph, PyTorch eager and a plain export, side by side.

python -m benchmarks.step [--sizes 16x16,64x64] [--rounds 5] [--threads 2]

Published MNIST width (192, 8 + 8 blocks), random weights, guidance pair, batch 1, fp32. The plain
export is the reference model as it stands, coordinates passed in and nothing hoisted. Contenders
take turns within each round, so that a noisy machine disturbs them alike; what counts is the
ratio of the medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from tqdm import tqdm

from export.to_onnx import OPSET, onnx_from_source, quiet, sources
from reference.checkpoint import Models
from reference.r2ir import tokens_from_grid
from reference.train import build_models, read_config
from runtime import cli
from runtime.coordinates import grid

ALPHA_BAR = 0.3
Step = Callable[[], np.ndarray]


class Plain(nn.Module):
    """The reference model whole: everything is computed in every step."""

    def __init__(self, models: Models):
        super().__init__()
        self.models = models

    def forward(
        self, latent: Tensor, coordinates: Tensor, alpha_bar: Tensor, labels: Tensor
    ) -> Tensor:
        """latent `[1, C, H, W]`, coordinates `[1, N, 4]`, labels `[2, 1, labels]`."""
        text = self.models.condition(labels)
        tokens = tokens_from_grid(latent)
        eps: Tensor = self.models.r2id.predict_tokens(tokens, coordinates, alpha_bar, text)
        return eps


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def export_plain(models: Models, path: Path) -> None:
    """The plain export, its token axes dynamic."""
    example = (
        torch.randn(1, models.config.r2id.latent_channels, 5, 7),
        torch.from_numpy(grid(5, 7)).reshape(1, -1, 4),
        torch.tensor([ALPHA_BAR]),
        torch.zeros(2, 1, models.config.condition.labels),
    )
    dynamic = torch.export.Dim.DYNAMIC
    with quiet():
        program = torch.onnx.export(
            Plain(models),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["latent", "coordinates", "alpha_bar", "labels"],
            dynamic_shapes=({2: dynamic, 3: dynamic}, {1: dynamic}, {}, {}),
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


def contenders(
    models: Models, folder: Path, size: tuple[int, int], threads: int
) -> dict[str, Step]:
    """What is timed at one size; each returns eps `[2, 1, N or C.., ..]`."""
    latent = torch.randn(1, models.config.r2id.latent_channels, *size)
    labels = torch.zeros(2, 1, models.config.condition.labels)
    labels[1, 0, 7] = 1
    at = torch.from_numpy(grid(*size))
    alpha_bar = torch.tensor([ALPHA_BAR])
    plain_module = Plain(models)
    ours, plain = (session(folder / f"{name}.onnx", threads) for name in ("r2id", "plain"))
    modules = {source.name: source.module for source in sources(models)}
    text_k, text_v = modules["r2id_condition"](labels[:, 0])
    inputs = {
        "latent": latent,
        "position": modules["r2id_position"](at),
        "film": modules["r2id_film"](alpha_bar)[0],
        "text_k": text_k.unsqueeze(1),
        "text_v": text_v.unsqueeze(1),
    }
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    whole = (latent, at.reshape(1, -1, 4), alpha_bar, labels)
    plain_names = ("latent", "coordinates", "alpha_bar", "labels")
    plain_feed = {k: v.numpy() for k, v in zip(plain_names, whole, strict=True)}
    return {
        "torch eager": lambda: plain_module(*whole).numpy(),
        "plain export": lambda: plain.run(None, plain_feed)[0],
        "this toolkit": lambda: ours.run(None, feed)[0],
    }


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, contenders in turn; each warmed up by two steps."""
    for step in steps.values():
        step(), step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(args: argparse.Namespace) -> None:
    """Export both graphs, time every size, print ratios to this toolkit."""
    torch.set_num_threads(args.threads)
    models = build_models(read_config("published"), "published").eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        for task in tqdm(("r2id", "plain"), desc="export", unit="graph"):
            if task == "plain":
                export_plain(models, folder / "plain.onnx")
            else:
                source = next(s for s in sources(models) if s.name == task)
                onnx_from_source(source, folder / "r2id.onnx")
        for size in args.sizes:
            steps = contenders(models, folder, size, args.threads)
            report(size, steps, measure(steps, args.rounds * (5 if size[0] < 32 else 1)))


def report(size: tuple[int, int], steps: dict[str, Step], seconds: dict[str, list[float]]) -> None:
    """A table of one size: minimum, median, ratio of medians, largest difference from torch."""
    eager = steps["torch eager"]()[:, 0].swapaxes(1, 2)  # [2, C, N]
    own = statistics.median(seconds["this toolkit"])
    print(f"\n{size[0]}x{size[1]}: seconds per step (minimum, median), ratio, error")
    for name, times in seconds.items():
        eps = steps[name]().reshape(2, -1)
        found = eps.reshape(eager.shape) if name == "this toolkit" else None
        plain = steps[name]()[:, 0].swapaxes(1, 2) if found is None else found
        error = np.abs(plain - eager).max() / np.abs(eager).max()
        median = statistics.median(times)
        print(f"  {name:13} {min(times):.4f} {median:.4f}  {median / own:5.2f}×  {error:.1e}")


def sizes(text: str) -> list[tuple[int, int]]:
    return [cli.size(part) for part in text.split(",")]


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--sizes", type=sizes, default=[(16, 16), (64, 64)])
    p.add_argument("--rounds", type=cli.number(1, 1000, int), default=5)
    p.add_argument("--threads", type=cli.number(1, 256, int), default=2)
    cli.run(compare, p)


if __name__ == "__main__":
    main()
