"""Labels are turned: edits of the shipped model, read by a classifier of digits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, Command
from tests.reference.test_data import MNIST

SHIPPED = ROOT / "build" / "mnist"


@pytest.mark.skipif(not MNIST.exists(), reason=f"no MNIST at {MNIST}; set MNIST to its folder")
@pytest.mark.skipif(not SHIPPED.exists(), reason="no build/mnist: run `make export`")
def test_a_three_is_edited_into_an_eight(
    classifier_file: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--data", MNIST, "--classifier", classifier_file, "--pictures", 40, "--threads", 1)
    done = command("benchmarks.edit", SHIPPED, *args, "--strengths", 0.4, 0.9, "--out", "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "edit.json").read_text())
    faint, strong = found["rows"]
    assert found["picture_read_old"] > 0.9 and faint["read_3"] > 0.6
    assert strong["read_8"] >= 0.9 and strong["read_3"] < 0.1
    assert faint["rms_from_picture"] < strong["rms_from_picture"]
    assert Image.open(tmp_path / "out" / "edit.png").size == (10 * 34 - 2, 3 * 34 - 2)
    assert "read as 8, %" in done.stdout
