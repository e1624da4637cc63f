"""What each rewrite of the step graph gains: python -m benchmarks.rewrites

The step graph with one rewrite of `export/families/r2` undone, beside the whole one; both compute
the same. Width and blocks as published, random weights, guidance pair, batch 1, 2
threads. In each round every form runs in a process of its own, one after the other; a gain is the
ratio of medians, above 1 where the rewrite pays. Prints a table and writes rewrites.json.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.contenders import (
    Contender,
    Prepared,
    Size,
    add_options,
    build,
    measure,
    our_inputs,
    plain_inputs,
    write_graph,
)
from export.chunk import chunk_ffn
from export.families.r2 import bundle as r2
from export.families.r2 import graphs, parts
from export.to_onnx import GraphSource, onnx_from_source
from reference.families.parts.layers import ATTENTION_EPSILON
from reference.families.r2.model import R2Models
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import Array, TensorSpec, relative_error

SIZES = [(16, 16), (64, 64)]
WHOLE = "the step graph"
TOLERANCE = 1e-4  # of the largest eps: what every form must agree to
SECONDS = 2.0


def elu(x: Tensor) -> Tensor:
    """phi as one op and its constant."""
    return F.elu(x) + 1


def mean(x: Tensor) -> Tensor:
    """A mean over tokens by a reduction."""
    return x.mean(1, keepdim=True)


def by_heads(self: parts.Attention, x: Tensor) -> Tensor:
    """Self-attention with a value projection of the tokens, heads split, and an output one."""
    heads = self.heads.count

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, a, N, e]

    q, k = split(self.queries(x)), split(self.keys(x))
    v = split(x @ self.value_weight.transpose(0, 1).flatten(1))
    total = q @ k.mean(2).unsqueeze(3) + ATTENTION_EPSILON / x.shape[1]
    read = (q @ (k.transpose(2, 3) @ v / x.shape[1]) / total).transpose(1, 2).flatten(2)
    return read @ self.out_weight[:, :-1].flatten(0, 1) + self.out_weight[:, -1].sum(0)


class Inside(nn.Module):
    """The step graph with one of its inputs computed in it: `make` of a tensor of its own."""

    def __init__(self, models: R2Models, name: str, make: nn.Module):
        super().__init__()
        self.step, self.make, self.name = graphs.Denoise(models), make, name

    def forward(
        self, given: Tensor, latent: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None
    ) -> Tensor:
        made = self.make(given)
        if c is None:
            text_k, text_v = (part.unsqueeze(1) for part in made)
            return self.step(latent, a, b, text_k, text_v)
        if self.name == "film":
            return self.step(latent, a, made[0], b, c)
        return self.step(latent, made, a, b, c)


class Apart(nn.Module):
    """The step graph run for every condition on its own, the encoder's blocks included."""

    def __init__(self, models: R2Models):
        super().__init__()
        self.step = graphs.Denoise(models)

    def forward(
        self, latent: Tensor, position: Tensor, film: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        every = latent.repeat(text_k.shape[0], 1, 1, 1)
        text = (part.transpose(0, 1) for part in (text_k, text_v))
        return self.step(every, position, film, *text).transpose(0, 1)


# A name of the rewrite, and what undoes it: a function of `export` that another one replaces.
PATCHED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "phi by Relu and Exp": ("parts.positive", elu),
    "means over tokens by products": ("parts.token_mean", mean),
    "values and outputs on the summary": ("parts.Attention.attend_self", by_heads),
}
HOISTED = {
    "position once per size": "position",
    "film once per schedule": "film",
    "text once per prompt": "text",
}
CHUNKED = "FFNs in chunks"
SHARED = "encoder once for all conditions"


def forms(models: R2Models, size: Size) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Module and inputs of the step graph, and of each form of it with a rewrite undone."""
    ours, plain = our_inputs(models, size), plain_inputs(models, size)
    makers = {source.name: source.module for source in r2.sources(models)}
    given = {
        "position": ("coordinates", plain["coordinates"], makers["r2id_position"]),
        "film": ("alpha_bar", plain["alpha_bar"], makers["r2id_film"]),
        "text": ("condition", plain["labels"][:, 0], makers["r2id_condition"]),
    }
    found: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        name: (graphs.Denoise(models), ours) for name in (WHOLE, CHUNKED, *PATCHED)
    }
    for name, kind in HOISTED.items():
        key, tensor, maker = given[kind]
        rest = {name: own for name, own in ours.items() if not name.startswith(kind)}
        found[name] = (Inside(models, kind, maker), {key: tensor, **rest})
    return found | {SHARED: (Apart(models), ours)}


def exported(module: nn.Module, inputs: dict[str, Tensor], channels: int) -> GraphSource:
    """The source of a form's graph: height and width dynamic, one image."""
    axes: dict[str, tuple[str | int, ...]] = {
        "latent": (1, channels, "height", "width"),
        "coordinates": ("height", "width", 4),
        "position": ("height", "width", inputs.get("position", torch.zeros(1)).shape[-1]),
    }
    specs = tuple(
        TensorSpec(name, "float32", axes.get(name, tuple(tensor.shape)))
        for name, tensor in inputs.items()
    )
    eps = TensorSpec("eps", "float32", (2, 1, channels, "height", "width"))
    return GraphSource("r2id", "step", module.eval(), specs, (eps,))


def prepare(folder: Path, config: str, sizes: list[Size]) -> tuple[Prepared, dict[str, str]]:
    """Write every form's graph and inputs; the names of the graphs by that of their rewrite."""
    models, specs, files = build(config), {}, {}
    channels = models.config.r2id.latent_channels
    with torch.inference_mode():
        made = {size: forms(models, size) for size in sizes}
    for number, (name, (module, inputs)) in enumerate(made[sizes[0]].items()):
        files[name] = kind = f"form{number}"
        for size, own in made.items():
            arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in own[name][1].items()}
            np.savez(folder / f"{kind}-{size_name(size)}.npz", **arrays)
        function, other = PATCHED.get(name, ("parts.positive", parts.positive))
        with patch(f"export.families.r2.{function}", other):  # looked up as the module is traced
            source = exported(module, inputs, channels)
            model = onnx_from_source(source)
        chunked = model if name == CHUNKED else chunk_ffn(model)
        specs[kind] = write_graph(folder, kind, chunked, source.inputs, source.outputs)
    return Prepared(folder, config, specs, {}), files


def rewrites(args: argparse.Namespace) -> None:
    """Export every form, time them in turns, print and write what each rewrite gains."""
    args.out.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    rows: list[list[str]] = [["rewrite", *map(size_name, args.sizes)]]
    gains: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, pool:
        prepared, files = pool.submit(prepare, Path(name), args.config, args.sizes).result()
        for size in args.sizes:
            times = timed(pool, prepared, files, size, args)
            own = {name: times[name] / times[WHOLE] for name in files if name != WHOLE}
            gains[size_name(size)] = {name: round(gain, 3) for name, gain in own.items()}
    for name in files:
        if name != WHOLE:
            rows.append([name, *(f"{own[name]:.2f}×" for own in gains.values())])
    print(cli.table(rows))
    with atomic_write(args.out / "rewrites.json") as file:
        file.write(json.dumps(gains, indent=1).encode() + b"\n")


def timed(
    pool: ProcessPoolExecutor,
    prepared: Prepared,
    files: dict[str, str],
    size: Size,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Median seconds of each form; raises RuntimeError for one that computes another eps."""
    seconds: dict[str, list[float]] = {name: [] for name in files}
    eps: Array | None = None
    turns = [*files.items()] * (args.rounds or 3)
    for name, kind in tqdm(turns, desc=size_name(size), unit="run"):
        contender = Contender(name, "cpu", kind)
        found = pool.submit(measure, prepared, contender, size, args.threads, SECONDS).result()
        seconds[name] += found.seconds
        eps = found.eps if eps is None else eps
        if not relative_error(found.eps, eps) <= TOLERANCE:
            raise RuntimeError(f"{name}: eps differs by {relative_error(found.eps, eps):.1e}")
    return {name: statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.rewrites", __doc__)
    add = p.add_argument
    add("--sizes", type=cli.sizes, default=SIZES, help="HxW,… of the latent (16x16,64x64)")
    add_options(p)
    cli.run(rewrites, p)


if __name__ == "__main__":
    main()
