"""Many pictures on a local Ray: none lost when an actor dies, none drawn twice."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import open_bundle
from runtime.images.pixels import to_uint8
from runtime.images.png import Rows
from tests.conftest import ROOT, Command

pytest.importorskip("ray", reason="no ray: run `make test`")
COUNT = 500
# WIDTHxHEIGHT of pictures and latents.
SIZES = (("32x32", "8x8"), ("36x24", "9x6"), ("16x16", "4x4"), ("20x48", "5x12"))


def request(number: int) -> dict[str, Any]:
    """Request `number` of mixed sizes, labels and seeds."""
    size, latent = SIZES[number % len(SIZES)]
    own = {"id": f"p{number}", "prompt": "abcdefghij"[number % 10], "seed": number}
    return own | {"size": size, "latent": latent, "num_inference_steps": 3}


def swapped(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as (height, width)."""
    width, height = map(int, text.split("x"))
    return height, width


def pixels_of(path: Path) -> Rows:
    """uint8 `[h, w, c]` of a file."""
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    return pixels.reshape(*pixels.shape[:2], -1)


def actors(root: int) -> list[int]:
    """The processes of Ray's actors below a process of ours."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                rest = (folder / "stat").read_text().rpartition(")")[2].split()
                names[int(folder.name)] = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(rest[1])

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid, name in names.items() if b"MapWorker" in name and below(pid)]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of pictures.jsonl; of a run that goes on those that are whole."""
    journal = out / "pictures.jsonl"
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def drawn(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of COUNT requests and OUT, of which one of two actors was killed on the way."""
    if sys.platform != "linux":
        pytest.skip("finds actors in /proc")
    folder = tmp_path_factory.mktemp("batch")
    asked = [request(number) for number in range(COUNT)]
    requests = folder / "requests.jsonl"
    requests.write_text("".join(json.dumps(own) + "\n" for own in asked))
    line = [sys.executable, "-m", "serving.batch", str(requests), str(folder / "out")]
    line += ["--engine", str(tiny_bundle), "--actors", "2", "--parquet"]
    killed = 0
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 600
        while process.poll() is None and not killed:
            assert time.monotonic() < end
            if 16 <= len(rows_of(folder / "out")) < COUNT // 2 and (found := actors(process.pid)):
                os.kill(killed := found[0], signal.SIGKILL)
            time.sleep(0.01)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert killed
    return folder


def test_every_picture_once_though_an_actor_dies(tiny_bundle: Path, drawn: Path) -> None:
    out, asked = drawn / "out", [request(number) for number in range(COUNT)]
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [own["id"] for own in asked]
    assert {path.name for path in out.glob("*.png")} == {row["file"] for row in rows}
    bundle = open_bundle(tiny_bundle)
    same = 0
    for own, row in zip(asked, rows, strict=True):
        size, latent = swapped(own["size"]), swapped(own["latent"])
        options: Any = {"image": size, "steps": 3, "seed": own["seed"]}
        alone = to_uint8(bundle.generate([own["prompt"]], latent, **options).images)[0]
        # Products of a batch may round otherwise than those of one picture.
        apart = np.abs(pixels_of(out / row["file"]).astype(int) - alone).max()
        assert apart <= 1
        same += apart == 0
    assert same > 0.98 * COUNT
    from pyarrow import parquet

    assert parquet.read_table(out / "pictures.parquet").to_pylist() == rows


def test_what_is_there_and_whole_is_not_drawn_again(
    command: Command, tiny_bundle: Path, drawn: Path
) -> None:
    out = drawn / "out"
    first = {own.name: own.read_bytes() for own in out.iterdir()}
    times = {own.name: own.stat().st_mtime_ns for own in out.glob("*.png")}
    (out / "p1.png").unlink()
    (out / "p2.png").write_bytes(first["p2.png"][:-1])
    journal = first["pictures.jsonl"]
    (out / "pictures.jsonl").write_bytes(journal[: journal.rindex(b'"sha256"')])  # p499 is cut off
    line = (drawn / "requests.jsonl", out, "--engine", tiny_bundle, "--actors", 1)
    done = command("serving.batch", *line)
    assert done.returncode == 0, done.stderr
    assert "497 of 500 pictures are there and whole" in done.stderr
    assert {own.name: own.read_bytes() for own in out.iterdir()} == first
    again = {own.name: own.stat().st_mtime_ns for own in out.glob("*.png")}
    changed = {name for name in again if again[name] != times[name]}
    assert changed == {"p1.png", "p2.png", "p499.png"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"}', "line 2: Object missing required field `id`"),
        ('{"id": "../a", "prompt": "a"}', "line 2: id is '../a'"),
        ('{"id": "p0", "prompt": "a"}', "line 2: p0.png is an earlier line's file"),
        ('{"id": "x", "prompt": "nobody"}', "line 2: "),
        ('{"id": "x", "prompt": "a", "size": "7"}', "line 2: size is '7'"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_named_before_any_is(
    command: Command, tiny_bundle: Path, tmp_path: Path, line: str, said: str
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(f"{json.dumps(request(0))}\n{line}\n")
    done = command("serving.batch", path, "out", "--engine", tiny_bundle)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
