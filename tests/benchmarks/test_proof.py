"""What a configuration's proof compares: steps and decodes of each engine with the reference's."""

from pathlib import Path

from benchmarks.apart import Failure
from benchmarks.proof import ENGINES, on_engine, reference_runs, row_of
from reference import checkpoint


def test_engines_are_compared_with_the_reference(tiny_bundle: Path, tmp_path: Path) -> None:
    models = checkpoint.load(tiny_bundle / "tiny.safetensors").models
    path, sizes = tmp_path / "torch.npz", [(2, 3), (5, 4)]
    names = ["step 2x3", "decode 2x3", "step 5x4", "decode 5x4"]
    found = [*reference_runs(models, sizes, path)]
    assert [row["what"] for row in found] == [f"{name}, PyTorch" for name in names]
    for engine in ENGINES:
        rows = [*on_engine(tiny_bundle, engine, sizes, 1, path)]
        assert [row["what"] for row in rows] == [f"{name}, {engine}" for name in names]
        assert all(0 < row["error"] <= 1e-4 and row["seconds"] > 0 for row in rows)
    assert row_of("export", Failure("no memory")) == ["export", "", "", "no memory"]
