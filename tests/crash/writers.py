"""Every command that writes, on the tiny models: how it is called, and what must hold after it."""

import os
import resource
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import context, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import onnx
from PIL import Image
from safetensors.torch import load_file

from runtime.bundle.manifest import read_manifest
from runtime.images.pixels import read_metadata
from tests.conftest import CALIBRATION, ROOT

Check = Callable[[Path], None]
PLANS = ("--target", "sm89", "--latent", "2x2..4x4", "--image", "8x8..16x16", "--profiles", "1")


@dataclass(frozen=True)
class Writer:
    """A command in the folder of a bundle; `whole` checks what is there, whenever it was ended.

    `needs`: the package that it needs. `complete` checks what is there after it has succeeded.
    """

    module: str
    line: tuple[str, ...]
    whole: Check
    complete: Check = field(default=lambda folder: None)
    needs: str = "torch"


def bundle(folder: Path) -> None:
    """The manifest is there, and every file that it names has its hash."""
    manifest = read_manifest(folder)
    for _, spec in manifest.forms():
        manifest.file_bytes(spec)
    for plan in manifest.plans.values():
        manifest.file_bytes(plan)


def having(precision: str) -> Check:
    def check(folder: Path) -> None:
        assert precision in read_manifest(folder).variants

    return check


def planned(folder: Path) -> None:
    assert "r2id_position.plan" in read_manifest(folder).plans


def pictures(folder: Path) -> None:
    """Each file is a whole picture with its record."""
    for path in folder.glob("*.png"):
        Image.open(path).load()
        assert read_metadata(path)["request"]


def all_pictures(folder: Path) -> None:
    assert len([*folder.glob("digit-*.png")]) == 30


def one_file(folder: Path) -> None:
    """What was there, or a whole model."""
    data = (folder / "picture.onnx").read_bytes()
    if data != b"old":
        onnx.checker.check_model(onnx.load_model_from_string(data))


def new_file(folder: Path) -> None:
    assert (folder / "picture.onnx").read_bytes() != b"old"


def training(folder: Path) -> None:
    """What can be read."""
    for path in (folder / "run").glob("*.safetensors"):
        load_file(path)


def trained(folder: Path) -> None:
    assert (folder / "run" / "checkpoint.safetensors").exists()


TRAINING = ("--config", "colour.toml", "--data", "data", "--out", "run", "--device", "cpu")
DRAWING = (
    *("--engine", ".", "--label", "0-9", "--count", "3", "--batch", "2", "--threads", "1"),
    *("--state", "all.npz"),
)
WRITERS = {
    "export": Writer("export", ("--checkpoint", "tiny.safetensors", "--out", "."), bundle),
    "half": Writer("calibration.half", (".", "--precision", "bf16"), bundle, having("bf16")),
    "calibration": Writer(
        "calibration", (".", *CALIBRATION, "--precision", "int8w"), bundle, having("int8w")
    ),
    "plans": Writer(
        "export.to_plan",
        (".", "--graphs", "r2id_position", *PLANS),
        bundle,
        planned,
        "tensorrt_rtx",
    ),
    "pictures": Writer(
        "runtime.generate",
        (*DRAWING, "--out", "digit-{index}.png"),
        pictures,
        all_pictures,
    ),
    "one file": Writer(
        "export.single_file", (".", "picture.onnx", "--steps", "3"), one_file, new_file
    ),
    "training": Writer("reference.train", (*TRAINING, "--save-every", "5"), training, trained),
}
# What takes long to import; nothing of it begins a thread.
LOADED = ("torch", "onnx", "onnxruntime", "matplotlib.figure", "skimage", "export.verify")


def server() -> context.ForkServerContext:
    """Processes that begin with every library imported, so that a kill meets the work."""
    found = get_context("forkserver")
    found.set_forkserver_preload([*LOADED, *(own.module for own in WRITERS.values())])
    return found


def start(writer: Writer, folder: Path, said: Path, largest: int = 0) -> BaseProcess:
    """Begin a command in `folder`, its messages in the file `said`.

    `largest`: bytes beyond which it can write no file, as on a disk that is full; 0: any.
    """
    process = server().Process(
        target=work, args=(writer.module, writer.line, folder, said, largest)
    )
    process.start()
    return process


def work(module: str, line: tuple[str, ...], folder: Path, said: Path, largest: int) -> None:
    """The command itself, in a process of its own."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = [module, *line]
    warnings.simplefilter("ignore")  # of modules that are loaded already
    runpy.run_module(module, run_name="__main__", alter_sys=True)
