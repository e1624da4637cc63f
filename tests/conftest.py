"""Fixtures that need neither torch nor the network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A machine that is busy with other things is slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "build" / "tiny"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """The bundle of the tiny model, which `make test` exports first."""
    if not (TINY / "manifest.json").exists():
        pytest.skip("no build/tiny: run `make test`, or python -m tests.tiny build/tiny")
    return TINY


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `python -m MODULE ARGS` in the test's folder."""

    def run(module: str, *args: object, **options: object) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", module, *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            line,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,  # for a machine that is busy with other things
            **options,  # type: ignore[call-overload]
        )

    return run
