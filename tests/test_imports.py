"""The import rules of the architecture, proved by reading the code and by running it bare."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "serving", "reference", "export", "calibration")
# What a package may import of ours, besides itself.
ALLOWED = {
    "runtime": set(),
    "serving": {"runtime"},
    "reference": {"runtime"},
    "export": {"runtime", "reference"},
    "calibration": {"runtime"},
}
FAMILIES = re.compile(r"r2i[rd]|siid|s2id|hdit|sid2", re.IGNORECASE)
COMFYUI = "serving/comfyui/"  # whose pictures are torch tensors
TENSORRT = {"export/plans.py", "runtime/engines/tensorrt.py"}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/")[0]
    found = imported(path)
    assert found & set(PACKAGES) <= ALLOWED[package] | {package}
    if package in ("runtime", "serving", "calibration") and not name.startswith(COMFYUI):
        assert not found & {"torch", "onnxscript"}
    if name not in TENSORRT:
        assert not found & {"tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda p: p.stem)
def test_the_runtime_names_no_family(path: Path) -> None:
    """Families stand in manifests; a user-facing default file name is none."""
    lines = [line for line in path.read_text().splitlines() if "DEFAULT_ENGINE = " not in line]
    found = [line for line in lines if FAMILIES.search(line)]
    assert not found


def test_the_runtime_imports_nothing_heavy() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "runtime").rglob("*.py"))
    ]
    probe = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'PIL', 'tensorrt', 'tensorrt_rtx'}\n"
        "heavy |= {'cuda'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
