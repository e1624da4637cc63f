"""Edits over HTTP are those of the runtime; what is sent is read within bounds."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from runtime.images.pixels import png_bytes, read_metadata
from runtime.images.png import SIGNATURE, Rows
from serving.edits import transparency
from tests.conftest import Command
from tests.runtime.test_pictures import png
from tests.serving.conftest import Server, pixels_of, running
from tests.serving.test_openai import Draw

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def photo() -> Rows:
    """A grey picture, wider than high, that is no model's own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (127 + 100 * np.sin(x / 5) * np.cos(y / 7)).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def mask() -> Rows:
    """White on the left half."""
    white = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    white[:, : WIDTH // 2] = 255
    return white


@pytest.fixture(scope="module")
def edited(alone: Draw, photo: Rows, mask: Rows) -> Any:
    """What the runtime makes of the picture, with the mask or without."""

    def draw(label: str, index: int = 0, masked: bool = False, **options: Any) -> Rows:
        init = photo[None].transpose(0, 3, 1, 2) / np.float32(127.5) - 1
        if masked:
            options["mask"] = mask[None].transpose(0, 3, 1, 2) / np.float32(255)
        return alone(label, index, init=init, **options)

    return draw


def test_openais_client_edits_as_the_runtime_does(
    server: Server, photo: Rows, mask: Rows, edited: Any
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    extra = {"seed": "3", "strength": "0.5", "num_inference_steps": "6"}
    plain = client.images.edit(image=png_bytes(photo), prompt="b", n=2, extra_body=extra)
    assert plain.data is not None
    for index, own in enumerate(plain.data):
        pixels = pixels_of(own.b64_json or "")
        assert pixels.shape[:2] == (HEIGHT, WIDTH)
        assert np.array_equal(pixels, edited("b", index, seed=3, strength=0.5, steps=6))
    clear = Image.fromarray(mask[..., 0])
    holed = Image.new("LA", clear.size)
    holed.putalpha(Image.fromarray(255 - mask[..., 0]))
    file = io.BytesIO()
    holed.save(file, "PNG")
    expected = edited("b", masked=True, seed=3, steps=6)
    assert np.array_equal(expected[:, WIDTH // 2 :], photo[:, WIDTH // 2 :])
    assert not np.array_equal(expected, photo)
    for sent in (png_bytes(mask), file.getvalue()):  # white, or OpenAI's own: transparent
        given: Any = {"image": png_bytes(photo), "mask": sent, "prompt": "b"}
        steps = {"seed": "3", "num_inference_steps": "6"}
        masked = client.images.edit(**given, extra_body=steps)
        assert masked.data is not None
        assert np.array_equal(pixels_of(masked.data[0].b64_json or ""), expected)


def test_an_edit_is_streamed_and_repeated_from_its_png(
    server: Server, photo: Rows, tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    given: Any = {"image": png_bytes(photo), "prompt": "b", "stream": True, "partial_images": 1}
    events = list(client.images.edit(**given, extra_body={"num_inference_steps": "8"}))
    kinds = ["image_edit.partial_image", "image_edit.completed"]
    assert [event.type for event in events] == kinds
    (tmp_path / "a.png").write_bytes(base64.b64decode(events[-1].b64_json))
    (tmp_path / "init.png").write_bytes(png_bytes(photo))
    repeat = ("--engine", tiny_bundle, "--from-png", "a.png", "--init", "init.png")
    done = command("runtime.generate", *repeat, "--out", "b.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_img2img(server: Server, photo: Rows, mask: Rows, edited: Any) -> None:
    image = base64.b64encode(png_bytes(photo)).decode()
    body: dict[str, Any] = {"prompt": "b", "seed": 3, "steps": 6, "width": WIDTH, "height": HEIGHT}
    body |= {"init_images": [f"data:image/png;base64,{image}"], "denoising_strength": 0.75}
    options: Any = {"seed": 3, "steps": 6, "strength": 0.75}
    plain = server.client.post("/sdapi/v1/img2img", json=body).json()["images"]
    assert np.array_equal(pixels_of(plain[0]), edited("b", **options))
    expected = edited("b", masked=True, **options)
    for invert, sent in ((0, mask), (1, 255 - mask)):
        own = {"mask": base64.b64encode(png_bytes(sent)).decode(), "inpainting_mask_invert": invert}
        answer = server.client.post("/sdapi/v1/img2img", json=body | own)
        assert np.array_equal(pixels_of(answer.json()["images"][0]), expected)


@pytest.mark.parametrize(("form", "name"), [("jpeg", "a.jpg"), ("webp", "a.webp")])
def test_other_formats_hold_what_made_them(
    server: Server, alone: Draw, tmp_path: Path, form: str, name: str
) -> None:
    answer = server.draw(
        prompt="b", seed=1, size="40x24", output_format=form, output_compression=95
    )
    file = base64.b64decode(answer.json()["data"][0]["b64_json"])
    picture = Image.open(io.BytesIO(file))
    assert picture.format == form.upper() and picture.size == (40, 24)
    expected = alone("b", seed=1, latent=(3, 5), image=(24, 40)).astype(int)
    assert np.abs(np.asarray(picture.convert("L"))[..., None] - expected).mean() < 8
    (tmp_path / name).write_bytes(file)
    assert read_metadata(tmp_path / name)["request"]["seed"] == 1


def test_a_mask_of_any_depth_is_transparent_where_its_file_says(mask: Rows) -> None:
    """The left half has the value that is transparent; at 8 bits a neighbour would share it."""
    values = np.where(mask[..., 0] > 0, 300, 301)
    for bits, key in ((16, 300), (4, 300 & 15), (2, 300 & 3)):
        data = png(values & ((1 << bits) - 1), 0, struct.pack(">H", key), bits)
        found = transparency(data)
        assert found is not None and np.array_equal(found, mask[..., 0])


def test_what_is_no_picture_is_refused(server: Server, photo: Rows) -> None:
    whole = png_bytes(photo)

    def edit(files: Any, **fields: str) -> httpx2.Response:
        return server.client.post("/v1/images/edits", files=files, data=fields)

    # Pillow would hand PostScript to a program that runs it.
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"", whole[:60], b"RIFF"):
        answer = edit({"image": ("../../etc/passwd.eps", data)}, prompt="b")
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_image"
        assert "passwd" not in answer.text
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 6, 0, 0, 0)
    bomb = SIGNATURE + b"\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head))
    bomb += b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    said = edit({"image": ("a.png", bomb)}, prompt="b").json()["error"]["message"]
    assert "more than 100000000 pixels; expected at most" in said, said
    assert edit({"mask": whole}, prompt="b").json()["error"]["code"] == "invalid_form"
    assert edit([("image[]", whole), ("image[]", whole)], prompt="b").status_code == 400
    assert edit({"image": whole}, prompt="b", strength="2").status_code == 400
    assert edit({"image": whole}, prompt="b", n="many").status_code == 400
    answer = edit({"image": whole}, prompt="b", output_format="gif")
    assert "output_format`; expected png or jpeg or webp" in answer.json()["error"]["message"]
    assert server.client.post("/v1/images/edits", json={"prompt": "b"}).status_code == 415
    body = {"init_images": ["/etc/passwd"]}
    answer = server.client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 400 and "root:" not in answer.text


def test_a_picture_that_unpacks_to_more_than_the_limit_is_not_unpacked(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--max-pixels", 1000) as server:
        large = png_bytes(np.zeros((2000, 2000, 1), np.uint8))
        assert len(large) < 10_000
        answer = server.client.post("/v1/images/edits", files={"image": large})
        assert answer.status_code == 400
        assert "image has 2000x2000 pixels; expected at most 1000" in answer.text
