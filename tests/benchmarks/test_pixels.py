"""Steps of families that diffuse pixels beside the reference."""

import argparse
from pathlib import Path

import pytest

from benchmarks.pixels import EAGER, engines, prepared, rows_of


def test_ours_is_compared_with_the_reference(tmp_path: Path) -> None:
    (made,) = prepared(tmp_path, "tiny-sid2", [(16, 24)], 2)
    args = argparse.Namespace(engines=engines("torch,cpu"), rounds=1, threads=1)
    eager, ours = rows_of(made, (16, 24), args)
    assert eager[:3] == ["tiny-sid2", "16x24", EAGER] and eager[-2:] == ["1.00", "0e+00"]
    assert ours[2] == "ours, ORT" and float(str(ours[-1])) <= 1e-5 and float(str(ours[-2])) > 0
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of torch,cpu,openvino"):
        engines("onnx")
