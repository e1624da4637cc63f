"""The report: its figures against direct ones, its rule, its files."""

import json
from pathlib import Path

import numpy as np
import pytest

from calibration import digits, report
from runtime.bundle.manifest import read_manifest
from runtime.engines import EngineOptions
from runtime.errors import ArtefactError
from runtime.images.pixels import read_metadata
from runtime.pipeline.bundle import open_bundle
from tests.conftest import HEAVY, Command


def test_the_command(
    quantized_bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--precision", "int8,fp8", "--sizes", "4x4,3x5")
    done = command("calibration.report", quantized_bundle, *asked, "--steps", 3, "--out", "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert found["precisions"].keys() == {"int8", "fp8"}
    own = found["precisions"]["int8"]
    assert own["sizes"].keys() == {"4x4", "3x5"}
    row = own["sizes"]["3x5"]
    assert len(row["eps_error_over_t"]) == 3 and len(row["drift"]) == 4 and row["drift"][0] == 0
    assert "render PSNR" in done.stdout and row["render_psnr_db"] > 0
    assert 0 < max(row["eps_error_over_t"][1:]) < 0.2 and max(row["drift"]) > 0
    assert own["files"]["times_fp32"] < 1 and own["layers"].keys() == set(HEAVY)
    speed = found["speed"]["cpu"]["4x4"]
    assert speed["fp32"]["times_fp32_on_cpu"] == 1
    assert speed["int8"]["seconds_per_step"] > 0 and speed["int8"]["peak_mib"] > 10
    assert own["verdict"]["passes"] == (not own["verdict"]["failures"])
    assert "int8: files" in done.stdout and "no classifier" in done.stdout
    assert read_metadata(tmp_path / "out" / "images-4x4.png")["rows"] == ["fp32", "int8", "fp8"]
    assert (tmp_path / "out" / "eps-error-over-t.png").stat().st_size > 1000


def test_psnr_is_of_images_drawn_with_the_same_seed(quantized_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(quantized_bundle)
    found = report.quality(manifest, ["int8w"], (4, 4), 3, tmp_path)["int8w"]
    images = {}
    for precision in ("fp32", "int8w"):
        pipeline = open_bundle(quantized_bundle, EngineOptions(precision=precision))
        images[precision] = pipeline.generate(
            [0, 1, 2, 3], (4, 4), steps=3, seed=0, solver="ddim"
        ).images
    error = np.square(images["fp32"] - images["int8w"]).mean()
    assert found["psnr_db"] == pytest.approx(10 * np.log10(4 / max(error, 4e-20)), abs=0.1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_render_is_judged_in_tiles_of_its_precision(
    quantized_bundle: Path, precision: str
) -> None:
    manifest = read_manifest(quantized_bundle)
    own, fp32 = report.Judged(manifest, precision), report.Judged(manifest, "fp32")
    latent = np.random.default_rng(0).uniform(-1, 1, (1, 4, 3, 5)).astype(np.float32)
    found = report.rendering(own, fp32, latent)
    assert {("r2ir_render", precision), ("r2ir_render", "fp32")} <= {
        *own.engines.opened,
        *fp32.engines.opened,
    }
    if precision == "fp32":
        assert found == {"render_psnr_db": 200.0, "render_largest_error": 0.0}
    else:
        assert 0 < found["render_psnr_db"] < 150 and 0 < found["render_largest_error"] <= 2


def test_the_verdict_is_a_rule() -> None:
    def judged(precision: str, psnr: float, share: float) -> list[str]:
        own = {"sizes": {"8x8": {"psnr_db": psnr}}, "digits_read_right": {"8x8": share}}
        verdict = report.verdict(precision, own, {"8x8": 0.95})
        assert verdict["passes"] == (not verdict["failures"])
        return list(verdict["failures"])

    assert judged("int8", 35, 0.94) == [] and judged("fp16", 45, 0.99) == []
    assert judged("int8", 34.9, 0.95) == ["PSNR 34.9 dB at 8x8, expected 35"]
    assert judged("bf16", 44.9, 0.95) == ["PSNR 44.9 dB at 8x8, expected 45"]
    assert judged("fp8", 50, 0.93) == ["2.0 points of digits lost at 8x8, expected 1"]
    assert judged("int8", float("nan"), 0.95) == ["PSNR nan dB at 8x8, expected 35"]


def test_the_classifier_is_the_reference_s(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from reference.classifier import Classifier

    torch.manual_seed(0)
    model = Classifier()
    for _ in range(3):  # so that running means and variances are none of 0 and 1
        model(torch.randn(8, 1, 32, 32) * 2 + 1)
    model.eval()
    save_file(model.state_dict(), tmp_path / "classifier.safetensors")
    x = torch.randn(3, 1, 32, 32)
    session = digits.classifier(tmp_path / "classifier.safetensors")
    found = session.run(["logits"], {"pixels": x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-3, atol=1e-4)
    (tmp_path / "classifier.safetensors").write_bytes(b"none")
    with pytest.raises(ArtefactError, match="no classifier of digits"):
        digits.classifier(tmp_path / "classifier.safetensors")


def test_a_bundle_in_fp32_alone_has_nothing_to_report(tiny_bundle: Path, command: Command) -> None:
    done = command("calibration.report", tiny_bundle)
    assert done.returncode == 2 and "no graphs in int8" in done.stderr
