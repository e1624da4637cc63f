"""Decoding an image of any size in tiles: time and memory beside PyTorch, errors, bytes per pixel.

python -m benchmarks.decode [--parts speed,large,sample,memory]

- speed: published width, random weights, a 64x64 latent to 1024x1024: PyTorch eager, tiles with
  sampled ratios, and exact tiles with --exact; each in a process of its own, peak memory as the
  system counts it. PyTorch takes a minute and 11 GB there.
- large: the shipped model draws a PNG of 4096x4096.
- sample: how far the sampled ratios leave the shipped model's images from the untiled ones.
- exact: how far --exact and the untiled graph are from the same decode in float64, in PyTorch.
- memory: float32 arrays of the model's width that each graph holds per pixel, which is what
  ARRAYS_PER_PIXEL of export/families/r2/bundle.py was set by.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import random_latent
from export.families.r2.bundle import ARRAYS_PER_PIXEL
from runtime import cli, open_bundle
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE, GraphSpec, Manifest
from runtime.coordinates import Grid, grid
from runtime.engines import EngineOptions
from runtime.images.pixels import save_rows, to_uint8
from runtime.memory import peak_resident, resident
from runtime.pipeline import tiles
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.tiler import GRN_EPSILON
from runtime.sampling.request import Request

Size = tuple[int, int]
PEAK = 2.0  # pixels live in [-1, 1]
LABELS = [3, 7]  # of the shipped model's latents
SAMPLES = (64, 128, 256)
GRAPH_PIXELS = 16384
RUNS = 3
TILE_ROWS = 32


def alone(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What `work` returns in a process of its own, its seconds and the process's peak bytes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measured, work).result()


def _measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, peak_resident()


def published() -> Any:
    """The published configuration with random weights, the same in every process."""
    from reference.train import build_models, read_config

    return build_models(read_config("published"), "published").eval().requires_grad_(False)


def export_published(folder: Path, make: Callable[[], Any] = published) -> None:
    """The graphs of the published width, or of models of R2 that `make` makes, as a bundle."""
    from export.families.r2 import bundle as r2
    from export.graph_files import for_cpu, spec_of
    from export.to_onnx import onnx_from_source

    models = make()
    graphs: dict[str, GraphSpec] = {}
    own: dict[str, GraphSpec] = {}
    interface = r2.interface(models, ())
    for source in r2.sources(models):
        plain = onnx_from_source(source)
        for forms, name, model in (
            (graphs, source.name, plain),
            (own, f"{source.name}.cpu", for_cpu(plain)),
        ):
            if model is not None:
                data = model.SerializeToString()
                (folder / f"{name}.onnx").write_bytes(data)
                forms[source.name] = spec_of(source, data, f"{name}.onnx", interface)
    schedule = r2.schedule(models)
    Manifest(interface, schedule, None, {}, None, graphs, for_cpu=own).write(folder)


def torch_decode(latent: Size, size: Size, threads: int) -> np.ndarray:
    """Pixels of PyTorch eager."""
    import torch

    torch.set_num_threads(threads)
    models = published()
    with torch.inference_mode():
        values = torch.from_numpy(random_latent(models.config.r2ir.latent_channels, latent))
        return models.r2ir.decode(values, size).numpy()


def tiled_decode(
    bundle: Path, latent: Size, size: Size, threads: int, exact: bool, memory: int
) -> np.ndarray:
    """Pixels of our tiles."""
    pipeline = open_bundle(bundle, EngineOptions(threads=threads))
    values = random_latent(pipeline.interface.latent_channels, latent)
    return pipeline.decode(values, size, exact=exact, memory=memory)


def speed(args: argparse.Namespace) -> None:
    """Seconds and peak memory of every contender, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        alone(partial(export_published, Path(folder)))
        ours = partial(tiled_decode, Path(folder), args.latent, args.size, args.threads)
        contenders: dict[str, Callable[[], Any]] = {
            "tiles": partial(ours, False, args.memory),
            "torch eager": partial(torch_decode, args.latent, args.size, args.threads),
            "tiles again": partial(ours, False, args.memory),
        }
        if args.exact:
            contenders["tiles, exact"] = partial(ours, True, args.memory)
        print(
            f"\npublished width, {size_name(args.latent)} latent -> {size_name(args.size)}",
            flush=True,
        )
        rows = {}
        for name, work in contenders.items():
            rows[name] = alone(work)
            print(f"  {name:12} {rows[name][1]:7.2f} s {rows[name][2] / 1e6:7.0f} MB", flush=True)
    wanted, slowest, largest = rows["torch eager"]
    print("against torch eager: times as fast, share of its memory, error")
    for name, (pixels, seconds, peak) in rows.items():
        print(
            f"  {name:12} {slowest / seconds:6.2f}×  1/{largest / peak:.1f}  "
            f"{errors(pixels, wanted)}"
        )


def errors(found: np.ndarray, wanted: np.ndarray) -> str:
    """Largest difference and PSNR over the range of pixels."""
    difference = found.astype(np.float64) - wanted
    square = np.square(difference).mean()
    psnr = 10 * np.log10(PEAK**2 / square) if square else np.inf
    return f"max error {np.abs(difference).max():.1e}, PSNR {psnr:.1f} dB"


def large(args: argparse.Namespace) -> None:
    """Seconds and peak memory of a PNG that is drawn from a latent of the shipped model."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "large.png"
        work = partial(draw_png, args.bundle, args.large, path, args.threads, args.memory)
        _, seconds, peak = alone(work)
        written = path.stat().st_size
    print(
        f"\nshipped model -> {size_name(args.large)} PNG: {seconds:.1f} s, "
        f"{peak / 1e6:.0f} MB at most with --memory {args.memory / 1e6:.0f}MB, "
        f"{written / 1e6:.1f} MB written"
    )


def draw_png(bundle: Path, size: Size, path: Path, threads: int, memory: int) -> None:
    """One image of the shipped model, from noise to file."""
    pipeline = open_bundle(bundle, EngineOptions(threads=threads))
    x = pipeline.diffuse(Request(LABELS[:1], pipeline.interface.default_latent, steps=20))
    bands = map(to_uint8, pipeline.resampler.draw(pipeline.state(x), size, memory=memory))
    save_rows(path, bands, (*size, pipeline.interface.color_channels), {})


def sample(args: argparse.Namespace) -> None:
    """Errors of ratios from samples of the shipped model's pixels against the untiled decode."""
    pipeline = open_bundle(args.bundle, EngineOptions(threads=args.threads))
    made = pipeline.generate(LABELS, steps=20, image=(8, 8))
    print("\nratios of a sample, shipped model, against the untiled decode")
    for side in (512, 1024):
        for latent in np.split(made.latents, len(LABELS)):
            sums = pipeline.state(latent).one(0)
            inputs = {"coordinates": grid(side, side), **sums}
            wanted = pipeline.engines.open("r2ir_decode").run(inputs)["pixels"]
            for count in SAMPLES:
                for kind, places in (("one per cell", cells), ("rows × columns", crossed)):
                    at = Grid(side, side).at(*places((side, side), count))
                    ratios = pipeline.engines.open("r2ir_decode").run({"coordinates": at, **sums})
                    drawn = pipeline.engines.open("r2ir_render").run(
                        {**inputs, "response": ratios["response"]}
                    )
                    print(
                        f"  {side}x{side} {count:3}² {kind:14} {errors(drawn['pixels'], wanted)}",
                        flush=True,
                    )


def exact(args: argparse.Namespace) -> None:
    """Errors of exact tiles and of the untiled graph, both in float32, against float64."""
    pipeline = open_bundle(args.bundle, EngineOptions(threads=args.threads))
    made = pipeline.generate(LABELS[:1], steps=20, image=(8, 8))
    sums = pipeline.state(made.latents).one(0)
    print("\nshipped model against float64")
    for side in (512, 1024):
        rows, wanted = in_float64(args.checkpoint, sums, side)
        inputs = {"coordinates": grid(side, side), **sums}
        found = {
            "--exact": pipeline.decode(made.latents, (side, side), exact=True),
            "untiled": pipeline.engines.open("r2ir_decode").run(inputs)["pixels"],
        }
        for name, pixels in found.items():
            print(f"  {side}x{side} {name} {errors(pixels[:, :, rows], wanted)}", flush=True)


def in_float64(
    checkpoint: Path | None, sums: dict[str, np.ndarray], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of an image, and their pixels `[1, c, rows, side]` with all ratios in float64.

    Features are of float32 coordinates: the last bit of a coordinate shows at the top frequency.
    """
    import torch

    from export.families.r2 import graphs
    from reference.checkpoint import SHIPPED, load

    models = load(checkpoint or SHIPPED).models.double()
    ratios = graphs.Response(models, "image").double()
    render = graphs.Render(models, "image").double()
    models.r2ir.position.register_forward_hook(lambda module, given, made: made.double())
    kv, k = (torch.from_numpy(sums[name]).double() for name in ("kv", "k"))
    response = torch.ones(1, k.shape[1], 2, k.shape[2]).double()
    place, tops = Grid(side, side), range(0, side, TILE_ROWS)

    def at(top: int, count: int) -> torch.Tensor:
        return torch.from_numpy(place.window(top, 0, count, side)).double()

    with torch.inference_mode():
        for site in range(2 * k.shape[1]):
            squares = sum(ratios(at(top, TILE_ROWS), kv, k, response)[site] for top in tops)
            root = (squares / len(tops)).sqrt()
            response[:, site // 2, site % 2] = root / (root.mean() + GRN_EPSILON)
        drawn = [render(at(top, 1), kv, k, response) for top in tops]
    return np.array(tops), torch.cat(drawn, 2).numpy()


cells = tiles.sample_places


def crossed(size: Size, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The alternative: one row per stratum of rows, one column per stratum of columns."""
    rows = tiles.sample_places((size[0], side), side)[0][:, :1]
    columns = tiles.sample_places((side, size[1]), side)[1][:1]
    return np.broadcast_arrays(rows, columns)  # type: ignore[return-value]


def memory(args: argparse.Namespace) -> None:
    """What each graph of the shipped model and of the published width holds per pixel."""
    with tempfile.TemporaryDirectory() as name:
        alone(partial(export_published, Path(name)))
        print("\nfloat32 arrays of the model's width per pixel, at the peak of a graph")
        for graph in ARRAYS_PER_PIXEL:
            found = [
                alone(partial(arrays_per_pixel, bundle, graph, args.threads))[0]
                for bundle in (args.bundle, Path(name))
            ]
            own = ARRAYS_PER_PIXEL[graph]
            print(f"  {graph:20} {found[0]:5.1f} {found[1]:5.1f}  ARRAYS_PER_PIXEL {own}")


def arrays_per_pixel(bundle: Path, graph: str, threads: int) -> float:
    """Growth of the peak by runs of a graph, in arrays of its width per pixel.

    Several runs, since ONNX Runtime's second one plans its memory anew beside the first one's.
    """
    pipeline = open_bundle(bundle, EngineOptions(threads=threads))
    engine = pipeline.engines.open(graph)
    inputs = graph_inputs(pipeline, graph)
    before = resident()
    manifest = pipeline.manifest
    outputs = [manifest.graph(graph).outputs[-1].name]
    width = manifest.graph(graph).floats_per_pixel / ARRAYS_PER_PIXEL[graph]
    for _ in range(RUNS):
        engine.run(inputs, outputs if graph == "r2ir_response" else None)
    peak = peak_resident()
    return (peak - before) / GRAPH_PIXELS / 4 / width


def graph_inputs(pipeline: Bundle, graph: str) -> dict[str, np.ndarray]:
    """Inputs of a graph of R2IR on GRAPH_PIXELS pixels or cells."""
    side = int(GRAPH_PIXELS**0.5)
    sizes = {"batch": 1, "height": side, "width": side}
    specs = pipeline.manifest.graph(graph).inputs
    inputs = {spec.name: np.ones(spec.shape(sizes), np.float32) for spec in specs}
    return inputs | {"coordinates": grid(side, side)}


PARTS = {"speed": speed, "large": large, "sample": sample, "exact": exact, "memory": memory}


def parts(names: str) -> list[str]:
    """Parts separated by commas."""
    found = names.split(",")
    if not set(found) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{names!r}; expected some of {','.join(PARTS)}")
    return found


def run(args: argparse.Namespace) -> None:
    """Every part that was asked for."""
    for part in args.parts:
        PARTS[part](args)


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.decode", __doc__)
    p.add_argument("--parts", type=parts, default=list(PARTS))
    p.add_argument("--latent", type=cli.size, default=(64, 64))
    p.add_argument("--size", type=cli.size, default=(1024, 1024))
    p.add_argument("--large", type=cli.size, default=(4096, 4096))
    p.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="of the shipped model")
    p.add_argument("--checkpoint", type=Path, help="what the bundle was made of (the shipped one)")
    p.add_argument("--threads", type=cli.number(1, 256, int), default=2)
    p.add_argument("--exact", action="store_true", help="time exact tiles, too")
    p.add_argument("--memory", type=cli.memory, default="500MB", help="limit of our process")
    cli.run(run, p)


if __name__ == "__main__":
    main()
