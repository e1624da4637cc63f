"""A bundle with plans, and the simulated machine that runs them."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import PlanSpec, read_manifest
from runtime.engines import kernels, tensorrt
from runtime.pipeline.bundle import Bundle
from tests.runtime.simulated import Library, simulate

LIMITS = {"batch": (1, 2, 8), "conditions": (1, 2, 11), "steps": (1, 11, 99)}
SIDES = ((1, 4, 8), (1, 16, 64))


@pytest.fixture
def planned(own_bundle: Path) -> Path:
    """The tiny bundle with plans that the simulated library can read: its own graphs."""
    manifest = read_manifest(own_bundle)
    plans = {}
    for name, spec in manifest.graphs.items():
        data = manifest.file_bytes(spec)
        (own_bundle / f"{name}.plan").write_bytes(data)
        profiles = tuple({axis: LIMITS.get(axis, sides) for axis in spec.ranges} for sides in SIDES)
        plans[f"{name}.plan"] = PlanSpec(
            file=f"{name}.plan",
            sha256=sha256(data),
            graph=name,
            precision="fp32",
            source_sha256=spec.sha256,
            flavour="tensorrt_rtx",
            version="9.9",
            targets=("sm89", "sm120"),
            platform=tensorrt.platform_name(),
            profiles=profiles,
            build_seconds=1.0,
            bytes=len(data),
        )
    replace(manifest, plans=plans).write(own_bundle)
    return own_bundle


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    """A machine with a GPU of sm89 and TensorRT for RTX 9.9, simulated."""
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "cache"))
    return simulate(monkeypatch)


def opened(planned: Path) -> Bundle:
    """The bundle by its plans."""
    return open_bundle(planned / "r2id.plan")
