"""A bundle as a model repository of Triton: python -m serving.triton build/mnist REPOSITORY

Writes REPOSITORY/NAME: a decoupled model of Triton's Python backend, its configuration, and a copy
of the bundle. The Python that the backend runs needs this package; docs/serving.md says more.
"""

import argparse
import json
import tempfile
from pathlib import Path

import msgspec

from runtime import cli, open_bundle
from runtime.bundle.files import TEMPORARY_PREFIX, check_folder, read_bytes
from runtime.bundle.manifest import FILE_NAME, GraphSpec, Manifest, PlanSpec
from runtime.engines import EngineOptions
from runtime.errors import ResourceError
from runtime.providers import PROVIDERS
from serving.limits import Limits, add_limits
from serving.pictures import Model, check_name

BUNDLE = "bundle"  # the folder of a version that holds it
# Triton's types, and the shapes, -1 being any length. Labels are the UTF-8 of what --label takes:
# strings are read by the backend's own conversion alone, which ends where it meets numpy 2.
INPUTS: dict[str, tuple[str, list[int]]] = {
    "labels": ("UINT8", [-1]),
    "count": ("INT32", [1]),
    "latent": ("INT32", [2]),
    "image": ("INT32", [2]),
    "steps": ("INT32", [1]),
    "guidance_scale": ("FP64", [1]),
    "seed": ("INT64", [1]),
    "first_index": ("INT64", [1]),
    "previews": ("INT32", [1]),
}
# Of each response; it holds a preview or, at last, the pixels, both `[h, w, c]`.
OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "number": ("INT32", [1]),
    "step": ("INT32", [1]),
    "seed": ("INT64", [1]),
    "preview": ("UINT8", [-1, -1, -1]),
    "pixels": ("UINT8", [-1, -1, -1]),
}
MODEL = '''"""Written by python -m serving.triton."""

from serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def configuration(name: str, instances: int, options: EngineOptions, limits: Limits) -> str:
    """The model's config.pbtxt, in protobuf's text format.

    max_batch_size is 0: requests of several sizes have no common batch, and one request's labels
    are diffused together where that is faster.
    """
    kind = "KIND_GPU" if PROVIDERS[options.provider].device == "cuda" else "KIND_CPU"
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
    ]
    for field, tensors in (("input", INPUTS), ("output", OUTPUTS)):
        optional = " optional: true" if field == "input" else ""
        lines += [
            f'{field} {{ name: "{own}" data_type: TYPE_{kind} dims: {dims}{optional} }}'
            for own, (kind, dims) in tensors.items()
        ]
    for key, value in (("engine", options), ("limits", limits)):
        # Quoted as protobuf quotes too: a JSON has no control characters.
        text = json.dumps(msgspec.json.encode(value).decode(), ensure_ascii=False)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}')
    return "\n".join(lines) + "\n"


def copy_bundle(manifest: Manifest, folder: Path) -> None:
    """The files that a manifest names, each checked; raises ArtefactError, ResourceError."""
    folder.mkdir()
    graphs: list[GraphSpec | PlanSpec] = [spec for _, spec in manifest.forms()]
    for spec in (*graphs, *manifest.plans.values()):
        (folder / spec.file).write_bytes(manifest.file_bytes(spec))
    own = read_bytes(manifest.folder / FILE_NAME, "a bundle's manifest", "Make the bundle again")
    (folder / FILE_NAME).write_bytes(own)


def triton(args: argparse.Namespace) -> None:
    """Check the bundle, write the model beside its place, and put it there whole."""
    args.threads = args.threads or 1
    bundle = open_bundle(args.bundle, cli.engine_options(args))
    name = args.name or bundle.manifest.folder.resolve().name
    check_name("--name", name)
    place: Path = args.repository / name
    if place.exists():
        raise ResourceError(f"{place}: is there already. Remove it, or pass another --name")
    Model(name, bundle).open()
    most = args.max_pixels, args.max_cells, args.max_steps, args.max_images
    limits = Limits(*most, batch=args.batch)
    try:
        args.repository.mkdir(parents=True, exist_ok=True)
        check_folder(args.repository)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=args.repository) as scratch:
            version = Path(scratch, name, "1")
            version.mkdir(parents=True)
            copy_bundle(bundle.manifest, version / BUNDLE)
            (version / "model.py").write_text(MODEL)
            text = configuration(name, args.instances, bundle.options, limits)
            (version.parent / "config.pbtxt").write_text(text, "utf-8")
            version.parent.rename(place)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(f"{args.repository}: cannot be written ({error.strerror})") from None
    print(f"{place}: a model of Triton, {args.instances} instances")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("serving.triton", __doc__)
    add = p.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or a plan in it")
    add("repository", type=Path, metavar="REPOSITORY", help="folder that tritonserver is given")
    add("--name", help="of the model in requests (the bundle's folder's)")
    each = "processes that draw, each with the bundle open; of each GPU with cuda (1)"
    add("--instances", type=cli.number(1, 1024, int), default=1, help=each)
    add_limits(p, "--batch", "--max-images", "--max-pixels", "--max-cells", "--max-steps")
    cli.add_provider_options(p)
    return p


if __name__ == "__main__":
    cli.run(triton, parser())
