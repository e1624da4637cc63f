"""Everything that reads a file or a request, with whole ones that it reads."""

import asyncio
import base64
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from calibration.__main__ import coverage_text
from calibration.choices import Choice, Choices, read_choices, replayed
from calibration.quantize import layers
from calibration.samples import Settings, calibration_set, fingerprint, heavy, load
from reference import checkpoint, published
from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import GraphSpec, PlanSpec, read_manifest
from runtime.bundle.state import DecodeState
from runtime.engines import Engine, EngineOptions, tensorrt
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.openvino import OpenVinoEngine
from runtime.errors import ArtefactError
from runtime.generate import check_bundle, describe, request, resolve, settings
from runtime.generate import parser as options
from runtime.images.idx import read_idx
from runtime.images.picture import ImageFile
from runtime.images.pixels import png_bytes, save_png
from runtime.pipeline.bundle import Bundle
from runtime.sampling.request import Request
from serving.app import application
from serving.edits import read_edit
from serving.errors import ApiError
from serving.limits import Limits
from serving.pictures import Model
from serving.service import Service
from tests.conftest import TINY
from tests.fuzz.child import MEMORY
from tests.fuzz.damage import Sample
from tests.reference.families.golden import Golden
from tests.reference.test_run import Stopped
from tests.runtime.invented import write_bundle
from tests.runtime.simulated import simulate

ONE = EngineOptions(threads=1)
EDGE = 8  # pixels along a side of a whole picture
# A graph may ask for any memory, as a program may, and a library may end over what it is refused.
ROOM_OF_PROGRAMS = 4 << 30


@dataclass(frozen=True)
class Reader:
    """Whole files, and what reads a damaged one in the place of one of them.

    `read` gets that one's number; it raises a ToolkitError or nothing. `room`: the bytes of address
    space that it is left.
    """

    samples: list[Sample]
    read: Callable[[int, bytes], object]
    room: int = MEMORY


READERS: dict[str, Callable[[Path], Reader]] = {}


def reader(make: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    """Enter a reader under its function's name."""
    READERS[make.__name__] = make
    return make


def drawing() -> Bundle:
    """The tiny bundle, opened."""
    return open_bundle(TINY, ONE)


def grey(seed: int = 0) -> Any:
    """Noise, uint8 `[h, w, 1]`."""
    return np.random.default_rng(seed).integers(0, 256, (EDGE, EDGE + 2, 1), dtype=np.uint8)


@reader
def manifests(folder: Path) -> Reader:
    """manifest.json of two families, one with plans, as opening a bundle and asking it reads it."""
    decoupled, pixels = folder / "decoupled", folder / "pixels"
    shutil.copytree(TINY, decoupled)
    pixels.mkdir()
    write_bundle(pixels)
    manifest = read_manifest(decoupled)
    plans = {"r2id.plan": plan_of("r2id", manifest.graphs["r2id"], b"")}
    replace(manifest, plans=plans).write(decoupled)
    places = [decoupled / "manifest.json", pixels / "manifest.json"]

    def read(index: int, data: bytes) -> None:
        places[index].write_bytes(data)
        bundle = open_bundle(places[index].parent, ONE)
        bundle.check(Request([1, None], bundle.interface.default_latent))

    return Reader([Sample(path.read_bytes(), "json") for path in places], read)


def plan_of(name: str, spec: GraphSpec, data: bytes) -> PlanSpec:
    """A manifest's entry of a plan that is `data`."""
    profile = {axis: (sides.minimum, 2, 99) for axis, sides in spec.ranges.items()}
    return PlanSpec(
        f"{name}.plan",
        sha256(data),
        name,
        "fp32",
        spec.sha256,
        "tensorrt_rtx",
        "9.9",
        ("sm89",),
        tensorrt.platform_name(),
        (profile,),
        1.0,
        len(data),
    )


def graphs_by(
    folder: Path, names: Sequence[str], open_it: Callable[[GraphSpec, bytes, bool], Engine]
) -> Reader:
    """Graphs behind their right hashes, opened and run at their smallest sizes."""
    manifest = read_manifest(TINY)
    specs = [manifest.for_cpu.get(name, manifest.graphs[name]) for name in names]
    within = msgspec.structs.replace(manifest, folder=folder)

    def read(index: int, data: bytes) -> None:
        spec = replace(specs[index], sha256=sha256(data))
        (folder / spec.file).write_bytes(data)
        engine = open_it(spec, within.file_bytes(spec), names[index] in manifest.for_cpu)
        sizes = {axis: legal.minimum for axis, legal in spec.ranges.items()}
        found = engine.run({t.name: np.ones(t.shape(sizes), t.dtype) for t in spec.inputs})
        for tensor in spec.outputs:
            if found[tensor.name].shape != tensor.shape(sizes):
                raise AssertionError(f"{tensor.name} is {found[tensor.name].shape}")

    whole = [Sample(manifest.file_bytes(spec), "onnx") for spec in specs]
    return Reader(whole, read, ROOM_OF_PROGRAMS)


@reader
def graphs(folder: Path) -> Reader:
    """On ONNX Runtime; of two, the form for processors."""
    names = ("r2id_film", "r2id_condition", "r2ir_latent_summary", "r2ir_encode", "r2id")
    return graphs_by(folder, names, lambda s, d, own: OnnxRuntimeEngine(s, d, ONE, own))


@reader
def graphs_on_openvino(folder: Path) -> Reader:
    """Of those that it compiles soon."""
    options = EngineOptions("openvino", threads=1)
    names = ("r2id_position", "r2id_film")
    return graphs_by(folder, names, lambda s, d, _: OpenVinoEngine(s, d, options))


@reader
def plans(folder: Path) -> Reader:
    """Plans behind their right hash, of the real library and of the simulated one."""
    import tensorrt_rtx

    from export.plans import Job, PlanBuilder
    from runtime.progress import Bar

    manifest = read_manifest(TINY)
    name, spec = "r2id_position", manifest.graphs["r2id_position"]
    Bar.quiet = True
    with Bar(total=1) as bar:
        builder = PlanBuilder(tensorrt_rtx, "tensorrt_rtx", ("sm89",), folder, bar, 0)
        profile = {axis: (sides.minimum, 4, 64) for axis, sides in spec.ranges.items()}
        whole, made = builder.plan(Job(name, spec, manifest.file_bytes(spec), (profile,)))
    within = msgspec.structs.replace(manifest, folder=folder)
    # As on the simulated device: the graph itself.
    simulated = replace(made, flavour="tensorrt_rtx", version="9.9", profiles=(profile, profile))

    def read(index: int, data: bytes) -> None:
        (folder / made.file).write_bytes(data)
        plan = replace((made, simulated)[index], sha256=sha256(data))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt, "device_target", lambda: "sm89")
            if index:
                simulate(patch)
            tensorrt.TensorRTEngine(spec, plan, folder, within.file_bytes(plan))

    return Reader([Sample(whole), Sample(manifest.file_bytes(spec), "onnx")], read)


@reader
def checkpoints(folder: Path) -> Reader:
    """The tiny model's safetensors file."""
    path = folder / "a.safetensors"

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        checkpoint.load(path)

    return Reader([Sample((TINY / "tiny.safetensors").read_bytes(), "safetensors")], read)


@reader
def state_dicts(folder: Path) -> Reader:
    """Published files of three forms: both of a pair of pickles, one with a configuration in it."""
    paths = [folder / name for name in ("siid.pt", "text.pt", "hdit.safetensors")]
    golden, hdit = Golden("siid"), Golden("hdit").state("hour")
    for part, path in zip(("siid", "text"), paths, strict=False):
        torch.save({k: v.clone() for k, v in golden.state(part).tensors.items()}, path)
    from safetensors.torch import save_file

    tensors = {k: v.clone().contiguous() for k, v in hdit.tensors.items()}
    save_file(tensors, paths[2], {"config": json.dumps(hdit.settings)})
    whole = [path.read_bytes() for path in paths]
    out = folder / "out.safetensors"

    def read(index: int, data: bytes) -> None:
        for path, own in zip(paths, whole, strict=True):
            path.write_bytes(own)
        paths[index].write_bytes(data)
        line = [paths[2], out] if index == 2 else [*paths[:2], out, "--heads", 4, "--fold", 2]
        published.convert(published.parser().parse_args([*map(str, line), "--name", "own"]))

    forms = ("zip", "zip", "safetensors")
    return Reader([Sample(*pair) for pair in zip(whole, forms, strict=True)], read)


@reader
def decode_states(folder: Path) -> Reader:
    """A state of the tiny bundle, read and drawn from."""
    bundle, path = drawing(), folder / "a.npz"
    latent = np.zeros((2, bundle.interface.latent_channels, 2, 3), np.float32)
    bundle.state(latent, {"request": {"seed": 1}}).save(path)

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        bundle.render(DecodeState.load(path), (4, 4))

    return Reader([Sample(path.read_bytes(), "zip")], read)


@reader
def picture_metadata(folder: Path) -> Reader:
    """What --from-png reads of a PNG, a JPEG and a WebP, checked against the bundle."""
    bundle, paths = drawing(), [folder / f"a.{end}" for end in ("png", "jpg", "webp")]
    wanted = request(options().parse_args(["--label", "b,2+3"]))
    resolve(bundle, wanted, {})
    for path in paths:
        save_png(path, grey(), describe(bundle, wanted))

    def read(index: int, data: bytes) -> None:
        path = paths[index]
        path.write_bytes(data)
        asked = request(options().parse_args(["--from-png", str(path)]))
        check_bundle(bundle, path)
        resolve(bundle, asked, {})
        if len(asked["label"]) * asked["count"] < 100:
            bundle.check(Request(asked["label"], **settings(asked)), 8)

    forms = ("png", "bytes", "bytes")
    pairs = zip(paths, forms, strict=True)
    return Reader([Sample(path.read_bytes(), form) for path, form in pairs], read)


@reader
def idx_files(folder: Path) -> Reader:
    """IDX files, raw and packed."""
    import gzip

    whole = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (5, 4, 6)) + bytes(120)

    def read(index: int, data: bytes) -> None:
        name = f"a{index}"
        (folder / (name + ".gz" * index)).write_bytes(data)
        read_idx(folder / name)

    return Reader([Sample(whole), Sample(gzip.compress(whole), "gzip")], read)


@reader
def training_states(folder: Path) -> Reader:
    """A run's state and its log; a step is taken with what was read."""
    stopped = Stopped(folder)
    paths = [stopped.state, stopped.log]

    def read(index: int, data: bytes) -> None:
        for path, own in stopped.files.items():
            path.write_bytes(own)
        paths[index].write_bytes(data)
        stopped.resume()

    whole = [stopped.files[path] for path in paths]
    return Reader([Sample(whole[0], "safetensors"), Sample(whole[1])], read)


@reader
def choices(folder: Path) -> Reader:
    """A choice of layers, taken over."""
    manifest, path = read_manifest(TINY), folder / "choice.int8.json"
    own = {
        name: layers(onnx.load_model_from_string(manifest.file_bytes(spec)), spec)
        for name in heavy(manifest)
        for spec in [manifest.graph(name)]
    }
    made = {
        name: Choice((*found,)[:-1], (*found,)[-1:], dict.fromkeys(found, 0.1), 0.1, 0.2, 99.9)
        for name, found in own.items()
    }
    Choices(fingerprint(manifest), "int8", made).write(path)

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        found = read_choices(path, manifest)
        for name, choice in found.graphs.items():
            replayed(path, choice, name, own[name])

    return Reader([Sample(path.read_bytes(), "json")], read)


@reader
def calibration_caches(folder: Path) -> Reader:
    """Samples for calibration, counted."""
    few = Settings(((2, 2),), (0.0, 2.0), steps=3, every=1, pictures=1)
    manifest = read_manifest(TINY)
    calibration_set(manifest, few, folder, folder, None)
    (path,) = folder.glob("*.npz")

    def read(_: int, data: bytes) -> None:
        path.write_bytes(data)
        coverage_text(load(path, manifest))

    return Reader([Sample(path.read_bytes(), "zip")], read)


@reader
def pictures(folder: Path) -> Reader:
    """Files of the kinds that photographs come in, for a model in colour and a grey one."""
    colour = Image.fromarray(np.concatenate([grey(i) for i in range(3)], 2))
    clear = colour.copy()
    clear.putalpha(Image.fromarray(grey(4)[..., 0]))
    made = {
        "a.png": colour,
        "clear.png": clear,
        "keyed.png": colour.convert("P"),
        "a.jpg": colour,
        "a.webp": clear,
        "a.tif": colour,
        "a.gif": colour,
        "a.bmp": colour,
    }
    for name, picture in made.items():
        picture.save(folder / name)
    np.save(folder / "a.npy", grey())
    paths = [*(folder / name for name in made), folder / "a.npy"]

    def read(index: int, data: bytes) -> None:
        paths[index].write_bytes(data)
        for channels, held in ((1, None), (3, data)):
            with ImageFile(paths[index], channels, data=held) as image:
                image.shrink((2, 2))
                image.whole()

    forms = [("png" if path.suffix == ".png" else "bytes") for path in paths]
    pairs = zip(paths, forms, strict=True)
    return Reader([Sample(path.read_bytes(), form) for path, form in pairs], read)


@reader
def masks(folder: Path) -> Reader:
    """Pictures and masks as the server takes them, from their bytes."""
    init, limits = png_bytes(grey()), Limits(pixels=1 << 16)
    opaque, holed = png_bytes(grey(1)), folder / "holed.png"
    Image.fromarray(np.concatenate([grey(2), grey(3)], 2), "LA").save(holed)
    keyed = folder / "keyed.png"
    Image.fromarray(grey()[..., 0]).convert("P").save(keyed, transparency=3)
    whole = [init, opaque, holed.read_bytes(), keyed.read_bytes()]

    def read(index: int, data: bytes) -> None:
        image, mask = (data, opaque) if index == 0 else (init, data)
        try:
            read_edit(image, mask, 1, limits)
        except ApiError as error:
            raise ArtefactError(str(error)) from None

    return Reader([Sample(data, "png") for data in whole], read)


@reader
def server_requests(folder: Path) -> Reader:
    """Bodies of every kind, to the application itself; what it accepts is drawn."""
    limits = Limits(pixels=1 << 10, cells=64, steps=2, images=2, seconds=30.0)
    app = application(Service([Model("tiny", drawing())], limits))
    init = base64.b64encode(png_bytes(grey())).decode()
    generation = {"prompt": "b", "n": 1, "size": "8x8", "seed": 1, "num_inference_steps": 1}
    generation |= {"guidance_scale": 2.0, "eta": 0.5, "solver": "ddim", "latent": "2x2"}
    generation |= {"output_format": "png", "response_format": "b64_json", "stream": False}
    sd = {"prompt": "3+4", "seed": 2, "steps": 1, "width": 8, "height": 8, "batch_size": 1}
    edit = {"init_images": [init], "mask": init, "denoising_strength": 0.5}
    form = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="' + name + b"\r\n\r\n" + value + b"\r\n"
        for name, value in (
            (b'image"; filename="a.png"', png_bytes(grey())),
            (b'mask"; filename="b.png"', png_bytes(grey(1))),
            (b'prompt"', b"b"),
            (b'strength"', b"0.4"),
            (b'num_inference_steps"', b"1"),
        )
    )
    bodies: list[tuple[str, str, bytes]] = [
        ("/v1/images/generations", "application/json", json.dumps(generation).encode()),
        ("/sdapi/v1/txt2img", "application/json", json.dumps(sd).encode()),
        ("/sdapi/v1/img2img", "application/json", json.dumps(sd | edit).encode()),
        ("/sdapi/v1/options", "application/json", b'{"sd_model_checkpoint": "tiny"}'),
        ("/v1/images/edits", "multipart/form-data; boundary=edge", form + b"--edge--\r\n"),
    ]
    loop = asyncio.new_event_loop()

    def read(index: int, data: bytes) -> None:
        path, kind, _ = bodies[index]
        status, said = loop.run_until_complete(asked(app, path, kind, data))
        if status != 200:
            error = json.loads(said)["error"]
            if status >= 500 or set(error) != {"message", "type", "code"}:
                raise AssertionError(f"{status}: {said!r}")
            raise ArtefactError(error["message"])

    whole = [Sample(data, "json" if "json" in kind else "bytes") for _, kind, data in bodies]
    return Reader(whole, read)


async def asked(app: Any, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
    """POST to an application; its status and what it says."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", kind.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    waiting, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        return await asyncio.Event().wait()  # the client stays

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
