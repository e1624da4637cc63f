"""What the guide for programs shows can be run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT


def test_the_examples_of_the_guide_run_in_turn(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mnist").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    shapes = {name: np.shape(names[name]) for name in ("eps", "corner", "pixels")}
    assert shapes == {"eps": (1, 4, 8, 8), "corner": (1, 64, 64), "pixels": (3, 1, 48, 27)}
    assert names["same"] and names["filled"].images.shape == (4, 1, 64, 64)
    assert str(names.get("made", "")).startswith("Generated")
