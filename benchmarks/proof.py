"""A configuration of R2 with random weights through everything: python -m benchmarks.proof large

Every graph is exported; then, each in a process of its own, one step of a guided pair at two sizes
and one decode at each on ONNX Runtime and OpenVINO, compared with PyTorch, and a plan of the step
graph for sm120. Prints a table of seconds, peak memory, errors and bytes. Parity at all sizes is
`python -m export`'s. The bundle stays in --out.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import apart
from benchmarks.contenders import ALPHA_BAR, LABEL, Size, build, random_latent
from runtime import cli, open_bundle
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import Array, relative_error
from runtime.engines import EngineOptions
from runtime.memory import peak_resident
from runtime.progress import Bar

ENGINES = ("cpu", "openvino")
TARGET = "sm120"
Found = dict[str, Any]


def conditions(labels: int) -> Array:
    """The null condition and one label, `[2, 1, labels]`."""
    found = np.zeros((2, 1, labels), np.float32)
    found[1, 0, LABEL % labels] = 1
    return found


def exported(folder: Path, config: str) -> Iterator[Found]:
    """Write the bundle: seconds, peak, bytes of all graphs and of the largest."""
    from benchmarks.decode import export_published

    start = time.perf_counter()
    export_published(folder, partial(build, config))
    seconds = time.perf_counter() - start
    sizes = [path.stat().st_size for path in folder.glob("*.onnx")]
    note = f"{sum(sizes) / 1e9:.2f} GB in all, the largest graph {max(sizes) / 1e9:.2f} GB"
    yield {"what": "export", "seconds": seconds, "peak": peak_resident(), "note": note}


def in_torch(config: str, sizes: list[Size], threads: int, path: Path) -> Iterator[Found]:
    """The reference's steps and decodes, kept in a file."""
    import torch

    torch.set_num_threads(threads)
    yield from reference_runs(build(config), sizes, path)
    yield {"what": "PyTorch", "peak": peak_resident()}


def reference_runs(models: Any, sizes: list[Size], path: Path) -> Iterator[Found]:
    """The same of models."""
    import torch

    config, arrays = models.config, {}
    denoise = models.denoiser(torch.from_numpy(conditions(config.labels)), np.array([ALPHA_BAR]))
    for size in sizes:
        latent = torch.from_numpy(random_latent(config.r2ir.latent_channels, size))
        height, width = (side * config.pixels_per_latent for side in size)
        runs = {
            "step": partial(denoise, latent, 0),
            "decode": partial(models.r2ir.decode, latent, (height, width)),
        }
        for what, run in runs.items():
            name, start = f"{what} {size_name(size)}", time.perf_counter()
            with torch.inference_mode():
                arrays[name] = run().numpy()
            yield {"what": f"{name}, PyTorch", "seconds": time.perf_counter() - start}
    np.savez(path, **arrays)


def on_engine(folder: Path, provider: str, sizes: list[Size], threads: int, path: Path) -> Any:
    """The same by the bundle's graphs, each as it is when it runs again, with its error."""
    wanted = np.load(path)
    bundle = open_bundle(folder, EngineOptions(provider, threads=threads))
    own, image = conditions(len(bundle.interface.labels)), bundle.interface.image_size
    for size in sizes:
        latent = random_latent(bundle.interface.latent_channels, size)
        runs = {
            "step": partial(bundle.denoise, latent, ALPHA_BAR, own),
            "decode": partial(bundle.decode, latent, image(size)),
        }
        for what, run in runs.items():
            run()
            start = time.perf_counter()
            found = run()
            seconds = time.perf_counter() - start
            name = f"{what} {size_name(size)}"
            error = relative_error(found, wanted[name])
            row = {"what": f"{name}, {provider}", "seconds": seconds, "note": f"{error:.1e}"}
            yield {**row, "error": error, "peak": peak_resident()}


def planned(folder: Path, size: Size) -> Iterator[Found]:
    """A plan of the step graph, from the least size to `size`."""
    from export import to_plan
    from runtime.bundle.manifest import read_manifest

    name = read_manifest(folder).step_graph
    words = ["--target", TARGET, "--graphs", name, "--latent", f"1x1..{size_name(size)}"]
    words += ["--profiles", "1", "--conditions", "2", "--batch", "1"]
    start = time.perf_counter()
    to_plan.build(to_plan.parser().parse_args([str(folder), *words]))
    seconds = time.perf_counter() - start
    plan = read_manifest(folder).plan(name)
    assert plan is not None
    row = {"what": f"plan of {name} for {TARGET}", "seconds": seconds, "peak": peak_resident()}
    yield {**row, "note": f"{plan.bytes / 1e9:.2f} GB"}


def proof(args: argparse.Namespace) -> None:
    """Every stage in turn; one that fails is a line with its reason."""
    make_folder(args.out)
    rows: list[list[object]] = [["", "seconds", "peak GB", "error or bytes"]]
    with tempfile.TemporaryDirectory() as name:
        path, given = Path(name) / "torch.npz", (args.sizes, args.threads)
        stages: list[tuple[Any, ...]] = [
            (exported, args.out, args.config),
            (in_torch, args.config, *given, path),
            *((on_engine, args.out, engine, *given, path) for engine in ENGINES),
            (planned, args.out, args.sizes[-1]),
        ]
        for work, *own in Bar(stages, desc=args.config, unit="stage"):
            for found in apart.items(work, *own):
                rows.append(row_of(work.__name__, found))
                Bar.write("  ".join(map(str, rows[-1])), sys.stdout)
    print(cli.table(rows))


def row_of(stage: str, found: Found | apart.Failure) -> list[object]:
    """A row of the table."""
    if isinstance(found, apart.Failure):
        return [stage, "", "", found.reason]
    seconds = f"{found['seconds']:.1f}" if "seconds" in found else ""
    peak = f"{found['peak'] / 1e9:.2f}" if "peak" in found else ""
    return [found["what"], seconds, peak, found.get("note", "")]


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.proof", __doc__)
    add = p.add_argument
    add("config", nargs="?", default="large", help="in reference/configs (large)")
    add("--sizes", type=cli.sizes, default=[(8, 8), (16, 24)], help="of latents (8x8,16x24)")
    add("--threads", type=cli.number(1, 256, int), default=2, help="of each engine (2)")
    add("--out", type=Path, default=Path("build/proof"), help="folder of the bundle")
    cli.run(proof, p)


if __name__ == "__main__":
    main()
