"""From a command to a PNG: what was measured is not measured again."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import picture


def test_it_goes_on_after_what_was_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def row(name: str) -> dict[str, float]:
        taken.append(name)
        return {key: float(len(taken)) for key in (*picture.PARTS, "fresh", "open")}

    def ours(args: argparse.Namespace, bundle: Path, provider: str, *_: object) -> Any:
        return row(provider)

    def torch(args: argparse.Namespace, shipped: bool, kind: str, *_: object) -> Any:
        return row(kind)

    monkeypatch.setattr(picture, "alone", lambda work: work())
    monkeypatch.setattr(picture, "our_row", ours)
    monkeypatch.setattr(picture, "torch_row", torch)
    monkeypatch.setattr(picture, "TRIED", (6, 8))
    monkeypatch.setattr(picture, "QUICKLY_CONVERGED", 12)
    args = argparse.Namespace(
        quick=True, cases=[((3, 4), (12, 16))], providers=["cpu"], rounds=1, steps=2, threads=1
    )
    args.precision, args.out = "fp32", tmp_path
    given = args, {"shipped": tiny_bundle}, tmp_path / "a.png"
    first = picture.measure(*given)
    assert taken == ["cpu", "DDIM", "2M"] and len(first) == 3
    assert picture.measure(*given) == first and len(taken) == 3
    args.rounds = 2
    second = picture.measure(*given)
    assert taken[3:] == ["cpu", "DDIM", "2M"] and second[0]["fresh"] == (1 + 4) / 2
    args.threads = 2
    picture.measure(*given)
    assert len(taken) == 6 + 6
    found = json.loads((tmp_path / "picture-measures.json").read_bytes())
    assert found["settings"]["threads"] == 2
