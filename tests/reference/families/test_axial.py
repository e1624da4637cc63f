"""SIID and S2ID compute what the published implementations do, at every size of the golden files.

Their pages name 1e-6 of the largest value, 2e-6 at the end of a trajectory, with coordinates of
torch's float32 linspace, and with float64 ones 3e-5 on features and 5e-6 on eps for S2ID.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.checkpoint import load_tensors
from reference.families.parts.axial import AxialDenoiser, coordinates
from reference.families.s2id import published as s2id_published
from reference.families.s2id.model import S2IDModels
from reference.families.siid import published as siid_published
from reference.families.siid.model import SIIDModels
from tests.reference.families.golden import Golden, cosine_alpha_bar, options, walk

TIGHT = 1.5e-6  # 1e-6, and what another order of sums may add
TRAJECTORY = 2e-6
FEATURES, EPS = 3e-5, 5e-6  # of float64 coordinates
BOTH = pytest.mark.parametrize("name", ["siid", "s2id"])
Models = SIIDModels | S2IDModels


def opened(name: str) -> tuple[Golden, Models, AxialDenoiser]:
    """A golden file and the models of its weights."""
    golden = Golden(name)
    files = [golden.state(name), golden.state("text")]
    meta = golden.meta[name]
    given = options(heads=meta["num_heads"], fold=meta.get("rescale_factor"))
    if name == "siid":
        assert siid_published.recognises(files) and not s2id_published.recognises(files)
        siid, tensors = siid_published.convert(files, given)
        models: Models = SIIDModels(siid)
    else:
        assert s2id_published.recognises(files) and not siid_published.recognises(files)
        s2id, tensors = s2id_published.convert(files, given)
        models = S2IDModels(s2id)
    load_tensors(models, tensors, golden.path)
    models.eval().requires_grad_(False)
    return golden, models, getattr(models, name)


def given_coordinates(golden: Golden, size: str) -> Tensor:
    """The golden file's own coordinates of a grid, `[1, h, w, 4]`."""
    pair = [golden[f"coords.{system}.{size}"] for system in ("relative", "absolute")]
    return torch.cat(pair).movedim(0, -1).unsqueeze(0)


def maps(tokens: Tensor) -> Tensor:
    """`[..., h, w, d]` -> `[..., d, h, w]`."""
    return tokens.movedim(-1, -3)


def texts(golden: Golden) -> dict[str, Tensor]:
    names = ("null_tokens", "tokens", "tokens_2", "extra_tokens")
    outputs = ("eps_null", "eps_cond", "eps_cond_2", "eps_extra")
    return dict(zip(outputs, (golden[f"text.{n}"] for n in names), strict=True))


@BOTH
def test_every_tensor_agrees(name: str) -> None:
    golden, models, model = opened(name)
    check_features(golden, model)
    check_text(golden, models)
    trace_parts(golden, model)
    for match, x in golden.named(r"denoise\.(\d+x\d+)\.x"):
        check_eps(golden, model, match[1], x)
    check_trajectory(golden, model, models)
    golden.compared |= {k for k in golden.tensors if k.startswith("coords.")}  # given
    inputs = (r".*\.(x|alpha_bar|label|label_2|t|extra_tokens|jitter|sigma)", r"ddim.*(x_init|z)")
    assert golden.rest(*inputs) == set()


def check_features(golden: Golden, model: AxialDenoiser) -> None:
    for match, _ in golden.named(r"coords\.relative\.(\d+)x(\d+)"):
        size = f"{match[1]}x{match[2]}"
        at, ours = (
            given_coordinates(golden, size),
            coordinates(int(match[1]), int(match[2]), torch.device("cpu")),
        )
        assert (at - ours).abs().max() < 1e-7
        for grid, tolerance in ((at, TIGHT), (ours, FEATURES)):
            square, edge = maps(model.position(grid)).chunk(2, 1)
            golden.close(square, f"posembed.relative.{size}", tolerance)
            golden.close(edge, f"posembed.absolute.{size}", tolerance)
    if "train.posembed.relative.9x16.jitter" in golden.tensors:
        check_jittered_features(golden, model)


def check_jittered_features(golden: Golden, model: AxialDenoiser) -> None:
    jitter = torch.cat([golden[f"train.posembed.{s}.9x16.jitter"] for s in SYSTEMS], 1)
    at = given_coordinates(golden, "9x16") + jitter.movedim(1, -1)
    for system, found in zip(SYSTEMS, maps(model.position(at)).chunk(2, 1), strict=True):
        golden.close(found, f"train.posembed.{system}.9x16.features", TIGHT)


SYSTEMS = ("relative", "absolute")


def check_text(golden: Golden, models: Models) -> None:
    label = golden["text.label"]
    golden.close(models.condition(label), "text.tokens", TIGHT)
    golden.close(models.condition(golden["text.label_2"]), "text.tokens_2", TIGHT)
    golden.close(models.condition(torch.zeros_like(label)), "text.null_tokens", TIGHT)


def check_eps(golden: Golden, model: AxialDenoiser, size: str, x: Tensor) -> None:
    """eps at golden coordinates and at our own, the encoder's output and its masks."""
    key, fold = f"denoise.{size}", model.fold
    alpha_bar = golden[f"{key}.alpha_bar"]
    golden.close(model.time(alpha_bar), f"{key}.time_features", TIGHT)
    film = model.film(model.time(alpha_bar))
    golden.close(film, f"{key}.film", TIGHT)
    height, width = x.shape[-2] // fold, x.shape[-1] // fold
    at = given_coordinates(golden, f"{height}x{width}")
    folded = F.pixel_unshuffle(x, fold).movedim(1, -1)
    if f"{key}.encoded" in golden.tensors:
        golden.close(maps(model.encode(folded, at, film)), f"{key}.encoded", TIGHT)
    for index, block in enumerate(model.encoder):
        masks = model.masks(block, at)
        for mask, axis in zip(masks or (), ("row", "col"), strict=False):
            golden.close(mask, f"{key}.mask_{axis}.{index}", TIGHT)
    for name, text in texts(golden).items():
        eps = model.predict_tokens(folded, at, alpha_bar, text.unsqueeze(0))[0]
        golden.close(F.pixel_shuffle(maps(eps), fold), f"{key}.{name}", TIGHT)
        golden.close(model(x, alpha_bar, text.unsqueeze(0))[0], f"{key}.{name}", EPS)
    # Guidance branches as one batch are the branches one by one.
    both = torch.stack([golden["text.null_tokens"], golden["text.tokens"]])
    for eps, name in zip(model(x, alpha_bar, both), ("eps_null", "eps_cond"), strict=True):
        golden.close(eps, f"{key}.{name}", EPS)


def trace_parts(golden: Golden, model: AxialDenoiser) -> None:
    """Every traced part of the network, caught by hooks while eps_null is computed."""
    kept: dict[str, Tensor] = {}

    def keep(part: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(part, output)

    names = {
        "axial_attn": "attention",
        "axial_norm": "attention_norm.norm",
        "cross_attn": "cross",
        "cross_norm": "cross_norm.norm",
        "ffn": "ffn",
        "ffn_norm": "ffn_norm.norm",
    }
    handles = [model.color_in.register_forward_hook(keep("stem"))]
    blocks = {"enc_blocks": model.encoder[0], "dec_blocks": model.decoder[0]}
    for kind, block in blocks.items():
        for theirs, ours in names.items():
            if hasattr(block, ours.partition(".")[0]):
                part = f"trace.{kind}.0.{theirs}"
                handles.append(block.get_submodule(ours).register_forward_hook(keep(part)))
    handles.append(model.encoder[0].register_forward_hook(keep("trace.enc_blocks.0")))
    eps_out = model.eps_out.register_forward_pre_hook(
        lambda module, inputs: kept.__setitem__("decoded_null", inputs[0])
    )
    fold = model.fold
    for match, x in golden.named(r"denoise\.(\d+x\d+)\.x"):
        at = given_coordinates(golden, f"{x.shape[-2] // fold}x{x.shape[-1] // fold}")
        text = golden["text.null_tokens"].unsqueeze(0)
        folded = F.pixel_unshuffle(x, fold).movedim(1, -1)
        alpha_bar = golden[f"denoise.{match[1]}.alpha_bar"]
        model.predict_tokens(folded, at, alpha_bar, text)
        film = model.film(model.time(alpha_bar))
        encoded = model.encode(folded, at, film)
        decoder: Any = model.decoder[0]
        kept["trace.dec_blocks.0"] = decoder.decode(encoded, film, text[0])
        for part, found in kept.items():
            wanted = f"denoise.{match[1]}.{part}"
            if wanted in golden.tensors:
                if found.ndim == 3:
                    found = found.unflatten(1, at.shape[1:3])
                # GroupNorm's output has its channels first already.
                golden.close(found if part.endswith("_norm") else maps(found), wanted, TIGHT)
    for handle in (*handles, eps_out):
        handle.remove()


def check_trajectory(golden: Golden, model: AxialDenoiser, models: Models) -> None:
    """Four guided DDIM steps; the golden inputs of each step are met on the way.

    The golden estimate of x0 is made of the sample with the eps of the last step.
    """
    label, fold = golden["text.label"], model.fold
    labels = torch.stack([torch.zeros_like(label), label])
    text = models.condition(labels)
    for match, start in golden.named(r"(ddim\.eta([\d.]+)\.steps(\d+)\.cfg([\d.]+))\.x_init"):
        key, eta, steps, guidance = match[1], float(match[2]), int(match[3]), float(match[4])
        alpha_bars = cosine_alpha_bar(np.linspace(1, 0, steps + 1))
        golden.close(torch.from_numpy(alpha_bars[:-1]).float(), f"{key}.alpha_bar", TIGHT)
        at = given_coordinates(golden, f"{start.shape[-2] // fold}x{start.shape[-1] // fold}")
        inputs: list[Tensor] = []

        def denoise(
            x: Tensor, step: int, levels: Any = alpha_bars, at: Tensor = at, seen: Any = inputs
        ) -> Tensor:
            seen.append(x)
            folded = F.pixel_unshuffle(x, fold).movedim(1, -1)
            alpha_bar = torch.tensor(levels[step]).float().expand(len(x))
            return F.pixel_shuffle(maps(model.predict_tokens(folded, at, alpha_bar, text)), fold)

        given = (start, alpha_bars, guidance, eta, golden[f"{key}.z"])
        x, _, eps = walk(denoise, *given)
        golden.close(torch.stack(inputs), f"{key}.inputs", TRAJECTORY)
        golden.close(x, f"{key}.x", TRAJECTORY)
        a = alpha_bars[-1]
        x0 = (x - math.sqrt(1 - a) * eps) / (math.sqrt(a) + 1e-6)
        golden.close(x0, f"{key}.x0_hat", TRAJECTORY)
        own, *_ = walk(models.denoiser(labels, alpha_bars), *given)
        golden.close(own, f"{key}.x", EPS)
    t = golden["schedule.t"].double().numpy()
    golden.close(torch.from_numpy(cosine_alpha_bar(t)).float(), "schedule.alpha_bar", TIGHT)
