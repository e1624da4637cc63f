"""The command lines as users meet them: output, exit codes, one-line errors."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import cli
from runtime.images.picture import ImageFile
from runtime.images.pixels import contact_sheet, read_metadata, save_png, to_uint8
from tests.conftest import Command


def generate(command: Command, bundle: Path, *args: object, **options: object) -> tuple[int, str]:
    done = command("runtime.generate", "--engine", bundle, "--steps", 2, *args, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().split("\n")[-1]


def test_a_sheet_and_its_repetition(tiny_bundle: Path, tmp_path: Path, command: Command) -> None:
    args = ("--label", "1,3-4", "--count", 2, "--latent", "3x2", "--image", "9x6", "--eta", 1)
    assert generate(command, tiny_bundle, *args, "--out", "a.png")[0] == 0
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (2 * 6 + 2, 3 * 9 + 2 * 2)  # two columns, a row per label
    assert generate(command, tiny_bundle, "--from-png", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_metadata(tmp_path / "a.png")["provider"] == "cpu"


def test_another_bundle_of_the_checkpoint_is_said(
    own_bundle: Path, tmp_path: Path, command: Command
) -> None:
    """Bytes are promised of one bundle alone: another may lack the forms for processors."""
    args = ("--label", "1", "--latent", "3x2", "--out", "a.png")
    assert generate(command, own_bundle, *args)[0] == 0
    path = own_bundle / "manifest.json"
    path.write_text(path.read_text().replace(",", ", ", 1))
    done = command(
        *("runtime.generate", "--engine", own_bundle, "--from-png", "a.png", "--out", "b.png")
    )
    assert (
        done.returncode == 0 and "a.png: drawn by another bundle of this checkpoint" in done.stderr
    )


def test_a_size_may_have_a_capital_x() -> None:
    assert cli.size("9X16") == cli.size("9x16") == (9, 16)


def test_single_files_at_any_batch(tiny_bundle: Path, tmp_path: Path, command: Command) -> None:
    args = ("--label", "0-4", "--seed", 7)
    assert generate(command, tiny_bundle, *args, "--out", "a-{index}.png", "--batch", 3)[0] == 0
    assert generate(command, tiny_bundle, *args, "--out", "b-{index}.png", "--batch", 1)[0] == 0
    for index in range(5):
        one, other = ((tmp_path / f"{name}-{index}.png").read_bytes() for name in "ab")
        assert one == other
    repeat = ("--from-png", "b-3.png", "--out", "c.png")
    assert generate(command, tiny_bundle, *repeat)[0] == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "b-3.png").read_bytes()


def test_a_continued_picture_is_repeated_from_its_metadata(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--label", "1,3", "--latent", "3x2", "--continue-at", "9x6", "--noise", "independent")
    assert generate(command, tiny_bundle, *args, "--eta", 1, "--out", "a.png")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (2 * 24 + 2, 36)
    made = read_metadata(tmp_path / "a.png")["request"]
    assert (made["noise"], made["continue_at"], made["continue_from"]) == ("independent", [9, 6], 1)
    assert generate(command, tiny_bundle, "--from-png", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_preview_is_written_first_and_is_a_request_of_its_own(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--label", "1", "--count", 2, "--latent", "16x24", "--preview")
    assert generate(command, tiny_bundle, *args, "--out", "a-{index}.png")[0] == 0
    names = ["a-0-preview.png", "a-0.png", "a-1-preview.png", "a-1.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "a-0-preview.png").size == (12 * 4, 8 * 4)
    first, last = (tmp_path / name for name in ("a-1-preview.png", "a-0.png"))
    assert first.stat().st_mtime_ns < last.stat().st_mtime_ns
    repeat = ("--from-png", "a-1-preview.png", "--out", "b.png")
    assert generate(command, tiny_bundle, *repeat)[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-1-preview.png").read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--noise", "pink"), "invalid choice"),
        (("--noise", "independent", "--latent", "16x16", "--preview"), "--noise coherent"),
        (("--continue-from", "1"), "continue_from is given alone"),
        (("--latent", "4x4", "--continue-at", "8x9"), "as 8x8"),
        (("--latent", "0x8"), "no size"),
        (("--latent", "8"), "no size"),
        (("--latent=-1x4",), "no size"),
        (("--latent", "1e9x4"), "no size"),
        (("--image", "8x99999"), "the nearest legal size is 8x65536. Pass --image 8x65536"),
        (("--label", "10"), "label 10"),
        (("--label", "5-2"), "no list"),
        (("--guidance", "nan"), "expected a number from -100 to 100"),
        (("--steps", "0"), "expected an integer"),
        (("--seed=-1",), "expected an integer from 0 to 9223372036854775807"),
        (("--out", "picture.gif"), "ends in one of .png .jpg .jpeg .webp"),
        (("--provider", "abacus"), "invalid choice"),
        (("--precision", "fp16"), "no graphs in fp16; found fp32. Make them with"),
    ],
)
def test_usage_errors(
    tiny_bundle: Path, tmp_path: Path, command: Command, args: tuple[str, ...], words: str
) -> None:
    code, line = generate(command, tiny_bundle, *args)
    assert code == 2 and words in line
    assert not list(tmp_path.iterdir())


def test_bad_artefacts_have_exit_code_3(own_bundle: Path, command: Command, tmp_path: Path) -> None:
    assert generate(command, tmp_path / "nothing")[0] == 3
    (own_bundle / "r2ir_decode.cpu.onnx").write_bytes(b"damaged")
    code, line = generate(command, own_bundle, "--out", "old.png")
    assert code == 3 and "r2ir_decode.cpu.onnx" in line and not (tmp_path / "old.png").exists()
    for metadata in ({}, {"request": 7}, {"request": {"label": 3}}):
        save_png(tmp_path / "plain.png", np.zeros((2, 2, 1), np.uint8), metadata)
        code, line = generate(command, own_bundle, "--from-png", "plain.png")
        assert code == 3 and "no whole request" in line


def test_environment_errors_have_exit_code_4(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    # A module of this name that cannot be imported stands for a missing library.
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not installed')")
    code, line = generate(command, tiny_bundle)
    assert code == 4 and "pip install" in line
    assert command("runtime.generate", "--help").returncode == 0


def test_outputs_are_checked_before_compute(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    for out, words in (
        ("no/such/a.png", "mkdir -p"),
        ("folder.png", "is a folder"),
        ("/proc/a.png", "cannot be written"),  # read-only for every user
    ):
        code, line = generate(command, tiny_bundle, "--out", out)
        assert code == 5 and words in line


def test_help_imports_neither_engine_nor_images(command: Command) -> None:
    probe = (
        "import sys; sys.argv = ['x', '--help']\n"
        "import runpy\n"
        "try: runpy.run_module('runtime.generate', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'onnxruntime', 'torch', 'onnx', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = command("runtime.cli")  # a module without a command line: nothing happens
    assert done.returncode == 0
    import subprocess

    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_resample_writes_the_size_asked_for(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    image = (np.arange(12 * 20) % 256).astype(np.uint8).reshape(12, 20, 1)
    save_png(tmp_path / "photo.png", image, {})
    args = ("photo.png", "--size", "31x17", "--engine", tiny_bundle)
    assert command("runtime.resample", *args).returncode == 0
    assert Image.open(tmp_path / "photo-31x17.png").size == (17, 31)
    (tmp_path / "text.png").write_text("no image")
    broken = command("runtime.resample", "text.png", "--size", "4x4", "--engine", tiny_bundle)
    assert broken.returncode == 3 and "cannot be read as an image" in broken.stderr


def test_pixels_survive_a_png(tmp_path: Path) -> None:
    pixels = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    save_png(tmp_path / "a.png", to_uint8(pixels)[0], {"a": [1, None]})
    assert read_metadata(tmp_path / "a.png") == {"a": [1, None]}
    with ImageFile(tmp_path / "a.png", 1) as image:
        np.testing.assert_allclose(image(0, 0, 16, 16), pixels, atol=1e-6)
    with ImageFile(tmp_path / "a.png", 3) as image:
        assert image(0, 0, 16, 16).shape == (1, 3, 16, 16)
    assert to_uint8(np.array([[[-9.0, 9.0]]], np.float32)).ravel().tolist() == [0, 255]


def test_a_sheet_holds_every_image() -> None:
    images = np.arange(5, dtype=np.uint8).repeat(6).reshape(5, 2, 3, 1)
    sheet = contact_sheet(images, 3)
    assert sheet.shape == (2 * 2 + 2, 3 * 3 + 2 * 2, 1)
    assert set(sheet.ravel()) == {0, 1, 2, 3, 4, 64}
