"""Models side by side: at which sizes, by how many digits, and a report that goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.shipped import CASES, QUICK, TRAINED, TWICE, Model
from runtime.bundle.manifest import read_manifest
from runtime.engines import EngineOptions
from tests.conftest import Command
from tests.reference.test_data import MNIST
from tests.reference.test_evaluate import needs_mnist

OF_SID2 = pytest.mark.parametrize("pixel_bundle", ["sid2"], indirect=True)


@OF_SID2
def test_sizes_are_multiples_of_the_trained_one_and_legal(
    tiny_bundle: Path, pixel_bundle: Path
) -> None:
    latents, pixels = (read_manifest(path).interface for path in (tiny_bundle, pixel_bundle))
    assert TRAINED.asked(latents) == (16, 16) and TWICE.sizes(latents) == ((8, 8), (32, 32))
    assert CASES["2:3"].sizes(latents) == ((3, 5), (13, 20))  # cells are whole, pixels as asked
    assert TRAINED.asked(pixels) == (16, 16) and TWICE.sizes(pixels) == ((32, 32), (32, 32))
    wide = CASES["16:9"]
    assert wide.asked(pixels) == (21, 12) and wide.sizes(pixels) == ((24, 16), (24, 16))
    assert [CASES[name].area for name in ("2:3", "16:9")] == pytest.approx([1, 1])
    assert {*QUICK} < {*CASES}


def test_larger_sizes_are_judged_by_fewer_digits() -> None:
    assert [CASES[name].digits(200) for name in ("½", "1", "16:9", "2", "4")] == [200] * 3 + [
        50,
        20,
    ]
    assert CASES["8"].digits(10) == 10


def test_products_grow_with_the_pixels(tiny_bundle: Path) -> None:
    options = EngineOptions(threads=1)
    model = Model("mnist", tiny_bundle / "tiny.safetensors", tiny_bundle, options)
    one, two = model.flops(TRAINED, 3), model.flops(TWICE, 3)
    assert 3.5 < two / one < 4.5 and one < model.flops(TRAINED, 6) < 2 * one


@needs_mnist
@OF_SID2
def test_a_report_of_two_families_goes_on_where_it_stopped(
    tiny_bundle: Path, pixel_bundle: Path, classifier_file: Path, tmp_path: Path, command: Command
) -> None:
    for name, bundle in (("mnist", tiny_bundle), ("sid2", pixel_bundle)):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "bundles").mkdir(exist_ok=True)
        shutil.copy(bundle / "tiny.safetensors", tmp_path / "weights" / f"{name}.safetensors")
        (tmp_path / "bundles" / name).symlink_to(bundle)
    args = ["--data", MNIST, "--weights", "weights", "--bundles", "bundles", "--out", "out"]
    args += ["--classifier", classifier_file, "--digits", "10", "--steps", "2", "--threads", "1"]
    args += ["--sizes", "1,2,16:9"]
    done = command("benchmarks.families", *args)
    assert done.returncode == 0, done.stderr
    assert "left out, since they are not there: weights/siid.safetensors" in done.stdout
    path = tmp_path / "out" / "families.json"
    report = json.loads(path.read_text())
    assert report["real"]["1"]["read_right"] > 0.7
    own = report["sid2"]
    assert own["about"]["family"] == "sid2" and own["judged 2"]["image"] == [32, 32]
    assert own["judged 16:9"]["asked"] == [21, 12] and own["judged 16:9"]["digits"] == 10
    assert own["cost 2"]["flops"] > 3 * own["cost 1"]["flops"]
    assert own["cost 2"]["seconds"] > 0
    assert own["cost 1"]["peak_bytes"] < 250e6  # numpy and ONNX Runtime, no PyTorch
    assert report["mnist"]["likeness"]["correlation"] < 0.99
    table = (tmp_path / "out" / "families.md").read_text()
    assert "| 16:9 | SiD2 | 24x16 for 21x12 | 10 |" in table and "| 2 | R2 | 32x32 |" in table
    assert Image.open(tmp_path / "out" / "families.png").size[0] > 300
    kept = tmp_path / "out" / "digits" / "sid2-16x9.npy"
    assert np.load(kept).shape == (10, 24, 16, 1)

    kept.unlink()
    own["judged 1"]["frechet"], own["judged 16:9"]["frechet"] = -1, -1
    path.write_text(json.dumps(report))
    done = command("benchmarks.families", *args)
    again = json.loads(path.read_text())["sid2"]
    assert again["judged 1"]["frechet"] == -1 and again["judged 16:9"]["frechet"] > 0
    assert kept.exists() and "32x32 at guidance" not in done.stderr


def test_what_is_missing_is_said(tmp_path: Path, command: Command) -> None:
    done = command("benchmarks.families", "--data", MNIST, "--weights", tmp_path)
    assert done.returncode == 2 and "holds none of" in done.stderr
