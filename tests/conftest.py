"""Fixtures that need neither torch nor the network."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from runtime.bundle.files import TEMPORARY_PREFIX
from runtime.bundle.manifest import Array
from runtime.engines import kernels
from runtime.pipeline.bundle import Bundle

# A machine that is busy with other things is slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Commands under test are interrupted. Where pytest runs in the background SIGINT is ignored, which
# they would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
# The graphs of R2 that lower precisions are made of.
HEAVY = (
    *("r2id", "r2ir_image_summary", "r2ir_encode"),
    *("r2ir_latent_summary", "r2ir_decode", "r2ir_render"),
)
PIXELS = ("siid", "s2id", "hdit", "sid2")  # families that diffuse pixels
TINY, MNIST = ROOT / "build" / "tiny", ROOT / "build" / "mnist"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# So that it looks for no host but those of a test's pages.
ALONE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
Command = Callable[..., "subprocess.CompletedProcess[str]"]
# Random weights have outliers that trained ones have not, hence the budget.
CALIBRATION = ("--sizes", "4x4,3x5", "--steps", "3", "--every", "1", "--budget", "0.12")


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """The bundle of the tiny model, which `make test` exports first."""
    if not (TINY / "manifest.json").exists():
        pytest.skip("no build/tiny: run `make test`, or python -m tests.tiny build/tiny")
    return TINY


@pytest.fixture(scope="session")
def mnist_bundle() -> Path:
    """The bundle of the shipped model, which `make test` exports first."""
    if not (MNIST / "manifest.json").exists():
        pytest.skip("no build/mnist: run `make test`, or python -m export")
    return MNIST


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def half_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle in both halves, checked at every size, made where a killed command was."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("half") / "tiny"))
    (folder / f"{TEMPORARY_PREFIX}killed").mkdir()
    line = [sys.executable, "-m", "calibration.half", str(folder), "--precision", "bf16,fp16"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fp16: 6 graphs" in done.stdout and "bf16: 6 graphs" in done.stdout
    return folder


@pytest.fixture(scope="session")
def quantized_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle in every 8-bit form, made where a killed command had left its scratch."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("quantized") / "tiny"))
    (folder / f"{TEMPORARY_PREFIX}killed").mkdir()
    line = [sys.executable, "-m", "calibration", str(folder), *CALIBRATION]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "t: 2 from 0.333 to 0.667, each 8 times" in done.stdout
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny bundle of a family that diffuses pixels, exported once."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def made(name: str) -> Path:
        line = [sys.executable, "-m", "tests.tiny", str(folder / name), f"tiny-{name}"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        return folder / name

    return made


@pytest.fixture(scope="session", params=PIXELS)
def pixel_bundle(request: pytest.FixtureRequest, exported: Callable[[str], Path]) -> Path:
    """A tiny bundle of each family that diffuses pixels."""
    return exported(request.param)


@pytest.fixture(scope="session", params=("r2", *PIXELS))
def family_bundle(request: pytest.FixtureRequest, exported: Callable[[str], Path]) -> Path:
    """A tiny bundle of each family."""
    if request.param == "r2":
        return Path(request.getfixturevalue("tiny_bundle"))
    return exported(request.param)


@pytest.fixture
def own_quantized(quantized_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(quantized_bundle, tmp_path / "quantized"))


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


@pytest.fixture(scope="session", autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """Leave the user's cache folder alone: what a test opens is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "off")
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright: a `playwright.sync_api.Browser`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: run `make test`")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(CHROMIUM)}: run `make browser`, as root on Debian")
    with playwright.sync_playwright() as own:
        opened = own.chromium.launch(executable_path=found, args=ALONE)
        yield opened
        opened.close()


def poison_film(pipeline: Bundle, step: int) -> None:
    """Make the film of a pipeline's steps NaN from `step` on, as a graph that overflows would."""
    film = pipeline.engines.open("r2id_film")

    class Poisoned:
        provider = film.provider

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            found = film.run(inputs)["film"]
            found[step:] = np.nan
            return {"film": found}

    pipeline.engines.opened["r2id_film", "fp32"] = Poisoned()  # type: ignore[assignment]
