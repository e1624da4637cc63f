"""Distilled guidance: what the copy learns, and that its bundle draws one branch a step."""

import random
from pathlib import Path

import pytest
import torch

from export.families.r2.bundle import interface
from reference import checkpoint
from reference.data import load_mnist
from reference.distill import GuidedTask
from reference.families.parts.training import Step
from reference.train import read_config
from runtime.bundle.interface import CosineData
from runtime.sampling.request import Request
from tests.conftest import Command
from tests.reference.test_data import MNIST
from tests.tiny import tiny_models


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny models that says how it would have been trained."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    names = [str(digit) for digit in range(10)]
    provenance = {"config": read_config("tiny"), "labels": names}
    checkpoint.save(path, tiny_models(), provenance, torch.float32)
    return path


def test_target_is_guided_within_the_interval_alone(teacher: Path) -> None:
    """Against eps of the model's own forward, on grids, at both kinds of t and with hidden labels.

    With all labels hidden guidance has nothing to add.
    """
    images = load_mnist(MNIST).cropped(16)
    models, student = checkpoint.load(teacher).models, checkpoint.load(teacher).models
    own = read_config("tiny")["r2id"] | {"guidance": 3.0, "guidance_interval": (0.3, 0.7)}
    for hidden in (0.0, 1.0):
        task = GuidedTask(own | {"condition_dropout": hidden}, student, images, models)
        torch.manual_seed(0)
        chosen = torch.arange(16)
        condition = torch.nn.functional.one_hot(images.labels[chosen], 10).float()
        step = Step(0, 1, images.pixels[chosen], condition, random.Random(0), chosen)
        noisy, at, alpha_bar, label, found, _ = task.inputs(step)
        text = models.condition(torch.cat([torch.zeros_like(label), label]))
        null, eps = models.r2id.predict_tokens(noisy, at, alpha_bar, text)
        # The cosine schedule's t, from the angle whose cosine is the root of alpha_bar.
        t = torch.acos(alpha_bar.sqrt()) * 2 / torch.pi * 1.008 - 0.008
        inside = (t > 0.3) & (t < 0.7)
        assert 4 < inside.sum() < 12
        scale = torch.where(inside, 3.0, 1.0).view(-1, 1, 1)
        wanted = null if hidden else (1 - scale) * null + scale * eps
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert hidden or not torch.allclose(found, eps[0], atol=1e-3)


def test_copy_comes_near_to_its_teacher_and_draws_without_a_null_branch(
    teacher: Path, tmp_path: Path, command: Command
) -> None:
    line = ["reference.distill", "--checkpoint", teacher, "--data", MNIST, "--guidance", 3]
    ran = command(*line, "--steps", 60, "--learning-rate", 3e-3, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "PSNR of the same seeds" in ran.stdout and (tmp_path / "distilled.png").exists()
    made = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert made.provenance["teacher"] == checkpoint.load(teacher).sha256
    losses = (tmp_path / "distilled.csv").read_text().splitlines()[1:]
    first, last = (
        sum(float(row.split(",")[1]) for row in rows) / 10 for rows in (losses[:10], losses[-10:])
    )
    assert last < first / 2
    own = interface(made.models, ())
    request = Request([3, 8], (4, 4))
    guidance = request.guidance(request.table(CosineData()), CosineData(), own)
    assert all(len(guidance.branches(step)) == 1 for step in range(request.count))
    assert request.scale(interface(checkpoint.load(teacher).models, ())) == 2.0
