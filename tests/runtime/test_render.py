"""Large images through the command lines: windows, states, memory, faults."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.images.pixels import read_metadata, save_png
from tests.conftest import ROOT, Command

SMALL = ("--steps", 2, "--latent", "3x4", "--label", 3)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_crop_is_drawn_alone_and_repeated(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    engine = ("--engine", tiny_bundle)
    large = (*SMALL, *engine, "--image", "210x280")
    assert command("runtime.generate", *large, "--out", "whole.png").returncode == 0
    crop = ("--crop", "20,30,100,70", "--state", "state.npz")
    assert command("runtime.generate", *large, *crop, "--out", "crop.png").returncode == 0
    window = pixels(tmp_path / "whole.png")[20:120, 30:100]
    assert np.abs(pixels(tmp_path / "crop.png") - window).max() <= 1  # a rounding at the border
    again = ("--from-png", "crop.png", "--out", "again.png")
    assert command("runtime.generate", *engine, *again).returncode == 0
    render = ("state.npz", "--size", "210x280", "--crop", "20,30,100,70", "--out", "state.png")
    assert command("runtime.render", *engine, *render).returncode == 0
    for name in ("again", "state"):
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / "crop.png").read_bytes()


def test_a_state_of_several_images(tiny_bundle: Path, command: Command, tmp_path: Path) -> None:
    engine = ("--engine", tiny_bundle)
    made = (*SMALL[:4], "--label", "3,5", "--count", 2, "--image", "9x12", "--first-index", 4)
    assert command("runtime.generate", *engine, *made, "--state", "s.npz").returncode == 0
    args = ("s.npz", "--size", "9x12", "--index", 2)
    assert command("runtime.render", *engine, *args, "--out", "one.png").returncode == 0
    request = read_metadata(tmp_path / "one.png")["request"]
    assert (request["label"], request["count"], request["first_index"]) == ([5], 1, 6)
    assert command("runtime.generate", *engine, "--from-png", "one.png").returncode == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    exact = ("s.npz", "--size", "150x150", "--exact", *engine)
    assert command("runtime.render", *exact).returncode == 0
    assert read_metadata(tmp_path / "s-150x150.png")["request"]["exact"] is True


@pytest.mark.parametrize(
    ("module", "args", "code", "words"),
    [
        ("generate", ("--image", "8x8", "--crop", "0,0,9,8"), 2, "not inside the image of 8x8"),
        ("generate", ("--crop", "1,2,3"), 2, "no crop"),
        ("generate", ("--memory", "500"), 2, "as in 500MB"),
        ("generate", ("--memory", "20MB"), 5, "Pass --memory"),
        ("generate", ("--state", "a.txt"), 2, "ends in .npz"),
        ("render", ("none.npz", "--size", "8x8"), 3, "no such file"),
        ("render", ("bad.npz", "--size", "8x8"), 3, "no decode state"),
        ("render", ("bad.npz", "--size", "8x8", "--out", "a.gif"), 2, "ends in one of .png"),
        ("render", ("bad.npz", "--size", "8x8", "--crop", "8,0,1,1"), 2, "not inside"),
        ("resample", ("bad.npz", "--size", "8x8"), 3, "cannot be read as an image"),
    ],
)
def test_errors(
    tiny_bundle: Path,
    command: Command,
    tmp_path: Path,
    module: str,
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    done = command(f"runtime.{module}", "--engine", tiny_bundle, *args)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_a_full_disk_keeps_the_old_file(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    """The system refuses to let a file grow, as on a full disk, in the middle of the drawing."""
    save_png(tmp_path / "out.png", np.zeros((2, 2, 1), np.uint8), {})
    before = (tmp_path / "out.png").read_bytes()
    done = command(
        "runtime.generate",
        *("--engine", tiny_bundle, *SMALL, "--image", "300x300"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)),
    )
    assert done.returncode == 5 and "what was there before is intact" in done.stderr
    assert (tmp_path / "out.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_an_interrupted_drawing_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "runtime.generate", "--engine", str(tiny_bundle)]
    line += [*map(str, SMALL), "--image", "8192x8192", "--out", str(tmp_path / "out.png")]
    drawing = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".partial-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    drawing.send_signal(signal.SIGINT)
    _, errors = drawing.communicate(timeout=60)
    assert drawing.returncode == 130 and "interrupted" in errors
    assert not list(tmp_path.iterdir())


def peak(code: str) -> int:
    """Peak bytes of a process that runs `code`."""
    probe = (
        "import resource\n"
        "from pathlib import Path\n"
        "from runtime import open_bundle\n"
        f"{code.strip()}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_memory_does_not_grow_with_the_image(tiny_bundle: Path, tmp_path: Path) -> None:
    """1024x3072 pixels, drawn and encoded again: their float32 values alone are 12 MB."""
    code = """
import numpy as np
from runtime.images.picture import ImageFile
from runtime.images.pixels import save_rows, to_uint8
p = open_bundle({bundle!r})
state = p.state(np.ones((1, 4, 4, 4), np.float32))
size = ({height}, 1024)
bands = map(to_uint8, p.resampler.draw(state, size))
save_rows(Path({out!r}), bands, (*size, 1), {{}})
with ImageFile(Path({out!r}), 1) as image:
    p.resampler.encode_windows(image, image.size, (4, 4))
"""
    small, large = (
        peak(code.format(bundle=str(tiny_bundle), out=str(tmp_path / "a.png"), height=h))
        for h in (200, 3072)
    )
    assert large - small < 8_000_000
