"""HDiT computes what k-diffusion does, at every size of the golden file.

The page names 2e-5 of the largest value and calls 5e-5 fair for another fp32 implementation.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.checkpoint import load_tensors
from reference.families.hdit import published
from reference.families.hdit.attention import attend, neighbourhood
from reference.families.hdit.layers import rotation_angles
from reference.families.hdit.model import HDiT, HDiTModels, scalings
from reference.families.hdit.training import density, losses
from reference.families.parts.rotary import cell_centres
from runtime.bundle.interface import KarrasData
from runtime.sampling.guidance import guided
from runtime.sampling.loop import sample
from runtime.sampling.schedule import read
from runtime.sampling.solvers import table
from tests.reference.families.golden import Golden, options

TOLERANCE = 2e-5
DENSITY = 1e-4  # the published tangent in float32 makes 1000.05 of a σ of 1000
Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("hdit")


def opened(golden: Golden, name: str) -> HDiTModels:
    """The models of the golden weights `name`, through what converts published ones."""
    files = [golden.state(name)]
    assert published.recognises(files)
    config, tensors = published.convert(files, options())
    models = HDiTModels(config)
    load_tensors(models, tensors, golden.path)
    return models.eval().requires_grad_(False)


def labels_of(classes: Tensor | None, count: int, batch: int) -> Tensor:
    """k-diffusion's class numbers as ours, `[B, count]`: the null class is the zero label."""
    if classes is None:
        return torch.zeros(batch, count)
    return F.one_hot(classes, count + 1)[:, :count].float()


def test_every_tensor_agrees(golden: Golden) -> None:
    for name in ("hour", "flat", "window"):
        models = opened(golden, name)
        for match, x in golden.named(rf"({name}\.\d+x\d+)\.x"):
            check_case(golden, models.hdit, match[1], x)
        if f"{name}.sample.x" in golden.tensors:
            check_samples(golden, models, name)
        if f"{name}.density.u" in golden.tensors:
            sigma = density(golden[f"{name}.density.u"].double(), models.config)
            golden.close(sigma.float(), f"{name}.density.sigma", DENSITY)
    check_loss(golden)
    inputs = (r".*\.(x|x0|sigmas|class_cond|aug_cond|z|noise|u)", r"\w+\.(\d+x\d+|loss)\.sigma")
    assert golden.rest(*inputs) == set()


def check_case(golden: Golden, hdit: HDiT, key: str, x: Tensor) -> None:
    sigma, config = golden[f"{key}.sigma"], hdit.config
    scales = scalings(sigma, config.sigma_data)
    labels = labels_of(golden.tensors.get(f"{key}.class_cond"), config.classes, len(x))
    cond = hdit.condition(scales[3], labels, golden.tensors.get(f"{key}.aug_cond"))
    golden.close(cond, f"{key}.mapping", TOLERANCE)
    parts = {f"down{i}": level for i, level in enumerate(hdit.down_levels)}
    parts |= {f"up{i}": level for i, level in enumerate(hdit.up_levels)} | {"mid": hdit.mid_level}
    kept: dict[str, Tensor] = {}
    handles = [hdit.patch_in.register_forward_hook(lambda m, i, out: kept.update(patch_in=out))]
    for part, layers in parts.items():
        last = list(layers.children())[-1]
        hook = lambda m, i, out, part=part: kept.update({part: out})  # noqa: E731
        handles.append(last.register_forward_hook(hook))
    golden.close(hdit.denoise(x, sigma, cond), f"{key}.denoised", TOLERANCE)
    for handle in handles:
        handle.remove()
    if f"{key}.inner" not in golden.tensors:
        return
    golden.close(scales, f"{key}.scalings", TOLERANCE)
    inner = hdit(scales[2][:, None, None, None] * x, cond)
    golden.close(inner, f"{key}.inner", TOLERANCE)
    for part, found in kept.items():
        golden.close(found, f"{key}.{part}", TOLERANCE)
    for match, pos in golden.named(rf"{key}\.pos(\d)"):
        height, width = pos.shape[:2]
        y, x_ = cell_centres(height, width)
        grid = torch.stack(torch.meshgrid(y, x_, indexing="ij"), -1).float()
        golden.close(grid, match[0], TOLERANCE)
        level = config.levels[int(match[1])]
        heads = level.width // level.head_dim
        angles = rotation_angles(height, width, heads, level.head_dim)
        golden.close(angles, f"{key}.theta{match[1]}", TOLERANCE)


def check_loss(golden: Golden) -> None:
    hdit = opened(golden, "hour").hdit
    x0, sigma, noise = (golden[f"hour.loss.{n}"] for n in ("x0", "sigma", "noise"))
    labels = labels_of(golden["hour.loss.class_cond"], 10, len(x0))
    found = losses(hdit, x0, sigma, noise, labels, None)
    golden.close(found, "hour.loss.value", TOLERANCE)


def check_samples(golden: Golden, models: HDiTModels, name: str) -> None:
    """k-diffusion's samplers in σ, as the page gives them, around our denoiser."""
    x, z = golden[f"{name}.sample.x"], golden[f"{name}.sample.z"]
    sigmas = golden[f"{name}.sample.sigmas"].double()
    labels = labels_of(golden[f"{name}.sample.class_cond"], 10, len(x))
    samplers = {
        "euler": (sde, 0, 1, "heun"),
        "euler_ancestral_eta1": (ancestral, 1, 1, ""),
        "2m": (sde, 0, 2, "midpoint"),
        "2m_sde_heun_eta0": (sde, 0, 2, "heun"),
        "2m_sde_heun_eta1": (sde, 1, 2, "heun"),
        "2m_sde_midpoint_eta1": (sde, 1, 2, "midpoint"),
        "3m_sde_eta0": (sde, 0, 3, ""),
        "3m_sde_eta1": (sde, 1, 3, ""),
    }
    for match, _ in golden.named(rf"{name}\.sample\.(\w+)\.cfg([\d.]+)\.out"):
        sampler, eta, order, kind = samplers[match[1]]
        guidance = float(match[2])

        def denoise(x: Tensor, sigma: Tensor, g: float = guidance) -> Tensor:
            both = torch.cat([torch.zeros_like(labels), labels])
            level = sigma.float().expand(len(both))
            cond = models.hdit.condition(level.log() / 4, both)
            null, given = models.hdit.denoise(x.repeat(2, 1, 1, 1), level, cond).chunk(2)
            return null + g * (given - null)

        golden.close(sampler(denoise, x, sigmas, z, eta, order, kind), match[0], 5e-5)


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, z: Tensor, eta: float, order: int, kind: str
) -> Tensor:
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        d = denoise(x, sigma)
        up = (eta**2 * after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        down = (after**2 - up**2).sqrt()
        x = ((down / sigma) * x + (1 - down / sigma) * d + up * z[step]).float()
    return x


def sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, z: Tensor, eta: float, order: int, kind: str
) -> Tensor:
    """DPM-Solver++ of order 1 to 3 and its SDE forms.

    Of order 3 the published form counts the last term of its quadratic half; "exact" is whole.
    """
    estimates: list[Tensor] = []
    steps: list[float] = []
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        d = denoise(x, sigma)
        if after == 0:
            return d
        h = math.log(sigma / after)
        g = (1 + eta) * h
        change = 0.0 * d
        phi2 = 1 - (1 - math.exp(-g)) / g
        if order == 2 and estimates:
            kappa = phi2 if kind == "heun" else (1 - math.exp(-g)) / 2
            change = kappa * (h / steps[-1]) * (d - estimates[-1])
        if order == 3 and len(estimates) == 1:
            change = phi2 * (h / steps[-1]) * (d - estimates[-1])
        if order == 3 and len(estimates) > 1:
            r0, r1, phi3 = steps[-1] / h, steps[-2] / h, phi2 / g - 0.5
            phi3 *= 2 if kind == "exact" else 1
            p, q = (d - estimates[-1]) / r0, (estimates[-1] - estimates[-2]) / r1
            change = phi2 * (p + (p - q) * r0 / (r0 + r1)) - phi3 * (p - q) / (r0 + r1)
        noise = after * math.sqrt(1 - math.exp(-2 * eta * h)) * z[step]
        x = (math.exp(-g) * x + (1 - math.exp(-g)) * d + change + noise).float()
        estimates.append(d)
        steps.append(h)
    return x


@pytest.mark.parametrize(
    ("solver", "order", "kind"), [("dpm++2m", 2, "heun"), ("dpm++3m", 3, "exact")]
)
def test_a_guided_run_in_sigma_is_ours_in_alpha_bar(
    golden: Golden, solver: str, order: int, kind: str
) -> None:
    """50 steps through the paper's noise levels, from noise of 80 to the picture."""
    models = opened(golden, "hour")
    config = models.config
    schedule = read(KarrasData(config.sigma_min, config.sigma_max), (32, 40))
    run = table(solver, schedule, 50)
    sigmas = torch.from_numpy(((1 - run.alpha_bar) / run.alpha_bar) ** 0.5)
    assert len(run) == 50 and sigmas[0] == pytest.approx(80) and sigmas[-1] == 0
    labels = torch.zeros(2, 1, 10)
    labels[1, 0, 3] = 1
    noise = torch.randn(1, config.channels, 32, 40, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.float().expand(2)
        cond = models.hdit.condition(level.log() / 4, labels.flatten(0, 1))
        null, given = models.hdit.denoise(x.repeat(2, 1, 1, 1), level, cond).chunk(2)
        return null + 2 * (given - null)

    start = noise * sigmas[0].float()
    wanted = sde(denoise, start, sigmas, torch.zeros(50), 0, order, kind)
    predict = guided(models.denoiser(labels, run.alpha_bar), [-1.0, 2.0])
    found = sample(predict, start * math.sqrt(run.alpha_bar[0]), run)
    torch.testing.assert_close(torch.as_tensor(found).float(), wanted, rtol=0, atol=5e-4)


def test_eps_of_the_loop_is_that_of_the_denoiser(golden: Golden) -> None:
    """z = √a·x and eps = (z - √a·D)/√(1 - a), for two conditions at once."""
    models = opened(golden, "hour")
    x, classes = golden["hour.32x32.x"], golden["hour.32x32.class_cond"]
    labels = labels_of(classes, 10, len(x))
    levels = np.array([0.01, 0.5, 0.99])
    denoise = models.denoiser(torch.stack([torch.zeros_like(labels), labels]), levels)
    for step, a in enumerate(levels):
        sigma = torch.full((len(x),), math.sqrt((1 - a) / a))
        for branch, given in enumerate((torch.zeros_like(labels), labels)):
            cond = models.hdit.condition(sigma.log() / 4, given)
            d = models.hdit.denoise(x / math.sqrt(a), sigma, cond)
            wanted = (x - math.sqrt(a) * d) / math.sqrt(1 - a)
            found = denoise(x, step)[branch]
            assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("size", [(7, 7), (8, 19), (16, 7), (23, 33)])
def test_tiles_are_the_neighbourhood(size: tuple[int, int]) -> None:
    """Against masked full attention with the window of each query written out."""
    height, width = size
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, height, width, 3, 8)
    rows, columns = torch.arange(height), torch.arange(width)

    def seen(at: Tensor) -> Tensor:
        start = (at - 3).clamp(0, len(at) - 7).unsqueeze(1)
        return (at >= start) & (at < start + 7)

    mask = seen(rows)[:, None, :, None] & seen(columns)[None, :, None, :]
    tokens = [x.flatten(1, 2) for x in (q, k, v)]
    full = attend(tokens[0], tokens[1], tokens[2], mask.flatten(2).flatten(0, 1)[None])
    torch.testing.assert_close(
        neighbourhood(q, k, v, 7), full.unflatten(1, size), rtol=0, atol=2e-6
    )


def test_sizes_follow_patches_merges_and_windows(golden: Golden) -> None:
    rules = {name: opened(golden, name).config for name in ("hour", "flat", "window")}
    found = {name: (config.multiple, config.minimum) for name, config in rules.items()}
    assert found == {"hour": (8, 32), "flat": (4, 4), "window": (8, 8)}
