"""SiD2 computes what its page says, at every size of the golden file.

The page names 1e-6 of the largest value, 5e-6 for walks of several steps, 2e-5 for clipped ones.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.checkpoint import load_tensors
from reference.families.parts.config import read
from reference.families.sid2.config import SiD2Model
from reference.families.sid2.layers import rotation_of
from reference.families.sid2.model import SiD2Models
from reference.families.sid2.schedule import schedule_of, sigmoid, slope
from reference.families.sid2.training import weight_v
from tests.reference.families.golden import Golden, walk

TOLERANCE = 1.5e-6  # 1e-6, and what another order of sums may add
WALK, CLIPPED = 5e-6, 2e-5
TYPES = {"res": "res", "tr": "transformer"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("sid2")


@pytest.fixture(scope="module")
def models(golden: Golden) -> SiD2Models:
    meta, schedule = golden.meta["model"], golden.meta["schedule"]
    section = {k: v for k, v in meta.items() if k not in ("in_channels", "types")}
    section |= {"channels": meta["in_channels"], "types": [TYPES[t] for t in meta["types"]]}
    whole = {
        "name": "golden",
        "sid2": section,
        "schedule": {k.replace("noise_d", "noise"): v for k, v in schedule.items()},
        "default_size": [16, 16],
    }
    models = SiD2Models(read(SiD2Model, whole, "golden"))
    state = golden.state().tensors
    load_tensors(models, {f"sid2.{k}": v for k, v in state.items()}, golden.path)
    assert sum(p.numel() for p in models.parameters()) == golden.meta["parameters"]
    assert models.config.multiple == golden.meta["divisor"]
    return models.eval().requires_grad_(False)


def one_hot(label: Tensor, classes: int) -> Tensor:
    return F.one_hot(label, classes + 1)[:, :classes].float()


def test_every_tensor_agrees(golden: Golden, models: SiD2Models) -> None:
    check_condition(golden, models)
    for match, z in golden.named(r"model\.(\d+x\d+)\.z"):
        check_network(golden, models, match[1], z)
    check_trace(golden, models)
    check_schedule(golden, models)
    check_loss(golden, models)
    check_walks(golden, models)
    inputs = (r"(cond|model.*|ddim|loss)\.(z|logsnr|label|noise|t|x)", r"schedule\.t")
    assert golden.rest(*inputs) == set()


def check_condition(golden: Golden, models: SiD2Models) -> None:
    logsnr, labels = golden["cond.logsnr"], one_hot(golden["cond.label"], 5)
    golden.close(models.sid2.features(logsnr), "cond.features", TOLERANCE)
    golden.close(models.sid2.condition(logsnr, labels), "cond.vector", TOLERANCE)
    for match, _ in golden.named(r"rotary\.(\d+)x(\d+)\.cos"):
        size = int(match[1]), int(match[2])
        for part, table in zip(("cos", "sin"), rotation_of(*size, 12, CPU), strict=True):
            golden.close(table, f"rotary.{match[1]}x{match[2]}.{part}", TOLERANCE)


def check_network(golden: Golden, models: SiD2Models, size: str, z: Tensor) -> None:
    logsnr, labels = golden[f"model.{size}.logsnr"], one_hot(golden[f"model.{size}.label"], 5)
    alpha_bar = torch.sigmoid(logsnr.double())[:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for name, given in (("null", torch.zeros_like(labels)), ("cond", labels)):
        v = models.sid2(z, logsnr, given)
        golden.close(v, f"model.{size}.v_{name}", TOLERANCE)
        golden.close((sigma * z + alpha * v).float(), f"model.{size}.eps_{name}", TOLERANCE)
        golden.close((alpha * z - sigma * v).float(), f"model.{size}.x0_{name}", TOLERANCE)
    for index in range(len(z)):  # the loop's eps, whose level is one number for the batch
        levels = alpha_bar[index].flatten().numpy()
        denoise = models.denoiser(torch.stack([torch.zeros_like(labels), labels]), levels)
        null, cond = denoise(z, 0)
        for name, found in (("null", null), ("cond", cond)):
            wanted = golden[f"model.{size}.eps_{name}"]
            error = (found[index] - wanted[index]).abs().max() / wanted.abs().max()
            assert error < TOLERANCE


def check_trace(golden: Golden, models: SiD2Models) -> None:
    """Every level's output, caught by hooks; `up` is what its level's first block is given."""
    size, net = "16x40", models.sid2
    kept: dict[str, Tensor] = {}
    handles = []
    for match, _ in golden.named(rf"trace\.{size}\.(embed|down\.\d|(?:enc|dec|up)\.\d|mid)"):
        name = match[1]
        module = net.get_submodule(name.replace("up", "dec"))
        if name.startswith("up"):
            first = next(module.children())
            hook = lambda m, inputs, name=name: kept.update({name: inputs[0]})  # noqa: E731
            handles.append(first.register_forward_pre_hook(hook))
            continue
        last = [*module.children(), module][-2 if list(module.children()) else -1]
        after = lambda m, inputs, out, name=name: kept.update({name: out})  # noqa: E731
        handles.append(last.register_forward_hook(after))
    labels = one_hot(golden[f"model.{size}.label"], 5)
    logsnr = golden[f"model.{size}.logsnr"]
    net(golden[f"model.{size}.z"], logsnr, labels)
    for handle in handles:
        handle.remove()
    golden.close(net.condition(logsnr, labels), f"trace.{size}.cond", TOLERANCE)
    for name, found in kept.items():
        wanted = golden[f"trace.{size}.{name}"]
        if found.ndim == 3:
            found = found.transpose(1, 2).unflatten(2, wanted.shape[-2:])
        golden.close(found, f"trace.{size}.{name}", TOLERANCE)


def check_schedule(golden: Golden, models: SiD2Models) -> None:
    t, sizes = golden["schedule.t"].numpy(), {16.0: (16, 16), 19.5959: (16, 24), 128.0: (128, 128)}
    for match, _ in golden.named(r"schedule\.logsnr\.d([\d.]+)"):
        schedule = schedule_of(models.config.schedule, sizes[float(match[1])])
        logsnr = schedule.log_snr(t)
        found = {"logsnr": logsnr, "dlogsnr": slope(schedule, t), "alpha_bar": sigmoid(logsnr)}
        for name, value in found.items():
            golden.close(torch.from_numpy(value), f"schedule.{name}.d{match[1]}", 1e-12)


def check_loss(golden: Golden, models: SiD2Models) -> None:
    schedule = schedule_of(models.config.schedule, (16, 16))
    t = golden["loss.t"].numpy()
    logsnr, falling = schedule.log_snr(t), slope(schedule, t)
    alpha_bar = torch.from_numpy(sigmoid(logsnr))[:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, eps = golden["loss.x"], golden["loss.noise"]
    z, target = (alpha * x + sigma * eps).float(), (alpha * eps - sigma * x).float()
    golden.close(z, "loss.z", TOLERANCE)
    golden.close(target, "loss.v_target", TOLERANCE)
    level = torch.from_numpy(logsnr).float()
    v = models.sid2(golden["loss.z"], level, one_hot(golden["loss.label"], 5))
    golden.close(v, "loss.v", TOLERANCE)
    mse = (v.double() - golden["loss.v_target"].double()).square().mean((1, 2, 3))
    golden.close(mse, "loss.mse_v", TOLERANCE)
    for match, _ in golden.named(r"loss\.b(-?\d)\.value"):
        bias, key = float(match[1]), f"loss.b{match[1]}"
        weight = weight_v(logsnr, falling, bias)
        golden.close(torch.from_numpy(weight), f"{key}.weight_v", 1e-12)
        golden.close(torch.from_numpy(weight / sigmoid(logsnr)), f"{key}.weight_eps", 1e-12)
        golden.close(torch.from_numpy(weight / sigmoid(-logsnr)), f"{key}.weight_x0", 1e-12)
        golden.close(torch.from_numpy(weight) * mse, f"{key}.value", TOLERANCE)


def check_walks(golden: Golden, models: SiD2Models) -> None:
    """DDIM with guidance, noise, an interval of noise levels and clipping."""
    meta = golden.meta["ddim"]
    schedule = schedule_of(models.config.schedule, tuple(meta["size"]))
    alpha_bars = schedule.alpha_bar(np.linspace(1.0, 0.0, meta["steps"] + 1))
    labels = one_hot(golden["ddim.label"], 5)
    denoise = models.denoiser(torch.stack([torch.zeros_like(labels), labels]), alpha_bars)
    for index, run in enumerate(meta["runs"]):
        x, x0, _ = walk(
            denoise,
            golden["ddim.z"],
            alpha_bars,
            run["guidance"],
            run["eta"],
            golden["ddim.noise"],
            run.get("interval", (0.0, math.inf)),
            run.get("clip", False),
        )
        tolerance = CLIPPED if run.get("clip") else WALK
        golden.close(x, f"ddim.{index}.x", tolerance)
        golden.close(x0, f"ddim.{index}.x0", tolerance)
