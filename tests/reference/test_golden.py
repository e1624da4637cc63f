"""Parity with every output of the published implementation."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from reference import checkpoint, published
from reference.families.parts.embeddings import PositionFeatures, TimeFeatures
from runtime import coordinates
from runtime.sampling import solvers
from runtime.sampling.guidance import guided
from runtime.sampling.loop import sample
from runtime.sampling.schedule import COSINE

FILES = sorted((Path(__file__).parents[1] / "golden").glob("r2_*.safetensors"))
TOLERANCE = 5e-5  # the last bit of a coordinate shows at the top frequencies
TRAJECTORY_TOLERANCE = 1e-3


class Golden:
    """A golden file: its tensors, those not yet compared, and the models it describes."""

    def __init__(self, path: Path, folder: Path):
        with safe_open(path, "pt") as file:
            self.tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            meta = {k: json.loads(v) for k, v in file.metadata().items() if v.startswith("{")}
        self.r2ir_meta, self.r2id_meta = meta["r2ir"], meta["r2id"]
        paths = []
        for part in ("r2ir", "r2id", "text"):
            paths.append(str(folder / f"{part}.pt"))
            prefix = f"state.{part}."
            state = {
                k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)
            }
            torch.save(state, paths[-1])
        out = folder / "out.safetensors"
        options = {
            "--r2ir-heads": meta["r2ir"]["num_heads"],
            "--r2id-heads": meta["r2id"]["num_heads"],
        }
        flags = [str(item) for pair in options.items() for item in pair]
        args: argparse.Namespace = published.parser().parse_args([*paths, str(out), *flags])
        published.convert(args)
        self.models = checkpoint.load(out).models
        self.compared = {k for k in self.tensors if k.startswith("state.")}

    def named(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        pairs = [(m, t) for k, t in self.tensors.items() if (m := re.fullmatch(pattern, k))]
        assert pairs, pattern
        return pairs

    def close(self, found: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
        wanted = self.tensors[name]
        assert found.shape == wanted.shape
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"
        self.compared.add(name)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("golden"))


def test_every_tensor_agrees(golden: Golden) -> None:
    check_features(golden)
    check_r2ir(golden)
    check_r2id(golden)
    check_schedule(golden)
    check_trajectories(golden)
    inputs = {"encode.image", "denoise.x", "denoise.alpha_bar", "text.label"}
    noise = {name for name in golden.tensors if name.endswith(".z")}
    assert set(golden.tensors) - golden.compared == inputs | noise


def check_features(golden: Golden) -> None:
    position = golden.models.r2ir.position
    for match, _ in golden.named(r"posembed\.(relative|absolute)\.(\d+)x(\d+)"):
        grid = torch.from_numpy(coordinates.grid(int(match[2]), int(match[3])))
        features = PositionFeatures.forward(position, grid).permute(2, 0, 1).unsqueeze(0)
        square, edge = features.chunk(2, 1)
        golden.close(square if match[1] == "relative" else edge, match[0])


def check_r2ir(golden: Golden) -> None:
    r2ir = golden.models.r2ir
    latent = golden.tensors["encode.latent"]
    found = r2ir.encode(golden.tensors["encode.image"], (latent.shape[2], latent.shape[3]))
    golden.close(found, "encode.latent")
    for match, _ in golden.named(r"decode\.(\d+)x(\d+)"):
        golden.close(r2ir.decode(latent, (int(match[1]), int(match[2]))), match[0])


def check_r2id(golden: Golden) -> None:
    models, tensors = golden.models, golden.tensors
    label = tensors["text.label"]
    golden.close(models.condition(label), "text.tokens")
    golden.close(models.condition(torch.zeros_like(label)), "text.null_tokens")
    alpha_bar = tensors["denoise.alpha_bar"]
    golden.close(models.r2id.film(models.r2id.time(alpha_bar)), "denoise.film")
    text = torch.stack([models.condition(torch.zeros_like(label)), models.condition(label)])
    null, cond = models.r2id(tensors["denoise.x"], alpha_bar, text)
    golden.close(null, "denoise.eps_null")
    golden.close(cond, "denoise.eps_cond")


def check_schedule(golden: Golden) -> None:
    t = golden.tensors["schedule.t"].double().numpy()
    golden.close(torch.from_numpy(COSINE.alpha_bar(t)).float(), "schedule.alpha_bar")
    golden.compared.add("schedule.t")


def check_trajectories(golden: Golden) -> None:
    models, tensors = golden.models, golden.tensors
    label = tensors["text.label"]
    for match, _ in golden.named(r"(ddim\.eta([\d.]+)\.steps(\d+)\.cfg([\d.]+))\.x"):
        eta, steps, guidance = float(match[2]), int(match[3]), float(match[4])
        z = tensors.get(f"{match[1]}.z")
        start = tensors["denoise.x"]
        table = solvers.table("ddim", COSINE, steps, eta=eta)
        conditions = torch.stack([torch.zeros_like(label), label])
        denoise = models.denoiser(conditions, table.alpha_bar)
        predict = guided(denoise, (1 - guidance, guidance))
        noise = None if z is None else (lambda step, z=z: z[step])
        x = sample(predict, start, table, noise)
        golden.close(x, f"{match[1]}.x", TRAJECTORY_TOLERANCE)
        x0 = solvers.predict_x0(x, predict(x, steps), float(table.alpha_bar[-1]))
        golden.close(x0, f"{match[1]}.x0_hat", TRAJECTORY_TOLERANCE)


def test_time_features_are_normalised() -> None:
    features = TimeFeatures(4, 2)(torch.tensor(np.linspace(0, 1, 5)))
    assert features.mean(-1).abs().max() < 1e-6
