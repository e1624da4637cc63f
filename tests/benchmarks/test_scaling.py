"""What many pictures cost: the parts of a picture add up to what is reported."""

import json
from pathlib import Path

import pytest

from tests.conftest import Command


def test_every_size_is_measured_part_by_part(
    command: Command, tiny_bundle: Path, tmp_path: Path
) -> None:
    done = command("benchmarks.scaling", tiny_bundle, "--rounds", 1, "--batch", 2, "--out", "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [(row["latent"], row["batch"]) for row in found["rows"][:3]] == [
        ([8, 8], 1),
        ([8, 8], 2),
        ([8, 8], 1),
    ]
    lines = [line.split() for line in done.stdout.splitlines()[1:9]]
    for row, line in zip(found["rows"], lines, strict=True):
        seconds = row["diffuse"] + row["decode"] + row["png"]
        assert min(row["diffuse"], row["decode"], row["png"], row["bytes"]) > 0
        assert line[1] == "x".join(map(str, row["image"]))
        assert float(line[7].replace(",", "")) == pytest.approx(86_400 / seconds, rel=1e-3)
        assert float(line[8]) == pytest.approx(1e6 * seconds / 3600, rel=1e-2, abs=0.05)
    small, large = found["rows"][0], found["rows"][6]  # 64x64 and 512x512
    assert large["decode"] > 4 * small["decode"]
    assert found["memory_bytes"] > 50e6 and found["file_seconds"] > 0
