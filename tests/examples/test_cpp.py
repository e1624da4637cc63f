"""The program in C++: built with CMake against OpenVINO's wheel, it draws the runtime's picture."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import open_bundle
from runtime.images.pixels import to_uint8
from runtime.sampling.request import Request
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    openvino = pytest.importorskip("openvino")
    missing = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: the program cannot be compiled here")
    build = tmp_path_factory.mktemp("cpp")
    own = Path(openvino.__file__).parent / "cmake"
    source = str(ROOT / "examples" / "cpp")
    configure = ["cmake", "-S", source, "-B", str(build), f"-DOpenVINO_DIR={own}"]
    for line in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(line, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "picture"


def test_it_draws_what_the_runtime_does(
    program: Path, picture_file: Path, mnist_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(mnist_bundle)
    request = Request([7], (6, 9), (52, 75), seed=4)
    bundle.diffuser.noise(request, request.latent).draw().tofile(tmp_path / "noise")
    line = [str(program), str(picture_file), "7", "6x9", "52x75", "seven.pgm"]
    for more in (["noise"], []):
        done = subprocess.run([*line, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = np.asarray(Image.open(tmp_path / "seven.pgm")).astype(int)
        made = bundle.decode(bundle.diffuse(request), (52, 75))
        difference = np.abs(found - to_uint8(made)[0, ..., 0]).max()
        assert difference <= 1 if more else difference > 1  # noise of its own, where none is given


def test_errors_are_a_line(program: Path, picture_file: Path, tmp_path: Path) -> None:
    for words, said in (
        ([picture_file, "70", "6x9", "52x75", "out.pgm"], "expected a label below 10"),
        ([picture_file, "7", "6", "52x75", "out.pgm"], "6: expected HEIGHTxWIDTH"),
        ([picture_file, "7", "6x9", "52x75", "no/out.pgm"], "no/out.pgm: cannot be written"),
        ([picture_file], "usage: picture FILE.onnx"),
    ):
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr
    assert not (tmp_path / "out.pgm").exists()
