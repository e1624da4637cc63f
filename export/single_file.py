"""The whole picture in one ONNX file: python -m export.single_file build/mnist picture.onnx.

For programs in any language: what ONNX Runtime, ONNX Runtime Web or OpenVINO loads needs nothing of
ours. Sizes are free, and a batch takes one condition per image. It takes

    noise          float32 [B, C, H, W], standard normal
    condition      float32 [B, labels], 1 at each label of an image, all 0 for none
    guidance_scale float32 [], 1 is the condition alone
    size           int64 [2], height and width of the pictures
    table          float32 [S, 9], the solver's; left out, the one of these options

and gives pixels float32 [B, c, h, w] in [0, 1]. Where pixels are diffused there is no size, where a
model has no labels neither a condition nor guidance_scale. Pictures are decoded whole, so that
memory grows with their size: the runtime draws in tiles.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from export.picture_functions import COLUMNS
from export.picture_graph import picture_graph, request_rows
from runtime import cli
from runtime.bundle.files import atomic_write, check_writable
from runtime.bundle.interface import Interface, ShiftedCosineData, Size, size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE, Array, Manifest
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime import load_library
from runtime.errors import ArtefactError
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.progress import Bar
from runtime.sampling.choices import SOLVER, SOLVERS, SPACINGS, WHOLE
from runtime.sampling.labels import Label, Labels
from runtime.sampling.request import Request

TOLERANCE = 1e-3  # of pixels in [0, 1]
# Latents that are compared, in multiples above the least legal side, and their pictures' sides
# beside the trained ones.
CASES = (((4, 8), 1.2), ((11, 6), 1.0), ((3, 2), 0.5))
SCALE = 3.0
log = logging.getLogger("runtime")


def single_file(args: argparse.Namespace) -> None:
    """Compose the file, compare its pictures with the runtime's, and only then write it."""
    check_writable(args.out)
    bundle = open_bundle(args.bundle, EngineOptions(threads=args.threads))
    request = Request([None], args.latent or bundle.interface.default_latent, **settings(args))
    bundle.check(request)
    manifest = bundle.manifest
    table = request_rows(request, manifest.schedule)
    if isinstance(manifest.schedule, ShiftedCosineData):
        log.warning(
            "the noise of %s depends on the size: the table inside is for pictures of as many "
            "pixels as %s has, others need their own",
            *(bundle.interface.name, size_name(request.latent)),
        )
    model = picture_graph(manifest, table, args.open_table, args.half)
    describe(model, manifest, request)
    data = model.SerializeToString(deterministic=True)
    error = compare(bundle, data, table, settings(args))
    with atomic_write(args.out) as file:
        file.write(data)
    size = cli.binary_size(len(data))
    print(f"{args.out} ({size}, furthest from the runtime's pictures by {error:.1e})")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What of a request decides the table."""
    names = ("solver", "steps", "spacing", "guidance_interval")
    return {name: getattr(args, name) for name in names}


def describe(model: onnx.ModelProto, manifest: Manifest, request: Request) -> None:
    """Put into the model what a program may want to know: labels, legal sizes, where it is from."""
    source = manifest.checkpoint
    known = {
        "interface": manifest.interface,
        "table": {
            "columns": COLUMNS,
            "solver": request.solver,
            "spacing": request.spacing,
            "steps": request.count,
            "guidance_interval": request.guidance_interval,
            "latent": request.latent,
        },
        "manifest": manifest.sha256,
        "checkpoint": source and source.sha256,
    }
    onnx.helper.set_model_props(
        model, {k: msgspec.json.encode(v).decode() for k, v in known.items()}
    )


def compare(bundle: Bundle, model: bytes, table: Array, settings: dict[str, Any]) -> float:
    """The largest difference from the runtime's pixels, in [0, 1]; raises ArtefactError."""
    library, interface = load_library(), bundle.interface
    options = library.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = bundle.options.threads, 3
    session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    labels: list[Label] = [len(interface.labels) - 1 if interface.labels else None, None]
    worst = 0.0
    for latent, image in Bar(sizes(interface), desc="compare", unit="size"):
        request = Request(labels, latent, image, guidance_scale=SCALE, **settings)
        own = request_rows(request, bundle.manifest.schedule)
        feeds = {name: value for name, value in inputs(bundle, request).items() if name in taken}
        if "table" in taken or not np.array_equal(own, table):
            feeds["table"] = own
        found = session.run(["pixels"], feeds)[0]
        wanted = bundle.decode(bundle.diffuse(request), image, exact=True)
        error = float(np.abs(found - (wanted + 1) / 2).max())
        if not error <= TOLERANCE:
            raise ArtefactError(
                f"the picture of {size_name(image)} from a latent of {size_name(latent)} differs "
                f"from the runtime's by {error:.1e}; expected at most {TOLERANCE:.0e}. Nothing is "
                "written: is the bundle whole? python -m runtime.inspect says"
            )
        worst = max(worst, error)
    return worst


def sizes(interface: Interface) -> list[tuple[Size, Size]]:
    """Latents, none of which an export traces a graph at, and their pictures' sizes."""
    sides, found = interface.latent_sides, []
    for cells, share in CASES:
        height, width = (sides.minimum + count * sides.multiple for count in cells)
        latent = sides.nearest(height), sides.nearest(width)
        image = interface.image_size(latent)
        if interface.decoupled:
            tall, wide = (interface.image_sides.nearest(round(side * share)) for side in image)
            image = tall, wide
        found.append((latent, image))
    return found


def inputs(bundle: Bundle, request: Request) -> dict[str, Array]:
    """What any single file takes for a request that has an image size, each label being one."""
    labels = Labels(bundle.interface.labels, bundle.interface.parts)
    condition = np.zeros((len(request.labels), len(labels.names)), np.float32)
    for row, each in zip(condition, labels.of_images(request.labels), strict=True):
        for numbers, weight in each.items():
            row[[*numbers]] = weight
    return {
        "noise": bundle.diffuser.noise(request, request.latent).draw(),
        "condition": condition,
        "guidance_scale": np.array(request.scale(bundle.interface), np.float32),
        "size": np.array(request.image, np.int64),
    }


def onnx_name(text: str) -> Path:
    """The path of a file to write; raises ArgumentTypeError where its name is no ONNX file's."""
    if not text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a name that ends in .onnx")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    found = cli.parser("export.single_file", __doc__)
    add = found.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="a bundle's folder")
    add("out", type=onnx_name, help="the file to write, NAME.onnx")
    add("--half", action="store_true", help="store as fp16 what it holds exactly, cast inside")
    add("--solver", choices=tuple(SOLVERS), default=SOLVER, help="of the table inside")
    add("--steps", type=cli.number(1, 10_000, int), help="its evaluations (the solver's own)")
    add("--spacing", choices=SPACINGS, help="what its steps are even in (the solver's own)")
    interval = "t within which guidance_scale counts, else it is 1"
    add("--guidance-interval", type=cli.interval, default=WHOLE, metavar="LOW..HIGH", help=interval)
    of = "HxW of the pictures that the table is for, where noise depends on it (the default latent)"
    add("--latent", type=cli.size, help=of)
    never = "make table an input that must be given: OpenVINO and browsers know no optional ones"
    add("--open-table", action="store_true", help=never)
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    return found


if __name__ == "__main__":
    cli.run(single_file, parser())
