"""Evaluation: the report holds every measure, and the classifier reads what is there."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from reference.classifier import middle
from reference.evaluate import GENERATION_SIZES, NOISE_SIZES
from runtime.bundle.interface import size_name
from runtime.sampling.noise import KINDS
from tests.conftest import Command
from tests.reference.test_data import MNIST


def test_the_middle_is_the_shorter_side() -> None:
    wide = torch.arange(20.0).reshape(1, 1, 2, 10)
    assert middle(wide).tolist() == [[[[4, 5], [14, 15]]]]
    assert torch.equal(middle(wide.transpose(2, 3)), middle(wide).transpose(2, 3))


@pytest.mark.skipif(not MNIST.exists(), reason=f"no MNIST at {MNIST}; set MNIST to its folder")
def test_a_report_and_its_pictures(tiny_bundle: Path, tmp_path: Path, command: Command) -> None:
    """Random weights draw nothing that can be read, while the classifier reads real digits."""
    args = ("--checkpoint", tiny_bundle / "tiny.safetensors", "--data", MNIST, "--out", "out")
    small = ("--images", 20, "--digits", 40, "--steps", 1)
    done = command("reference.evaluate", *args, *small)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["classifier_accuracy"]["test_images"] > 0.98
    assert report["digits_read_right"].keys() == {size_name(size) for size in GENERATION_SIZES}
    assert all(share < 0.5 for share in report["digits_read_right"].values())
    assert all(error > 0.05 for error in report["reconstruction_mse"].values())
    same, names = report["same_picture"], [size_name(size) for size in NOISE_SIZES]
    assert same.keys() == set(KINDS) and all(list(found) == names for found in same.values())
    assert all(found["8x8"]["psnr"] > 100 > found["16x16"]["psnr"] for found in same.values())
    assert same["coherent"]["16x16"]["psnr"] != same["independent"]["16x16"]["psnr"]
    assert "likeness" in done.stdout
    assert len(report["eps_mse_over_t"]["8x8"]["label"]) == 20
    for name in ("digits-16x9", "reconstructions", "latent-channels", "eps-over-t"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 10
    assert "digits read right" in done.stdout
    del report["digits_read_right"]["8x8"], report["reconstruction_mse"]["16x9"]
    report["reconstruction_mse"]["8x8"] = -1  # kept: what the report holds is not measured again
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    again = command("reference.evaluate", *args, *small, "--bundle", tiny_bundle)
    assert again.returncode == 0, again.stderr
    assert "by graphs in fp32" in again.stdout and "-1.0000" not in again.stdout
    drawn = json.loads((tmp_path / "out" / "report.json").read_text())
    stops = drawn["continued"]["8x8 then 16x16"]
    assert stops["0"]["psnr"] > 100 > stops["1"]["psnr"]
    for kind, sizes in drawn["same_picture"].items():
        for size, found in sizes.items():
            assert found["psnr"] == pytest.approx(same[kind][size]["psnr"], abs=0.05)
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    resumed = command("reference.evaluate", *args, *small)
    assert "-1.0000" in resumed.stdout
    assert len(re.findall(r"^  \d+x\d+: ", resumed.stdout, re.M)) == 1  # only what was missing
    both = (d.stdout.split("images:")[1].split("likeness")[0] for d in (again, resumed))
    tables = [sorted(line for line in d.splitlines()[1:] if line[:2] == "  ") for d in both]
    assert tables[0] == tables[1]  # graphs and PyTorch draw the same
