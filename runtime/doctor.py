"""What this machine can run, and what would install the rest: python -m runtime.doctor."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.errors import ToolkitError
from runtime.memory import memory
from runtime.providers import CUDA, PIP, PROVIDERS, TENSORRT, TENSORRT_RTX

if TYPE_CHECKING:
    from runtime.bundle.manifest import Manifest

# name -> module, the packages that bring it, the command that installs it
LIBRARIES = {
    "numpy": ("numpy", ("numpy",), f"{PIP} install 'numpy>=2.0'"),
    "pillow": ("PIL", ("pillow",), f"{PIP} install 'pillow>=12.2'"),
    "onnxruntime": (
        "onnxruntime",
        (
            *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
            "onnxruntime-trt-rtx",
        ),
        PROVIDERS["cpu"].install,
    ),
    "openvino": ("openvino", ("openvino",), PROVIDERS["openvino"].install),
    "tensorrt": ("tensorrt", ("tensorrt",), TENSORRT),
    "tensorrt_rtx": ("tensorrt_rtx", ("tensorrt-rtx",), TENSORRT_RTX),
    "cuda-python": ("cuda", ("cuda-python", "cuda-bindings"), CUDA),
}
DRIVER = "sudo ubuntu-drivers install, or https://www.nvidia.com/drivers"
GPU_FIELDS = {
    "name": "name",
    "compute_capability": "compute_cap",
    "memory_mib": "memory.total",
    "free_mib": "memory.free",
    "driver": "driver_version",
}
# Processor features that change what runs fast, as Linux spells them.
FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.doctor", __doc__)
    add = p.add_argument
    cli.add_bundle(p)
    add("--json", action="store_true", help="the same, for programs")
    return p


def doctor(args: argparse.Namespace) -> None:
    """Look at the machine and print what was found; what is missing is no error."""
    found = examine(args.bundle)
    print(json.dumps(found, indent=1) if args.json else as_text(found))


def examine(engine: Path) -> dict[str, Any]:
    """Everything that the command prints: plain dictionaries, lists, texts and numbers."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "memory": memory(),
        "libraries": {name: library(name) for name in LIBRARIES},
        "nvidia": nvidia(),
    }
    found["providers"] = providers(found["libraries"]["onnxruntime"])
    manifest, problem = bundle(engine)
    folder = manifest.folder if manifest else engine.parent
    while not folder.exists():
        folder = folder.parent
    found["bundle"] = {
        "folder": str(manifest.folder) if manifest else None,
        "problem": problem,
        "free_bytes": shutil.disk_usage(folder).free,
    }
    found["next"] = advice(found, manifest)
    return found


def library(name: str) -> dict[str, Any]:
    """The version of each package that brings a library, without importing it."""
    module, packages, install = LIBRARIES[name]
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    installed = importlib.util.find_spec(module) is not None
    return {"installed": installed, "packages": versions, "install": install}


def providers(onnxruntime: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whether each provider is here, in ONNX Runtime or by itself; it may yet fail to start."""
    built_in: list[str] = []
    if onnxruntime["installed"]:
        try:
            import onnxruntime as library

            built_in = library.get_available_providers()
        except Exception as error:  # whatever a broken installation raises
            onnxruntime["problem"] = f"cannot be imported ({error})"
    return {
        name: {
            "available": provider.ep_name in built_in
            or bool(provider.package and importlib.util.find_spec(provider.package))
            or bool(built_in and provider.plugin and importlib.util.find_spec(provider.plugin)),
            "install": provider.install,
        }
        for name, provider in PROVIDERS.items()
    }


def nvidia() -> dict[str, Any]:
    """The driver's version and each GPU, as nvidia-smi tells; `problem` where it does not."""
    query = f"--query-gpu={','.join(GPU_FIELDS.values())}"
    line = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return {"driver": None, "gpus": [], "problem": "no driver: nvidia-smi is not found"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"driver": None, "gpus": [], "problem": f"nvidia-smi cannot be run ({error})"}
    rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]
    gpus = [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]
    if done.returncode or not gpus:
        said = (done.stderr or done.stdout).strip().split("\n")[0] or f"exit code {done.returncode}"
        return {"driver": None, "gpus": [], "problem": f"nvidia-smi finds no GPU ({said})"}
    return {"driver": gpus[0]["driver"], "gpus": gpus, "problem": None}


def processor() -> dict[str, Any]:
    """Model, cores that this process may use, and features where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    entries = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    known = {key.strip().lower(): value.strip() for key, value in entries.items()}
    listed = known.get("flags", known.get("features", "")).split()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": known.get("model name") or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in listed] if listed else None,
    }


def bundle(engine: Path) -> "tuple[Manifest | None, str | None]":
    """The bundle's manifest, or what is wrong with it."""
    try:
        from runtime.bundle.manifest import find_bundle, read_manifest

        return read_manifest(find_bundle(engine)), None
    except (ToolkitError, ImportError) as error:
        return None, str(error)


def advice(found: dict[str, Any], manifest: "Manifest | None") -> list[str]:
    """The commands to type next, the first that is needed first."""
    for name in ("numpy", "pillow", "onnxruntime"):
        library = found["libraries"][name]
        if not library["installed"] or "problem" in library:
            return [library["install"]]
    if manifest is None:
        if importlib.util.find_spec("export"):
            return ["python -m export"]
        return ["python -m runtime.generate --engine FOLDER, that of a bundle's manifest.json"]
    gpus = found["nvidia"]["gpus"]
    step = manifest.step_graph
    start, rest = "python -m runtime.generate --engine", label_option(manifest)
    engine = f"{start} {manifest.folder / manifest.graphs[step].file}{rest}"
    able = [name for name, own in found["providers"].items() if own["available"]]
    if gpus:
        targets = {f"sm{gpu['compute_capability'].replace('.', '')}" for gpu in gpus}
        for file, plan in manifest.plans.items():
            installed = found["libraries"].get(plan.flavour, {}).get("installed")
            if plan.graph == step and installed and targets & set(plan.targets):
                return [f"{start} {manifest.folder / file}{rest}"]
        if "cuda" in able:
            return [f"{engine} --provider cuda"]
        return [engine, f"{PROVIDERS['cuda'].install} && {engine} --provider cuda"]
    best = next((name for name in ("directml", "coreml") if name in able), "cpu")
    return [f"{engine} --provider {best}"]


def label_option(manifest: "Manifest") -> str:
    """The option that draws the first few labels of a bundle, as text after an engine's name."""
    count = min(len(manifest.interface.first_part), 10)
    return f" --label 0-{count - 1}" if count else ""


def as_text(found: dict[str, Any]) -> str:
    """The findings as tables of at most 100 columns or one command wide."""
    machine, rest = machine_rows(found), [*library_rows(found), *provider_rows(found)]
    lines = [cli.table(machine, ""), "", cli.table([["", "here", "to install"], *rest], "")]
    return "\n".join([*lines, "", *(f"next: {command}" for command in found["next"])])


def machine_rows(found: dict[str, Any]) -> list[list[str]]:
    """Name and finding: the machine, its GPUs and the bundle."""
    cpu, store, gpu = found["processor"], found["memory"], found["nvidia"]
    features = "features unknown" if cpu["features"] is None else " ".join(cpu["features"])
    total, free = (cli.binary_size(n) if n else "unknown" for n in store.values())
    rows = [
        ["python", f"{found['python']} on {found['platform']}"],
        ["processor", f"{cpu['name']}, {cpu['cores']} cores, {features}"],
        ["memory", f"{total}, available {free}"],
        ["driver", gpu["driver"] or f"{gpu['problem']}"],
    ]
    if gpu["driver"] is None:
        rows.append(["", f"for an NVIDIA GPU: {DRIVER}"])
    for card in gpu["gpus"]:
        words = f"compute capability {card['compute_capability']}, {card['memory_mib']} MiB"
        rows.append(["GPU", f"{card['name']}, {words}, free {card['free_mib']} MiB"])
    own = found["bundle"]
    rows.append(["bundle", own["folder"] or own["problem"]])
    return [*rows, ["disk", f"{cli.binary_size(own['free_bytes'])} free there"]]


def library_rows(found: dict[str, Any]) -> list[list[str]]:
    """Name, version and the installing command of what is missing."""
    rows = []
    for name, own in found["libraries"].items():
        versions = [
            version if package == name else f"{package} {version}"
            for package, version in own["packages"].items()
        ]
        here = ", ".join(versions) or ("of unknown version" if own["installed"] else "missing")
        if name == "onnxruntime" and len(versions) > 1:
            here += ": they overwrite each other, keep one"
        command = "" if own["installed"] and "problem" not in own else own["install"]
        rows.append([name, own.get("problem", here), command])
    return rows


def provider_rows(found: dict[str, Any]) -> list[list[str]]:
    """Name, availability and the installing command of each provider that is missing."""
    system = {"directml": "win32", "coreml": "darwin"}
    return [
        [
            f"--provider {name}",
            "installed" if own["available"] else "missing",
            "" if own["available"] else own["install"],
        ]
        for name, own in found["providers"].items()
        if own["available"] or system.get(name, sys.platform) == sys.platform
    ]


if __name__ == "__main__":
    cli.run(doctor, parser())
