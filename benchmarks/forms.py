"""Forms of a step graph with one rewrite of `export/families` undone; all compute the same.

What outlives a step has a graph of its own in a bundle; undone, it is computed in every step. Other
rewrites are functions of the export's modules, in whose place plainer ones stand while a module is
traced.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from benchmarks.contenders import ALPHA_BAR, LABEL, Size, random_latent
from export.chunk import chunk_ffn
from export.chunk_attention import chunk_attention
from export.chunk_axial import chunk_axial
from export.families import family_of
from export.families.hdit.attention import MASKED, Axis, Tiling
from export.families.parts import axial
from export.families.r2 import parts
from export.to_onnx import GraphSource, onnx_from_source
from reference.families.parts.layers import ATTENTION_EPSILON
from runtime.bundle.interface import Range
from runtime.bundle.manifest import TensorSpec
from runtime.coordinates import grid

WHOLE = "the step graph"
SHARED = "what no condition changes once for all"
CHUNKS = {
    "axial blocks in parts": chunk_axial,
    "FFNs in chunks": chunk_ffn,
    "attention in parts": chunk_attention,
}
ONE_PAIR = {"batch": 1, "conditions": 2, "steps": 1}


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


def three_products(self: axial.Lines, x: Tensor, places: Tensor | None) -> Tensor:
    """Attention of lines with a product each for queries, keys and values, the mask added."""
    each = zip(self.weight.chunk(3, 1), (*self.bias.chunk(2), None), strict=True)
    made = (x @ weight if bias is None else x @ weight + bias for weight, bias in each)
    q, k, v = (t.unflatten(3, (self.heads, -1)).transpose(2, 3) for t in made)
    scores = q @ k.transpose(3, 4)
    if self.sharpness is not None and places is not None:
        at = places * self.sharpness
        scores = scores - 0.5 * (at.unsqueeze(1) - at.unsqueeze(0)) ** 2
    read = (scores.softmax(4) @ v).transpose(2, 3).flatten(3)
    return read @ self.out_weight + self.out_bias


def untiled(length: int, kernel: int) -> Axis:
    """An axis as one tile that reads all of it."""
    index = torch.arange(length)
    last = index.amax(0, True)
    window = torch.minimum((index - kernel // 2).clamp(min=0), last + 1 - kernel).unsqueeze(1)
    seen = (index >= window) & (index < window + kernel)
    return Axis(index.unsqueeze(0), index.unsqueeze(0), seen.unsqueeze(0), index)


def masked_whole(rows: Axis, columns: Axis) -> Tiling:
    """Every query reads every key, most of them masked."""
    tall, wide = rows.seen.squeeze(0), columns.seen.squeeze(0)
    both = tall[:, None, :, None] & wide[None, :, None, :]
    every = (rows.place.unsqueeze(1) * columns.place.shape[0] + columns.place).flatten()
    mask = torch.where(both, 0.0, MASKED).flatten(2, 3).flatten(0, 1)
    return Tiling(every, every, every, mask.unsqueeze(0))


Replacements = dict[str, Callable[..., Any]]
AXIAL: dict[str, Replacements] = {
    "means over tokens by products": {"parts.axial.token_mean": mean},
    "one product for q, k and v, masks in them": {"parts.axial.Lines.forward": three_products},
}
# Per family the name of a rewrite, and the functions of `export.families` that undo it.
PATCHED: dict[str, dict[str, Replacements]] = {
    "r2": {
        "phi by Relu and Exp": {"r2.parts.positive": elu},
        "means over tokens by products": {"r2.parts.token_mean": mean},
        "values and outputs on the summary": {"r2.parts.Attention.attend_self": by_heads},
    },
    "siid": AXIAL,
    "s2id": AXIAL,
    "hdit": {
        "neighbourhoods by tiles": {
            "hdit.graphs.neighbourhood": untiled,
            "hdit.graphs.tiling": masked_whole,
        }
    },
    "sid2": {},
}


class Inside(nn.Module):
    """The step graph with another graph in it: takes the other's inputs, then the rest of its own.

    Of one point of a schedule and one image.
    """

    def __init__(self, step: GraphSource, kept: GraphSource):
        super().__init__()
        self.step, self.kept = step.module, kept.module
        self.order = [spec.name for spec in step.inputs]
        self.given, self.made = len(kept.inputs), kept.outputs
        self.rest = rest_of(step, kept)

    def forward(self, *tensors: Tensor) -> Tensor:
        made = self.kept(*tensors[: self.given])
        known = wired(self.made, made if isinstance(made, tuple) else (made,))
        for spec, tensor in zip(self.rest, tensors[self.given :], strict=True):
            known[spec.name] = tensor
        eps: Tensor = self.step(*(known[name] for name in self.order))
        return eps


def rest_of(step: GraphSource, kept: GraphSource) -> list[TensorSpec]:
    """The step's inputs that `kept` does not give."""
    given = {spec.name for spec in kept.outputs}
    return [spec for spec in step.inputs if spec.name not in given]


def wired(outputs: tuple[TensorSpec, ...], made: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a graph gives as the step takes it: its first schedule point, one image."""
    known = {}
    for spec, tensor in zip(outputs, made, strict=True):
        axes = [*spec.axes]
        if axes[:1] == ["steps"]:
            tensor, axes = tensor[0], axes[1:]
        known[spec.name] = tensor.unsqueeze(1) if axes[:1] == ["conditions"] else tensor
    return known


class Apart(nn.Module):
    """The step graph run for every condition on its own, as if each were an image."""

    def __init__(self, step: GraphSource, count: int):
        super().__init__()
        self.step, self.count = step.module, count
        self.branched = [spec.axes[:1] == ("conditions",) for spec in step.inputs]
        self.latent = [spec.name for spec in step.inputs].index("latent")

    def forward(self, *tensors: Tensor) -> Tensor:
        own = [
            tensor.transpose(0, 1) if branched else tensor
            for tensor, branched in zip(tensors, self.branched, strict=True)
        ]
        own[self.latent] = tensors[self.latent].repeat(self.count, 1, 1, 1)
        eps: Tensor = self.step(*own)
        return eps.transpose(0, 1)


@dataclass(frozen=True)
class Form:
    """A graph to export while `patches` are in force, `without` one of CHUNKS."""

    source: GraphSource
    patches: Mapping[str, Callable[..., Any]]
    without: str = ""

    @contextlib.contextmanager
    def patched(self) -> Iterator[nn.Module]:
        """The module, to be run or traced while the block lasts."""
        with contextlib.ExitStack() as stack:
            for name, other in self.patches.items():
                stack.enter_context(patch(f"export.families.{name}", other))
            yield self.source.module

    def model(self, sides: Range) -> Any:
        """The ONNX graph that the runtime would open on a CPU."""
        with self.patched():
            model = onnx_from_source(self.source, sides)
        for name, chunk in CHUNKS.items():
            if name != self.without:
                model = chunk(model) or model
        return model


def forms(models: Any) -> dict[str, Form]:
    """The step graph, and each form of it with a rewrite undone, by the rewrite's name.

    Those of CHUNKS are the step graph itself where it has nothing to run in chunks.
    """
    *kept, step = step_sources(models)
    plain = paired(step, step.module, step.inputs)
    found = {WHOLE: Form(plain, {})}
    for other in kept:
        inside = paired(step, Inside(step, other), (*other.inputs, *rest_of(step, other)))
        found[f"{other.name} once per {other.lifetime}"] = Form(inside, {})
    count = 2 if any("conditions" in spec.axes for spec in step.inputs) else 1
    if count > 1:
        found[SHARED] = Form(paired(step, Apart(step, count), step.inputs), {})
    for name, patches in PATCHED[models_family(models)].items():
        found[name] = Form(plain, patches)
    return found | {name: Form(plain, {}, name) for name in CHUNKS}


def models_family(models: Any) -> str:
    """The name of the folder in `export/families` that a family's graphs come from."""
    return family_of(models).__name__.split(".")[2]  # type: ignore[attr-defined]


def step_sources(models: Any) -> list[GraphSource]:
    """The graphs of a denoiser, the step's last."""
    sources = family_of(models).sources(models)
    (step,) = (source for source in sources if source.lifetime == "step")
    kept = ("size", "schedule", "prompt")
    return [*(source for source in sources if source.lifetime in kept), step]


def paired(step: GraphSource, module: nn.Module, inputs: tuple[TensorSpec, ...]) -> GraphSource:
    """A form's graph: one image under two conditions, height and width dynamic."""

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, axes=tuple(ONE_PAIR.get(str(a), a) for a in spec.axes))

    sides = tuple(fixed(spec) for spec in inputs), tuple(fixed(spec) for spec in step.outputs)
    return GraphSource(step.name, "step", module.eval(), *sides, bounded=step.bounded)


@torch.inference_mode()
def every_input(models: Any, size: Size, branches: int = 2) -> Iterator[tuple[str, Tensor]]:
    """By name, all that any form takes at a size: the null condition and a label's, or this."""
    interface = family_of(models).interface(models, ())
    condition = torch.zeros(2, len(interface.labels))
    if interface.labels:
        condition[1, LABEL % len(interface.labels)] = 1
    known = {
        "latent": torch.from_numpy(random_latent(interface.latent_channels, size)),
        "coordinates": torch.from_numpy(grid(*size)),
        "alpha_bar": torch.tensor([ALPHA_BAR]),
        "log_snr": torch.tensor([ALPHA_BAR / (1 - ALPHA_BAR)]).log(),
        "condition": condition[-branches if interface.labels else -1 :],
    }
    for source in step_sources(models)[:-1]:
        made = source.module(*(known[spec.name] for spec in source.inputs))
        known |= wired(source.outputs, made if isinstance(made, tuple) else (made,))
    yield from known.items()
