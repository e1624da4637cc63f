"""The time to a picture: how many evaluations it takes, where its seconds go, what is shown."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import picture
from runtime.engines import EngineOptions

SMALL = ((3, 4), (20, 24))


def test_the_fewest_evaluations_that_suffice_are_found(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "PICTURES", 1)
    monkeypatch.setattr(picture, "TRIED", (1, 2, 4, 8, 16))
    counts = {}
    for wanted in (0.0, 25.0):
        monkeypatch.setattr(picture, "WANTED", wanted)
        counts[wanted] = picture.evaluations(tiny_bundle, SMALL[0], 40)
    assert {steps for steps, _ in counts[0.0].values()} == {1}
    steps, quality = counts[25.0]["ours"]
    assert steps == 16 or quality >= 25
    assert steps <= counts[25.0]["DDIM"][0]


def test_every_part_of_ours_is_timed_and_ends_in_a_picture(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    png, options = tmp_path / "a.png", EngineOptions(threads=1)
    found = picture.our_parts(tiny_bundle, options, *SMALL, 2, png)
    assert {*found} == {*picture.PARTS, "open"} - {"imports"}
    assert all(taken > 0 for taken in found.values())
    assert Image.open(png).size == (24, 20)


def test_the_published_layout_draws_by_the_same_tables() -> None:
    found = picture.torch_parts(True, "2M", False, ((4, 4), (16, 16)), 4, 2, 1)
    assert {*found} == {*picture.PARTS, "open"} - {"imports"}
    assert found["open"] == pytest.approx(found["steps"] + found["decode"] + found["png"])


def test_a_report_says_how_many_times_as_fast_ours_is(tmp_path: Path) -> None:
    def row(contender: str, each: float) -> dict[str, Any]:
        case: dict[str, Any] = {
            "model": "shipped",
            "latent": "8x8",
            "image": "64x64",
            "contender": contender,
        }
        parts = dict.fromkeys(picture.PARTS, each)
        return case | parts | {"evaluations": 6, "psnr_db": 30.0, "fresh": 7 * each, "open": each}

    rows = [row("ours, onnxruntime", 1.0), row("ours, openvino", 0.5), row("torch eager, 2M", 4.0)]
    lines = picture.as_text(rows).splitlines()
    assert lines[0] == "shipped, 8x8 -> 64x64"
    assert [line.split()[-2:] for line in lines[2:5]] == [["2.0×"] * 2, ["1.0×"] * 2, ["8.0×"] * 2]
    picture.plot(rows, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 500


def test_a_case_is_two_sizes() -> None:
    assert picture.cases("8x8:64x64,1x2:3x4") == [((8, 8), (64, 64)), ((1, 2), (3, 4))]
    for text in ("8x8", "8x8:", "8:64"):
        with pytest.raises(argparse.ArgumentTypeError):
            picture.cases(text)
