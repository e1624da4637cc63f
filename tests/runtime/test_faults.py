"""Faults a user may meet: files that reach outside, no memory, signals, leaks."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.interface import Range
from runtime.bundle.manifest import GraphSpec, TensorSpec, read_manifest
from runtime.engines import EngineOptions
from runtime.engines.onnx_file import check_self_contained
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import ArtefactError
from runtime.pipeline.bundle import Bundle
from tests.conftest import ROOT, Command

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as on Linux")


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of Protocol Buffers: small integers, texts and messages."""
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def tensor(location: str | None) -> bytes:
    """Four float32 named w, in the file itself or at `location`."""
    start = field(1, 4) + field(2, 1) + field(8, "w")
    if location is None:
        return start + field(9, np.arange(4, dtype=np.float32).tobytes())
    entries = {"location": location, "offset": "0", "length": "16"}
    outside = [field(13, field(1, key) + field(2, value)) for key, value in entries.items()]
    return start + b"".join(outside) + field(14, 1)


def model(graph: bytes) -> bytes:
    """y = x + w over four float32, with `graph` the fields that hold w."""
    of_four = field(2, field(1, field(1, 1) + field(2, field(1, field(1, 4)))))
    add = field(1, field(1, "x") + field(1, "w") + field(2, "y") + field(4, "Add"))
    ends = field(11, field(1, "x") + of_four) + field(12, field(1, "y") + of_four)
    return field(1, 10) + field(7, add + field(2, "g") + ends + graph) + field(8, field(2, 20))


def spec_of(data: bytes) -> GraphSpec:
    inputs = (TensorSpec("x", "float32", (4,)),)
    outputs = (TensorSpec("y", "float32", (4,)),)
    return GraphSpec("sum.onnx", sha256(data), "fp32", "size", inputs, outputs, {})


def test_a_graph_that_holds_its_weights_is_opened() -> None:
    data = model(field(5, tensor(None)))
    engine = OnnxRuntimeEngine(spec_of(data), data, EngineOptions(threads=1))
    found = engine.run({"x": np.ones(4, np.float32)})["y"]
    np.testing.assert_array_equal(found, np.arange(1, 5, dtype=np.float32))


@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "link", "inside", ""])
def test_a_graph_with_weights_elsewhere_is_refused(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    for place in ("secret", "work/inside"):
        (tmp_path / place).write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "work" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.chdir(tmp_path / "work")
    data = model(field(5, tensor(location.format(folder=tmp_path))))
    with pytest.raises(ArtefactError, match=r"sum\.onnx: keeps a tensor outside the file"):
        OnnxRuntimeEngine(spec_of(data), data, EngineOptions(threads=1))


@pytest.mark.parametrize(
    "place",
    [
        lambda t: field(5, t),
        lambda t: field(15, field(1, t)),
        lambda t: field(15, field(2, t)),
        lambda t: field(1, field(5, field(5, t))),
        lambda t: field(1, field(5, field(10, t))),
        lambda t: field(1, field(5, field(22, field(1, t)))),
        lambda t: field(1, field(5, field(6, field(5, t)))),
        lambda t: field(1, field(5, field(11, field(1, field(5, field(6, field(5, t))))))),
    ],
)
def test_a_tensor_is_found_wherever_a_graph_may_hold_one(place: Callable[[bytes], bytes]) -> None:
    check_self_contained(model(field(5, tensor(None)) + place(tensor(None))), "a")
    for inside in (tensor("x"), field(14, 1), field(13, field(1, "location"))):
        with pytest.raises(ArtefactError, match="outside the file"):
            check_self_contained(model(place(inside)), "a")


def test_functions_and_training_graphs_are_searched_too() -> None:
    whole = model(field(5, tensor(None)))
    for outside in (
        field(25, field(7, field(5, field(5, tensor("x"))))),
        field(25, field(11, field(5, tensor("x")))),
        field(20, field(1, field(5, tensor("x")))),
        field(20, field(2, field(5, tensor("x")))),
    ):
        with pytest.raises(ArtefactError, match="outside the file"):
            check_self_contained(whole + outside, "a")


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_bytes_end_in_an_artefact_error_or_none(noise: bytes, place: int) -> None:
    whole = model(field(5, tensor("x")) * 20)
    for data in (noise, whole[:place], whole[:place] + noise + whole[place + len(noise) :]):
        try:
            check_self_contained(data, "a")
        except ArtefactError as error:
            assert str(error).startswith("a: ")


@pytest.mark.parametrize("said", [0, 1, 3])
def test_a_split_that_says_another_number_of_outputs_is_refused(said: int) -> None:
    """ONNX Runtime would end the process over it, in a branch of an If as anywhere."""

    def split(count: int) -> bytes:
        number = field(5, field(1, "num_outputs") + field(3, count))
        return field(1, field(1, "x") + field(2, "a") + field(2, "b") + field(4, "Split") + number)

    for inside in (lambda node: node, lambda node: field(1, field(5, field(6, node)))):
        whole = field(5, tensor(None))
        check_self_contained(model(whole + inside(split(2))), "a")
        with pytest.raises(ArtefactError, match=f"gives 2 outputs and says that it gives {said}"):
            check_self_contained(model(whole + inside(split(said))), "a")


def test_a_graph_that_gives_another_shape_is_refused() -> None:
    data = model(field(5, tensor(None)))
    wrong = GraphSpec(
        "sum.onnx",
        sha256(data),
        "fp32",
        "size",
        (TensorSpec("x", "float32", ("width",)),),
        (TensorSpec("y", "float32", ("width/2",)),),
        {"width": Range(4, 4)},
    )
    with pytest.raises(ArtefactError, match=r"gives y \(4,\); the manifest expects \(2,\)"):
        engine = OnnxRuntimeEngine(wrong, data, EngineOptions(threads=1))
        engine.run({"x": np.ones(4, np.float32)})


def test_a_file_cut_anywhere_is_no_graph() -> None:
    whole = model(field(5, tensor(None)))
    check_self_contained(whole, "a")
    for end in range(len(whole) - 4):  # the last four bytes are the opset, a whole field
        with pytest.raises(ArtefactError, match="is no ONNX graph"):
            check_self_contained(whole[:end], "a")


def test_a_bundle_with_outside_weights_ends_with_3(own_bundle: Path, command: Command) -> None:
    data = model(field(5, tensor("../../secret")))
    (own_bundle / "r2id.cpu.onnx").write_bytes(data)
    content = json.loads((own_bundle / "manifest.json").read_text())
    content["for_cpu"]["r2id"]["sha256"] = sha256(data)
    (own_bundle / "manifest.json").write_text(json.dumps(content))
    done = command("runtime.generate", "--engine", own_bundle, "--steps", 1)
    assert done.returncode == 3 and "'location' = '../../secret'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_graph_of_a_bundle_holds_its_weights(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    for _, spec in manifest.forms():
        check_self_contained(manifest.file_bytes(spec), spec.file)


def limit_memory(extra: int) -> None:
    """Let this process have `extra` bytes of address space more than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


OUT_OF_MEMORY = """
import sys
from runtime import open_bundle
from runtime.engines import EngineOptions
from runtime.errors import ResourceError
from tests.runtime.test_faults import limit_memory

pipeline = open_bundle(sys.argv[1], EngineOptions(threads=1))
small = lambda: pipeline.generate([1], latent=(4, 4), steps=2).images.tobytes()
before = small()
limit_memory(400 << 20)
for size in {"latent": (2048, 2048), "image": (8, 8)}, {"latent": (4, 4), "image": (16384, 16384)}:
    try:
        pipeline.generate([1], steps=1, **size)
        sys.exit("the large request was met")
    except (ResourceError, MemoryError) as error:
        print(type(error).__name__, error)
    assert small() == before
"""


@LINUX
def test_a_smaller_request_works_after_memory_ran_out(tiny_bundle: Path) -> None:
    line = [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_bundle)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    engine, array = done.stdout.splitlines()  # the library's allocator and numpy's
    assert engine.startswith("ResourceError") and "out of memory" in engine
    assert "requested buffer of size" in engine and "MiB are available" in engine
    assert array.startswith(("MemoryError", "ResourceError"))


@LINUX
def test_a_command_without_memory_ends_with_5(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    args = ("--engine", tiny_bundle, "--steps", 1, "--label", 1, "--image", "32x32")
    large = ("--latent", "8000x8000", "--noise", "independent", "--threads", 1)
    done = command("runtime.generate", *args, *large, preexec_fn=limit)
    assert done.returncode == 5 and "out of memory" in done.stderr
    assert "MiB are available" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@LINUX
def test_a_library_that_finds_no_memory_is_not_called_missing() -> None:
    code = (
        "from runtime.engines.onnxruntime import load_library\n"
        "from runtime.errors import ResourceError\n"
        "from tests.runtime.test_faults import limit_memory\n"
        "limit_memory(8 << 20)\n"
        "try:\n"
        "    load_library()\n"
        "except ResourceError as error:\n"
        "    raise SystemExit(str(error)) from None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be imported: out of memory" in done.stderr


@LINUX
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("out", ["sheet.png", "digit-{index}.png"])
def test_a_signal_ends_with_130_and_no_half_file(
    sent: signal.Signals, out: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "sheet.png").write_bytes(b"old")
    sheet = "{index}" not in out
    line = [sys.executable, "-m", "runtime.generate", "--engine", tiny_bundle, "--out", out]
    line += ["--count", "2000", "--batch", "1", "--steps", "20", "--threads", "1"]
    reader, terminal = os.openpty()  # which bars are drawn on
    termios.tcsetwinsize(terminal, (24, 100))
    with subprocess.Popen(
        list(map(str, line)),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=terminal,
    ) as process:
        os.close(terminal)
        said = ""
        # Until the bar has moved, and the first of several files is there.
        while "%" not in said or " 0/" in said or not (sheet or any(tmp_path.glob("digit-*"))):
            said = os.read(reader, 60).decode(errors="replace")
            assert said, "ended before the signal"
        process.send_signal(sent)
        rest = ""
        with contextlib.suppress(OSError):  # which ends a terminal on Linux
            while part := os.read(reader, 65536):
                rest += part.decode(errors="replace")
        assert process.wait(20) == 130
    os.close(reader)
    assert "interrupted" in rest and "Traceback" not in rest
    assert (tmp_path / "sheet.png").read_bytes() == b"old"
    pictures = [path for path in tmp_path.iterdir() if path.name != "sheet.png"]
    assert (not pictures) == sheet
    for path in pictures:
        assert path.name.startswith("digit-")
        Image.open(path).load()


@LINUX
def test_an_interrupt_that_a_library_turns_into_its_own_error_is_one() -> None:
    """numpy raises TypeError for a KeyboardInterrupt within a comparison of structured arrays."""
    code = (
        "import signal\n"
        "from runtime import cli\n"
        "def main(args):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise TypeError('swallowed') from None\n"
        "cli.run(main, cli.parser('x', None))\n"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def growth(draw: Callable[[int], object], rounds: int) -> int:
    """Bytes of resident memory that `rounds` calls of `draw` add after as many to warm up."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before could hold what leaks
    for number in range(rounds):
        draw(number)
    before = resident()
    for number in range(rounds):
        draw(number)
    return resident() - before


@LINUX
def test_memory_is_flat_over_mixed_sizes_and_a_leak_would_show(tiny_bundle: Path) -> None:
    pipeline: Bundle = open_bundle(tiny_bundle, EngineOptions(threads=1))
    sizes = [(1, 1), (3, 8), (16, 16), (9, 2), (24, 12)]
    kept: list[np.ndarray] = []

    def draw(number: int) -> np.ndarray:
        size = sizes[number % len(sizes)]
        made = pipeline.generate([1, None], latent=size, steps=2, eta=1.0, seed=number)
        return np.tile(made.images.ravel(), 64)

    allowed, rounds = 2 << 20, 60
    assert growth(draw, rounds) < allowed
    assert growth(lambda number: kept.append(draw(number)), rounds) > allowed


@LINUX
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_memory_is_flat_over_two_hundred_new_sizes(provider: str, tiny_bundle: Path) -> None:
    """Sizes that the process has never drawn, after two hundred others of the same kind."""
    if provider == "openvino" and not find_spec("openvino"):
        pytest.skip("no openvino: python -m pip install '.[openvino]'")
    pipeline = open_bundle(tiny_bundle, EngineOptions(provider, threads=1))
    sizes = np.random.default_rng(0).permutation([*product(range(1, 21), repeat=2)])
    turns = iter(sizes.tolist())

    def draw(number: int) -> object:
        height, width = next(turns)
        return pipeline.generate([1], latent=(height, width), steps=2, seed=number)

    assert growth(draw, rounds=200) < 16 << 20
