"""Evaluation: the report holds every measure, is not measured twice, and grows where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from reference import checkpoint
from reference.evaluation.drawing import GraphDrawing, Sampling, TorchDrawing
from reference.evaluation.extent import FULL, QUICK
from runtime import open_bundle
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import read_manifest
from runtime.sampling.noise import KINDS
from tests.conftest import Command
from tests.reference.test_data import MNIST

needs_mnist = pytest.mark.skipif(
    not MNIST.exists(), reason=f"no MNIST at {MNIST}; set MNIST to its folder"
)


def test_the_quick_measure_is_a_part_of_the_whole_one() -> None:
    for kind in ("sizes", "decoded", "reconstructed", "scraped", "factors", "alike", "sheets"):
        assert {*getattr(QUICK, kind)} <= {*getattr(FULL, kind)}
    assert QUICK.digits < FULL.digits and QUICK.images < FULL.images


@needs_mnist
def test_a_quick_report_and_its_pictures(
    tiny_bundle: Path, classifier_file: Path, tmp_path: Path, command: Command
) -> None:
    """Random weights draw nothing that can be read, while the classifier reads real digits."""
    args = ("--checkpoint", tiny_bundle / "tiny.safetensors", "--data", MNIST, "--out", "out")
    small = ("--classifier", classifier_file, "--images", 10, "--digits", 20, "--steps", 2)
    done = command("reference.evaluate", *args, *small, "--quick")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "quick.json"
    report = json.loads(path.read_text())
    assert report["classifier_accuracy"]["test_images"] > 0.9
    assert report["real_digits"]["train"]["read_right"] > 0.8
    rows = report["generation"]
    names = [f"{size_name(size)} at guidance 2" for size in QUICK.sizes]
    assert [*rows] == ["8x8 at guidance 1", *names, "10x10 as 40x24 at guidance 2"]
    assert all(row["read_right"] < 0.5 for row in rows.values())
    assert all(row["frechet"] > report["real_digits"]["train"]["frechet"] for row in rows.values())
    assert all(error > 0.05 for error in report["reconstruction_mse"].values())
    curve = report["scale_consistency"]["8x8"]
    assert curve["factor"] == [1, 2, 4, 16] and curve["psnr"][0] > 80 > curve["psnr"][1]
    assert curve["ssim"][0] == pytest.approx(1) and len(curve["ssim"]) == 4
    assert len(report["early_stop"]["8x8"]["read_right"]) == 2
    assert len(report["eps_mse_over_t"]["8x8"]["label"]) == 20
    same = report["same_picture"]
    assert same.keys() == set(KINDS)
    assert all(found["8x8"]["psnr"] > 80 > found["12x12"]["psnr"] for found in same.values())
    assert same["coherent"]["12x12"]["psnr"] != same["independent"]["12x12"]["psnr"]
    charts = ("eps-over-t", "scale-psnr", "scale-ssim", "early-stop")
    sheets = ("digits-16x9", "digits-10x10-as-40x24", "one-seed", "latent-channels")
    for name in (*charts, *sheets, "reconstructions"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 10
    assert "precision" in done.stdout and "likeness" in done.stdout

    del rows["16x16 at guidance 2"], report["early_stop"]
    report["reconstruction_mse"]["8x8"] = -1  # kept: what the report holds is not measured again
    path.write_text(json.dumps(report))
    resumed = command("reference.evaluate", *args, *small, "--quick")
    again = json.loads(path.read_text())
    assert "-1.0000" in resumed.stdout and len(again["early_stop"]["8x8"]["read_right"]) == 2
    assert "16x16 at guidance 2: " in resumed.stderr
    assert "4x4 at guidance 2" not in resumed.stderr


@needs_mnist
def test_models_that_diffuse_pixels_are_judged_at_sizes_around_their_own(
    pixel_bundle: Path, classifier_file: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--checkpoint", pixel_bundle / "tiny.safetensors", "--data", MNIST, "--out", "out")
    small = ("--classifier", classifier_file, "--images", 10, "--digits", 20, "--steps", 2)
    done = command("reference.evaluate", *args, *small)
    assert "pass --bundle" in done.stderr and done.returncode == 2
    bundle = ("--bundle", pixel_bundle)
    done = command("reference.evaluate", *args, *small, *bundle, "--only", "scale")
    assert "diffuses pixels and has no resampler; expected one of" in done.stderr
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    done = command("reference.evaluate", *args, *small, *bundle, "--quick")
    assert done.returncode == 0, done.stderr
    assert "left out: reconstruction, scale (tiny-" in done.stdout
    report = json.loads((tmp_path / "out" / "quick.json").read_text())
    interface = read_manifest(pixel_bundle).interface
    own, sides = min(interface.default_latent), interface.latent_sides
    wide = (sides.nearest(round(own * 6 / 8)), sides.nearest(round(own * 9 / 8)))
    names = report["generation"].keys()
    assert {f"{own}x{own} at guidance 1", f"{size_name(wide)} at guidance 2"} < names
    assert not {"reconstruction_mse", "scale_consistency"} & report.keys()
    assert [*report["eps_mse_over_t"]] == [*report["early_stop"]] == [f"{own}x{own}"]
    likeness = report["same_picture"]["coherent"][f"{own}x{own}"]
    assert likeness["correlation"] == pytest.approx(1)


def test_graphs_draw_over_their_own_schedule_as_the_models_do(pixel_bundle: Path) -> None:
    models = checkpoint.load(pixel_bundle / "tiny.safetensors").models
    opened, sampling = open_bundle(pixel_bundle), Sampling(steps=3, guidance_interval=(0.2, 1))
    by_graphs = GraphDrawing(opened, sampling)
    size = (2 * opened.interface.default_latent[0], opened.interface.default_latent[1])
    labels = by_graphs.labels(2)
    wanted = by_graphs(labels, size).images
    found = TorchDrawing(models, sampling, schedule=opened.manifest.schedule)(labels, size).images
    assert found.shape == (2, 1, *size)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@needs_mnist
def test_one_part_by_the_models_and_by_their_graphs(
    tiny_bundle: Path, classifier_file: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--checkpoint", tiny_bundle / "tiny.safetensors", "--data", MNIST)
    small = ("--classifier", classifier_file, "--digits", 20, "--steps", 4, "--only")
    sizes = ("generation", "--sizes", "4x4,9x6")
    found = []
    for bundle in ((), ("--bundle", tiny_bundle)):
        out = tmp_path / f"out{len(bundle)}"
        done = command("reference.evaluate", *args, *small, *sizes, "--out", out, *bundle)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "generation.json").read_text())["generation"])
    names = {f"{size} at guidance {scale}" for size in ("4x4", "9x6") for scale in (1, 2)}
    assert found[0].keys() == found[1].keys() == names
    for name, row in found[0].items():
        assert row["frechet"] == pytest.approx(found[1][name]["frechet"], rel=1e-3)
    done = command(
        "reference.evaluate", *args, *small, "likeness", "--bundle", tiny_bundle, "--quick"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "build" / "evaluation" / "likeness.json").read_text())
    stops = report["continued"]["8x8 then 16x16"]
    assert stops["0"]["psnr"] > 80 > stops["1"]["psnr"]
    assert report.keys() == {"settings", "same_picture", "continued"}
