"""Drawing digits to be judged: estimates on the way, guidance, painted digits."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference.classifier import Classifier
from reference.data import HUES
from reference.evaluation.drawing import GraphDrawing, Sampling, TorchDrawing, batches
from reference.evaluation.judging import Judge, judged
from reference.families.r2.model import R2Models
from reference.train import build_models, read_config
from runtime import open_bundle
from tests.tiny import tiny_models

PAINTED = (10, len(HUES), len(HUES))


@pytest.fixture(scope="module")
def models() -> R2Models:
    return tiny_models()


def test_batches_cover_every_digit_once() -> None:
    found = [i for part in batches(1000, (16, 16)) for i in range(part.start, part.stop)]
    assert found == [*range(1000)]
    assert batches(2, (64, 64)) == [slice(0, 1), slice(1, 2)]


def test_the_last_estimate_on_the_way_is_what_is_drawn(models: R2Models) -> None:
    estimates: dict[int, list[Tensor]] = {}

    def note(step: int, part: slice, x0: Tensor) -> None:
        estimates.setdefault(step, []).append(x0)

    draw = TorchDrawing(models, Sampling(steps=4))
    drawn = draw(draw.labels(60), (10, 10), on_estimate=note)  # in two batches
    assert [*estimates] == [0, 1, 2, 3] and len(estimates[0]) == 2
    assert torch.allclose(torch.cat(estimates[3]), drawn.latents, rtol=1e-4)
    assert not torch.allclose(torch.cat(estimates[0]), drawn.latents, rtol=1e-2)
    assert drawn.images.shape == (60, 1, 32, 32)
    assert draw.decode(drawn.latents[:2], (8, 12)).shape == (2, 1, 8, 12)


def test_guidance_counts_within_its_interval_alone(models: R2Models) -> None:
    def latents(interval: tuple[float, float], scale: float) -> Tensor:
        draw = TorchDrawing(models, Sampling(steps=3, guidance_interval=interval))
        return draw(draw.labels(4), (4, 4), guidance_scale=scale).latents

    without = latents((0, 1), 1)
    assert torch.equal(latents((0, 0.001), 3), without)  # no step lies there
    assert not torch.allclose(latents((0, 1), 3), without)
    assert not torch.allclose(latents((0.5, 1), 3), latents((0, 1), 3))


def test_a_model_that_paints_is_asked_for_hues_and_judged_by_them() -> None:
    config = read_config("tiny")
    config["model"]["r2ir"]["color_channels"] = 3
    config["model"]["condition"]["labels"] = sum(PAINTED)
    draw = TorchDrawing(
        build_models(config, "painted").eval().requires_grad_(False), Sampling(steps=2), PAINTED
    )
    assert draw.labels(20).shape == (20, 3)
    judge = Judge(Classifier().eval(), torch.randn(50, 128), PAINTED)
    found = judged(draw, judge, (4, 6), 20)
    assert found.keys() == {"read_right", "frechet", "precision", "recall", "hues_right"}
    assert found["hues_right"] < 0.2 and found["frechet"] > 0


def test_graphs_draw_rows_of_labels_as_the_models_do(own_bundle: Path, models: R2Models) -> None:
    path = own_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["interface"]["parts"] = [4, 3, 3]  # the tiny bundle's ten labels
    path.write_text(json.dumps(manifest))
    labels = torch.tensor([[0, 4, 8], [3, 6, 7]])
    sampling = Sampling(steps=3)
    by_graphs = GraphDrawing(open_bundle(own_bundle), sampling)(labels, (4, 5)).latents
    by_models = TorchDrawing(models, sampling)(labels, (4, 5)).latents
    assert torch.allclose(by_graphs, by_models, rtol=1e-3, atol=1e-4)
    alone = GraphDrawing(open_bundle(own_bundle), sampling)(labels[:, 0], (4, 5)).latents
    assert not torch.allclose(by_graphs, alone, rtol=1e-2)
