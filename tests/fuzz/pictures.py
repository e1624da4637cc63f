"""Readers of pictures, of what they keep of their making, and of the server's requests."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import ArtefactError
from runtime.generate import check_bundle, describe, request, resolve, settings
from runtime.generate import parser as options
from runtime.images.idx import read_idx
from runtime.images.picture import ImageFile
from runtime.images.pixels import png_bytes, save_png
from runtime.sampling.request import Request
from serving.app import application
from serving.edits import read_edit
from serving.errors import ApiError
from serving.limits import Limits
from serving.pictures import Model
from serving.service import Service
from tests.fuzz.damage import Sample
from tests.fuzz.reader import Reader, drawing, grey, reader


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
