"""Writers that are killed, or whose disk is full: what is there is old or new, and whole.

Each command is killed $CRASH_KILLS times at moments drawn from a seed, each time in the folder that
the last kill has left, then runs to its end.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference.train import CONFIGS
from runtime.bundle.files import TEMPORARY_PREFIX
from runtime.errors import ResourceError
from tests.crash.writers import WRITERS, Writer, start

KILLS = int(os.environ.get("CRASH_KILLS", "5"))
PATIENCE = 600
FULL_AT = 20_000  # bytes, which a disk has left for a file
EACH = pytest.mark.parametrize("name", WRITERS)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a fork server and limits as on Linux"
)


@pytest.fixture
def writer(name: str) -> Writer:
    own = WRITERS[name]
    if not find_spec(own.needs):
        pytest.skip(f"no {own.needs}")
    return own


@pytest.fixture(scope="module")
def prepared(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read, and a file that one of them replaces."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("prepared") / "a"))
    (folder / "picture.onnx").write_bytes(b"old")
    draw = np.random.default_rng(0)
    for name in ("blue", "red"):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(6):
            pixels = draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{index}.png")
    text = (CONFIGS / "tiny.toml").read_text().replace('dataset = "mnist"', 'dataset = "folder"')
    text = text.replace("color_channels = 1", "color_channels = 3")
    (folder / "colour.toml").write_text(text.replace("steps = 12", "steps = 30"))
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "own"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Writer, Path], float]:
    """Run a command to its end; the seconds that it took."""

    def whole(writer: Writer, folder: Path) -> float:
        for path in folder.rglob(TEMPORARY_PREFIX + "*"):
            if path.is_file():  # in the folder of no one writer, where a young one may be alive
                os.utime(path, (0, 0))
        began = time.monotonic()
        process = start(writer, folder, tmp_path / "said")
        process.join(PATIENCE)
        assert process.exitcode == 0, (tmp_path / "said").read_text()[-2000:]
        writer.whole(folder)
        writer.complete(folder)
        assert not list(folder.rglob(TEMPORARY_PREFIX + "*"))
        return time.monotonic() - began

    return whole


@EACH
def test_a_killed_writer_leaves_old_or_new_and_a_rerun_succeeds(
    writer: Writer,
    name: str,
    folder: Path,
    prepared: Path,
    tmp_path: Path,
    run: Callable[..., float],
) -> None:
    first = Path(shutil.copytree(prepared, tmp_path / "first"))
    seconds = run(writer, first)
    draw, kills, tries = random.Random(name), 0, 0
    while kills < KILLS:
        tries += 1
        assert tries < 4 * KILLS, "it ends before it is killed"
        process, began = start(writer, folder, tmp_path / "said"), time.monotonic()
        process.join(draw.uniform(0, seconds))
        if process.exitcode is not None:  # it takes less time than thought
            seconds = min(seconds, time.monotonic() - began)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        writer.whole(folder)
    run(writer, folder)
    if name == "training":  # bit by bit what it is without a kill
        wanted, found = (own / "run" / "checkpoint.safetensors" for own in (first, folder))
        assert tensors(found) == tensors(wanted)
    print(f"{name}: {kills} kills within {seconds:.1f} s, {tries} runs")


@EACH
def test_a_full_disk_ends_with_5_and_what_was_there(
    writer: Writer, folder: Path, tmp_path: Path
) -> None:
    before, said = listing(folder), tmp_path / "said"
    process = start(writer, folder, said, FULL_AT)
    process.join(PATIENCE)
    text = said.read_text()
    assert process.exitcode == ResourceError.exit_code, text[-2000:]
    assert "error: " in text and "Traceback" not in text
    after = listing(folder)
    assert {path: after.get(path) for path in before} == before
    writer.whole(folder)
    assert not list(folder.rglob(TEMPORARY_PREFIX + "*"))


def listing(folder: Path) -> dict[Path, bytes]:
    """Every file but locks, and the logs that go before a state of training."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in found if path.suffix not in (".csv", "")}


def tensors(path: Path) -> bytes:
    """A safetensors file without its header, which holds how long the training took."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
