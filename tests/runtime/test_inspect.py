"""runtime.inspect and runtime.doctor as users meet them."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from runtime.bundle.manifest import read_manifest
from runtime.providers import PROVIDERS
from tests.conftest import ROOT, Command
from tests.runtime.test_providers import plan


def test_a_whole_bundle_fits_100_columns(tiny_bundle: Path, command: Command) -> None:
    done = command("runtime.inspect", tiny_bundle)
    assert done.returncode == 0 and not done.stderr
    manifest = read_manifest(tiny_bundle)
    assert manifest.sha256 in done.stdout
    for name in manifest.graphs:
        assert f"\n  {name} " in done.stdout
    assert "1x1..65536x65536, batch 1..4096, conditions 1..64" in done.stdout
    inner = [line for line in done.stdout.splitlines() if str(tiny_bundle) not in line]
    assert max(map(len, inner)) <= 100
    every = command("runtime.inspect", tiny_bundle, "--parity").stdout
    rows = sum(len(spec.parity) - 1 for _, spec in manifest.forms())
    assert len(every.splitlines()) - len(done.stdout.splitlines()) == rows


def test_variants_and_plans_are_shown(own_bundle: Path, command: Command) -> None:
    manifest = read_manifest(own_bundle)
    graph = manifest.graph("r2id")
    half = replace(graph, file="r2id.fp16.onnx", precision="fp16")
    shutil.copy(own_bundle / "r2id.onnx", own_bundle / half.file)
    (own_bundle / "r2id.plan").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    own = replace(plan("r2id"), sha256=empty, source_sha256=graph.sha256)
    whole = replace(manifest, variants={"fp16": {"r2id": half}}, plans={own.file: own})
    whole.write(own_bundle)
    done = command("runtime.inspect", own_bundle)
    assert done.returncode == 0, done.stderr
    assert "tensorrt_rtx 1.7.1 on linux x86_64" in done.stdout and "sm120, sm89" in done.stdout
    assert "profile 0  1x2..4x4..8x8, batch 1..1..4, conditions 1..2..2" in done.stdout
    assert sum(
        line.startswith("  r2id.fp16  ") and "fp16" in line for line in done.stdout.split("\n")
    )
    outdated = replace(whole, plans={own.file: replace(own, source_sha256="1" * 64)})
    outdated.write(own_bundle)
    done = command("runtime.inspect", own_bundle)
    assert done.returncode == 3 and "r2id.plan outdated" in done.stderr


def test_files_that_are_not_whole_are_named_with_3(own_bundle: Path, command: Command) -> None:
    count = len(read_manifest(own_bundle).forms())
    (own_bundle / "r2id.onnx").write_bytes(b"altered")
    (own_bundle / "r2ir_decode.onnx").unlink()
    for options in ((), ("--json",)):
        done = command("runtime.inspect", own_bundle, *options)
        assert done.returncode == 3 and f"2 of {count} files" in done.stderr
        assert "r2id.onnx altered, r2ir_decode.onnx missing" in done.stderr
        assert "Traceback" not in done.stderr and "r2ir_encode" in done.stdout
    assert json.loads(done.stdout)["files"]["r2ir_decode.onnx"] == "missing"
    path = own_bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trajectory": {"steps": 1}}))
    assert command("runtime.inspect", own_bundle).returncode == 3
    assert command("runtime.inspect", own_bundle / "nothing").returncode == 3


def test_json_holds_the_whole_manifest(tiny_bundle: Path, command: Command) -> None:
    content = json.loads(command("runtime.inspect", tiny_bundle, "--json").stdout)
    manifest = read_manifest(tiny_bundle)
    assert content["sha256"] == manifest.sha256
    assert content["graphs"] == json.loads(msgspec.json.encode(manifest.graphs))
    assert set(content["files"].values()) == {"ok"}
    assert command("runtime.inspect", tiny_bundle, "--expect-sha256", "0" * 64).returncode == 3


def test_doctor_says_what_to_type_next(tiny_bundle: Path, command: Command) -> None:
    done = command("runtime.doctor", tiny_bundle)
    assert done.returncode == 0 and not done.stderr
    for name in ("numpy", "onnxruntime", "tensorrt_rtx", *(f"--provider {n}" for n in ("cpu",))):
        assert f"\n{name} " in done.stdout
    last = done.stdout.strip().split("\n")[-1]
    assert last.startswith("next: python -m runtime.generate --engine") and "--provider" in last
    assert command("runtime.doctor", "nothing").stdout.strip().endswith("next: python -m export")
    found = json.loads(command("runtime.doctor", tiny_bundle, "--json").stdout)
    assert found["providers"]["cpu"] == {
        "available": True,
        "install": PROVIDERS["cpu"].install,
    }
    for name in ("libraries", "providers"):
        own = found[name]["openvino"]
        assert own["install"] == "python -m pip install 'openvino>=2026.4'"
        here = importlib.util.find_spec("openvino") is not None
        assert own["installed" if name == "libraries" else "available"] == here
    assert found["bundle"]["free_bytes"] > 0 and found["processor"]["cores"] >= 1


@pytest.mark.parametrize("broken", ["onnxruntime", "numpy"])
def test_doctor_stands_a_broken_library(
    broken: str, tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / f"{broken}.py").write_text("raise ImportError('no such symbol')")
    done = command("runtime.doctor", tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert "no such symbol" in done.stdout
    assert "next: python -m pip install" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for nvidia-smi")
def test_doctor_reads_nvidia_smi(
    own_bundle: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, path = tmp_path / "nvidia-smi", os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no driver: nvidia-smi is not found" in command("runtime.doctor", own_bundle).stdout
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    for script, words in (
        ("echo 'NVIDIA GeForce RTX 4070, 8.9, 12282, 11000, 580.95'", "580.95"),
        ("echo 'NVIDIA Thor, [N/A], [N/A], [N/A], 580.95'", "GPU  "),
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("exit 9", "exit code 9"),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        done = command("runtime.doctor", own_bundle)
        assert done.returncode == 0 and words in done.stdout, done
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070, 8.9, 12282, 11000, 580.95'\n")
    found = json.loads(command("runtime.doctor", own_bundle, "--json").stdout)
    assert found["nvidia"]["gpus"][0]["compute_capability"] == "8.9"
    assert "--provider cuda" in found["next"][-1]


@pytest.mark.parametrize("module", ["runtime.inspect", "runtime.doctor"])
def test_help_is_quick_to_import(module: str, command: Command) -> None:
    probe = (
        f"import sys; import {module}\n"
        "heavy = {'numpy', 'PIL', 'onnxruntime', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert command(module, "--help").returncode == 0
