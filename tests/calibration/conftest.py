"""The tiny bundle with its 8-bit forms, made once by the command."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import TEMPORARY_PREFIX
from tests.conftest import ROOT

# Random weights have outliers that trained ones have not, hence the budget.
SETTINGS = ("--sizes", "4x4,3x5", "--steps", "3", "--guidance", "0,2", "--budget", "0.12")


@pytest.fixture(scope="session")
def quantized_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle in every 8-bit form; beside it lay what a killed command had left."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("quantized") / "tiny"))
    (folder / f"{TEMPORARY_PREFIX}killed").mkdir()
    line = [sys.executable, "-m", "calibration", str(folder), *SETTINGS]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "t: 4 from 0.000 to 1.000, each 4 times" in done.stdout
    return folder


@pytest.fixture
def own_quantized(quantized_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(quantized_bundle, tmp_path / "quantized"))
