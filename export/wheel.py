"""A wheel of the runtime alone, the shipped bundle inside: python -m export.wheel build/mnist.

Weights that are half numbers are stored as such and cast in the graph, so that the wheel is small
and draws the very same pictures.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import helper, numpy_helper

from runtime import cli
from runtime.bundle.files import check_writable, sha256
from runtime.bundle.manifest import (
    DEFAULT_BUNDLE,
    SHIPPED,
    GraphSpec,
    Manifest,
    find_bundle,
    read_manifest,
)
from runtime.errors import IncompatibleError, ResourceError

ROOT = Path(__file__).parents[1]
NAME, COMMAND = "r2-edge-runtime", "r2-edge"
LARGEST = 12_000_000  # bytes of the wheel
SMALLEST = 64  # elements of a constant that is worth a cast


def wheel(args: argparse.Namespace) -> None:
    """Gather the runtime, its bundle and its metadata in a folder, and let pip make a wheel."""
    manifest = read_manifest(find_bundle(args.bundle))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out / "wheel")
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "made")
        ignored = shutil.ignore_patterns("__pycache__", SHIPPED.name)
        shutil.copytree(ROOT / "runtime", source / "runtime", ignore=ignored)
        for name in ("README.md", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / name, source)
        (source / "pyproject.toml").write_text(described(project))
        for whole in (True, False):
            slim(manifest, source / "runtime" / SHIPPED.name, whole)
            built = build(source, made)
            if built.stat().st_size <= LARGEST:
                break
        else:
            raise ResourceError(
                f"{built.name}: {built.stat().st_size} bytes; expected at most {LARGEST}. Choose a "
                "smaller model's bundle"
            )
        shutil.copy(built, args.out)
    found = args.out / built.name
    print(f"wheel: {found} ({cli.binary_size(found.stat().st_size)})")


def build(source: Path, out: Path) -> Path:
    """The wheel of a project's folder, in the environment as it is; raises IncompatibleError."""
    for made in (out, source / "build"):  # setuptools would pack what it finds of an earlier wheel
        shutil.rmtree(made, ignore_errors=True)
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*line, "--wheel-dir", str(out), str(source)], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise IncompatibleError(
            f"pip makes no wheel ({said}); expected setuptools here. Install it with: "
            "python -m pip install setuptools"
        )
    return next(out.glob("*.whl"))


def slim(manifest: Manifest, folder: Path, for_cpu: bool) -> Manifest:
    """A bundle's fp32 graphs in `folder`, their halves stored as such.

    `for_cpu`: with the forms for processors too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def stored(spec: GraphSpec) -> GraphSpec:
        data = halved(onnx.load_from_string(manifest.file_bytes(spec))).SerializeToString(
            deterministic=True
        )
        (folder / spec.file).write_bytes(data)
        return replace(spec, sha256=sha256(data))

    made = replace(
        manifest,
        graphs={name: stored(spec) for name, spec in manifest.graphs.items()},
        for_cpu={name: stored(spec) for name, spec in manifest.for_cpu.items() if for_cpu},
        variants={},
        plans={},
        folder=folder,
    )
    made.write(folder)
    return made


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose fp32 constants that fp16 holds exactly are fp16 and cast back."""
    slimmer = onnx.ModelProto()
    slimmer.CopyFrom(model)
    casts = []
    for tensor in slimmer.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if values.size < SMALLEST or not np.array_equal(halves.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *slimmer.graph.node]
    del slimmer.graph.node[:]
    slimmer.graph.node.extend(nodes)
    return slimmer


def described(project: dict[str, Any]) -> str:
    """The runtime's own pyproject.toml: of the toolkit's what a machine that draws needs."""
    extras = {
        name: project["optional-dependencies"][name]
        for name in ("cpu", "gpu", "openvino", "tensorrt", "tensorrt-rtx")
    }
    shared = {key: project[key] for key in ("version", "license", "requires-python", "readme")}
    fields = {
        "name": NAME,
        "description": "Draws images of any size from bundles of the R2 edge toolkit",
        **shared,
        "dependencies": project["dependencies"],
    }

    def lines(table: dict[str, Any]) -> str:
        return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())

    return "\n\n".join(
        (
            '[build-system]\nrequires = ["setuptools>=77"]\n'
            'build-backend = "setuptools.build_meta"',
            f"[project]\n{lines(fields)}",
            f"[project.scripts]\n{COMMAND} = {json.dumps('runtime.__main__:main')}",
            f"[project.optional-dependencies]\n{lines(extras)}",
            '[tool.setuptools.packages.find]\ninclude = ["runtime*"]',
            f'[tool.setuptools.package-data]\nruntime = ["{SHIPPED.name}/*"]\n',
        )
    )


def main() -> None:
    """The command line."""
    parser = cli.parser("export.wheel", __doc__)
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="the bundle to ship")
    add("--out", type=Path, default=Path("dist"), help="folder of the wheel")
    cli.run(wheel, parser)


if __name__ == "__main__":
    main()
