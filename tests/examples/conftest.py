"""The one file that the examples draw by."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def picture_file(mnist_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as one file, its weights in half."""
    out = tmp_path_factory.mktemp("examples") / "picture.onnx"
    line = [sys.executable, "-m", "export.single_file", str(mnist_bundle), str(out), "--half"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out
