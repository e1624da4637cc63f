"""Files that are damaged, absurd or none: one error that names them, soon, and little memory."""

import gzip
import io
import json
import os
import random
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import open_bundle
from runtime.bundle.files import read_bytes, sha256
from runtime.bundle.manifest import read_manifest
from runtime.bundle.state import DecodeState
from runtime.errors import ArtefactError, ToolkitError
from runtime.images.idx import read_idx
from runtime.images.pixels import read_metadata, save_png
from runtime.recipe import repeated
from tests.conftest import Command

POSIX = pytest.mark.skipif(os.name == "nt", reason="no pipes and devices as files")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A decode state's file."""
    path = tmp_path_factory.mktemp("state") / "a.npz"
    arrays = {"k": np.ones((2, 3, 4), np.float32), "kv": np.ones((2, 5), np.float32)}
    DecodeState(arrays, "a" * 64, (8, 8), {"request": {"seed": 1}}).save(path)
    return path.read_bytes()


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(s.to_bytes(4, "big") for s in shape) + data


def bounded(read: Callable[[], object]) -> str:
    """What `read` says when it refuses, in a second and 64 MB."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ToolkitError) as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5  # a tenth of it on two cores
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Bundles.


@POSIX
def test_a_link_out_of_the_bundle_is_not_followed(own_bundle: Path, tmp_path: Path) -> None:
    for name in ("r2id_film.onnx", "manifest.json"):
        outside = (own_bundle / name).rename(tmp_path / name)
        (own_bundle / name).symlink_to(outside)
        with pytest.raises(ArtefactError, match=f"{name}: leads out of "):
            open_bundle(own_bundle).engines.open("r2id_film")
        (own_bundle / name).unlink()
        outside.rename(own_bundle / name)


@POSIX
def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, words in (("pipe", "regular"), ("endless", "regular"), ("folder", "a folder")):
        assert words in bounded(partial(read_bytes, tmp_path / name, "a", "b"))
    for name in ("a\0b", "a\ud800b"):
        assert "no file's name" in bounded(partial(read_bytes, tmp_path / name, "a", "b"))


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "more than the" in bounded(lambda: read_manifest(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: '{"format": 3, "interface": ' + "[" * 100_000,
        lambda m: json.dumps(m).replace('"steps": ', '"steps": 1e400, "x": ', 1),
        lambda m: json.dumps(m | {"format": 1e300}),
        lambda m: json.dumps(m | {"graphs": []}),
        lambda m: json.dumps(m)[:-1],
        lambda m: json.dumps(m | {"interface": m["interface"] | {"labels": ["a"] * 11}}),
        lambda m: json.dumps(m["graphs"]["r2id"]["ranges"].pop("width") and m),
        lambda m: json.dumps(m["graphs"]["r2id"].update(file="a\0b") or m),
        lambda m: json.dumps(m["graphs"]["r2id"].update(file="\ud800") or m),
        lambda m: json.dumps(m["graphs"]["r2id"].update(file="../r2id.onnx") or m),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    change: Callable[[dict[str, Any]], str], own_bundle: Path
) -> None:
    path = own_bundle / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    assert "manifest.json: " in bounded(lambda: open_bundle(own_bundle))


def test_a_graph_of_another_interface_is_refused(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    content = json.loads(path.read_text())
    data = (own_bundle / "r2id_film.onnx").read_bytes()
    (own_bundle / "r2id_condition.onnx").write_bytes(data)
    content["graphs"]["r2id_condition"]["sha256"] = sha256(data)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="It is a graph of another model"):
        open_bundle(own_bundle).engines.open("r2id_condition")


# Archives of arrays.


def archive(members: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    return file.getvalue()


def npy(shape: str, data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\5\6" + bytes(18),
        archive({"k.npy": npy("(1099511627776, 8)")}),
        archive({"k.npy": npy("(-1,)")}),
        archive({"k.npy": npy("(" + "1," * 40 + ")", bytes(4))}),
        archive({"k.npy": npy("(1,", bytes(4))}),
        archive({"k.npy": npy("(" * 90 + ")" * 90)}),
        archive({"k.npy": npy("(1,)", bytes(8), "|O")}),
        archive({"k.npy": npy("(" + str(1 << 25) + ",)", bytes(1 << 27))}, compression=8),
        archive({f"a{i}.npy": npy("(1,)", bytes(4)) for i in range(2000)}),
        archive({"../k.npy": npy("(1,)", bytes(4))}),
        archive({"bundle.npy": npy("()", bytes(4)), "metadata.npy": npy("()", bytes(4))}),
        # Encrypted: the flag's bit in the member's own header and in the list.
        archive({"k.npy": npy("(1,)", bytes(4))}).replace(b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0"),
    ],
)
def test_an_archive_that_is_no_state_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    assert "a.npz: " in bounded(lambda: DecodeState.load(tmp_path / "a.npz"))


# IDX files.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "begins with"),
        (b"\x00\x00\x0d\x01" + bytes(8), "begins with 00000d01"),
        (idx((4, 4), bytes(15)), "15 bytes after the header, which promises 16"),
        (idx((4, 4), bytes(17)), "more than 16 bytes after the header"),
        (idx((2**32 - 1,) * 3, b""), "0 bytes after the header"),
        (bytes([0, 0, 8, 100]) + bytes(400), "1 to 4 axes"),
        (bytes([0, 0, 8, 3]) + bytes(5), "which promises"),
    ],
)
def test_damaged_idx_files_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(data)
    assert words in bounded(lambda: read_idx(tmp_path / "raw"))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(data))
    assert words in bounded(lambda: read_idx(tmp_path / "packed"))


def test_a_packed_idx_file_is_unpacked_as_far_as_it_promises(tmp_path: Path) -> None:
    """A file of 2 MB that unpacks to 2 GB of zeros."""
    member = gzip.compress(bytes(1 << 24))
    with (tmp_path / "a.gz").open("wb") as file:
        file.write(gzip.compress(idx((3, 3), b"")) + member * 128)
    assert "more than 9 bytes" in bounded(lambda: read_idx(tmp_path / "a"))
    with pytest.raises(ArtefactError, match=r"neither it nor file\.gz is there"):
        read_idx(tmp_path / "file")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(idx((9,), bytes(9)))[:-4])
    assert "no IDX file (EOFError" in bounded(lambda: read_idx(tmp_path / "cut"))


# What a PNG says made it.

RECIPE: dict[str, object] = {
    "label": [1, None, {"2": 0.5, "3": 0.5}],
    "count": 1,
    "latent": [4, 4],
    "image": [8, 8],
    "crop": None,
    "exact": False,
    "solver": "ddim",
    "spacing": "time",
    "steps": 2,
    "guidance": 2,
    "guidance_interval": [0, 1],
    "eta": 0,
    "seed": 1,
    "first_index": 0,
    "noise": "coherent",
    "continue_at": None,
    "continue_from": None,
}
WRONG: dict[str, tuple[object, ...]] = {
    "seed": (float("inf"), -1, 1 << 70, "1", None, 1.5),
    "count": (10**12, 0, []),
    "first_index": (-1, 1 << 50),
    "label": ([], [-1], [1 << 40], {}, "1", [{"a": 1}], [[1]]),
    "latent": ([0, 1], [1], [1 << 30, 1], {"a": 1}),
    "guidance_interval": ([1, 0], [0, 2], [float("nan"), 1]),
    "eta": (float("nan"), -1),
    "solver": ("x",),
    "noise": ("x",),
    "crop": ([1, 2, 3],),
    "exact": (3,),
    "steps": (0,),
    "strength": (1.1, "1"),
    "init": ("f" * 63, "../photo.png", 7),
    "mask": ("f" * 64,),  # without the picture that it is of
    "seam": (-1, 0.5),
    "ground": ([0, 0], [0, 0, 256]),
    "quality": (0, 101),
}


def test_a_recipe_is_read_with_its_types() -> None:
    made = repeated(Path("a.png"), {"request": RECIPE})
    assert made["label"] == [1, None, {2: 0.5, 3: 0.5}] and made["latent"] == (4, 4)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_recipe_with_a_number_out_of_range_is_refused(
    key: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    save_png(path, np.zeros((2, 2, 1), np.uint8), {"request": RECIPE | {key: value}})
    said = bounded(lambda: repeated(path, read_metadata(path)))
    assert said.startswith(f"{path}: ")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    pieces = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        check = struct.pack(">I", zlib.crc32(kind + data))
        pieces.append(struct.pack(">I", len(data)) + kind + data + check)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "data",
    [
        png((b"tEXt", b"r2\0" + b"[" * (60 << 20))),
        png(*[(b"tEXt", b"x\0y")] * 400_000),
        png((b"tEXt", b"r2\0" + b"[" * 1_000_000)),
    ],
)
def test_absurd_texts_of_a_png_are_not_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    assert "a.png: " in bounded(lambda: read_metadata(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [("0-999999", "label 999999 is not in this bundle"), ("0-9," * 20_000 + "1", "at most 100000")],
)
def test_a_list_of_too_many_is_refused_before_it_is_drawn(
    labels: str, words: str, tiny_bundle: Path, command: Command
) -> None:
    done = command("runtime.generate", "--engine", tiny_bundle, "--label", labels)
    assert done.returncode == 2 and words in done.stderr


# Random damage.


def damaged(whole: bytes, turn: int) -> bytes:
    """A file with some bytes changed, cut out or put in, the same for the same `turn`."""
    draw, data = random.Random(turn), bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        place, kind = draw.randrange(len(data) + 1), draw.random()
        if kind < 0.6 and place < len(data):
            data[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif kind < 0.8:
            del data[place : place + draw.randint(1, 40)]
        else:
            data[place:place] = draw.randbytes(draw.randint(1, 8))
    return bytes(data)


@pytest.mark.parametrize(
    "kind", ["manifest.json", "a.npz", "a", "a.gz", "a.png", "a.jpg", "a.webp"]
)
def test_random_damage_ends_in_an_error_of_ours_or_none(
    kind: str, state: bytes, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / kind
    for end in ("png", "jpg", "webp"):
        save_png(tmp_path / f"whole.{end}", np.zeros((2, 2, 1), np.uint8), {"request": RECIPE})
    plain = idx((3, 4), bytes(12))
    kinds: dict[str, tuple[bytes, Callable[[], object]]] = {
        "manifest.json": (
            (tiny_bundle / "manifest.json").read_bytes(),
            lambda: open_bundle(tmp_path),
        ),
        "a.npz": (state, lambda: DecodeState.load(path)),
        "a": (plain, lambda: read_idx(path)),
        "a.gz": (gzip.compress(plain), lambda: read_idx(tmp_path / "a")),
    } | {
        f"a.{end}": (
            (tmp_path / f"whole.{end}").read_bytes(),
            lambda: repeated(path, read_metadata(path)),
        )
        for end in ("png", "jpg", "webp")
    }
    (whole, read), refused, began = kinds[kind], 0, time.process_time()
    for turn in range(150):
        path.write_bytes(damaged(whole, turn))
        try:
            read()
        except ArtefactError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error), error
    assert refused > 20 and time.process_time() - began < 60
