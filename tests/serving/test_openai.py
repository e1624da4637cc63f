"""`/v1` as OpenAI's own package and Open WebUI ask it; each answer is what the runtime draws."""

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from runtime.images.pixels import read_metadata
from runtime.images.png import Rows
from tests.conftest import Command
from tests.serving.conftest import Server, pixels_of

Draw = Callable[..., Rows]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").object == "model"
    with pytest.raises(openai.NotFoundError, match=r"no model 'dall-e-3'; expected tiny or other"):
        client.images.generate(model="dall-e-3", prompt="b")


def test_pictures_are_those_of_the_runtime_and_width_comes_first(
    client: openai.OpenAI, alone: Draw
) -> None:
    extra = {"seed": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "latent": "5x3"}
    found = client.images.generate(
        model="other", prompt="b,3+4", n=2, size="40x24", extra_body=extra
    )
    assert found.size == "40x24" and found.data is not None and len(found.data) == 4
    options: Any = {"latent": (3, 5), "image": (24, 40), "steps": 4, "guidance_scale": 3.0}
    for index, own in enumerate(found.data):
        pixels = pixels_of(own.b64_json or "")
        assert pixels.shape[:2] == (24, 40)
        label = "b" if index < 2 else "3+4"
        assert np.array_equal(pixels, alone(label, index, seed=5, **options))


def test_a_picture_without_a_seed_says_the_one_it_has(
    client: openai.OpenAI, alone: Draw, tmp_path: Path, command: Command, tiny_bundle: Path
) -> None:
    one, other = (client.images.generate(prompt="c", extra_body={"steps": 3}) for _ in "ab")
    assert one.data and other.data and one.data[0].b64_json != other.data[0].b64_json
    file = base64.b64decode(one.data[0].b64_json or "")
    (tmp_path / "a.png").write_bytes(file)
    seed = one.data[0].seed  # type: ignore[attr-defined]
    assert read_metadata(tmp_path / "a.png")["request"]["seed"] == seed
    assert np.array_equal(pixels_of(file), alone("c", seed=seed))
    repeat = ("--engine", tiny_bundle, "--from-png", "a.png", "--out", "b.png")
    done = command("runtime.generate", *repeat)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.png").read_bytes() == file


def test_a_url_is_fetched_without_the_token_and_cannot_be_guessed(client: openai.OpenAI) -> None:
    extra = {"seed": 1, "num_inference_steps": 2}
    found = client.images.generate(prompt="b", response_format="url", extra_body=extra)
    same = client.images.generate(prompt="b", extra_body=extra)
    assert found.data and same.data
    url = found.data[0].url or ""
    answer = httpx2.get(url)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(same.data[0].b64_json or "")
    assert httpx2.get(url[:-5] + "x.png").status_code == 404


def test_a_stream_has_previews_and_then_the_picture(client: openai.OpenAI, alone: Draw) -> None:
    extra = {"seed": 2, "num_inference_steps": 8}
    given: Any = {"prompt": "d", "size": "96x64", "stream": True, "partial_images": 3}
    events = list(client.images.generate(**given, extra_body=extra))
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    assert [event.step for event in events[:-1]] == [2, 4, 6]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, 2, None]
    last = pixels_of(events[-1].b64_json)
    assert last.shape[:2] == (64, 96) and events[-1].size == "96x64"
    # No more cells than the default of 4x4, of this aspect; previews at its 4 pixels a cell.
    assert np.array_equal(last, alone("d", seed=2, latent=(3, 5), image=(64, 96), steps=8))
    seen = [pixels_of(event.b64_json) for event in events]
    assert all(own.shape[:2] == (12, 20) for own in seen[:-1])
    assert len({own.tobytes() for own in seen[:-1]}) == 3


def test_the_shape_that_open_webui_sends(server: Server) -> None:
    body = {"model": "tiny", "prompt": "b", "n": 2, "size": "64x32", "response_format": "b64_json"}
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json"}
    answer = server.client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.status_code == 200
    assert [pixels_of(own["b64_json"]).shape[:2] for own in answer.json()["data"]] == [(32, 64)] * 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "z"}, "label z is not in this bundle"),
        ({"prompt": "b", "n": 0}, "n is 0"),
        ({"prompt": "b", "n": 17}, "17 pictures are asked for; expected at most 16"),
        ({"prompt": "b", "size": "64"}, "size is '64'; expected WIDTHxHEIGHT"),
        ({"prompt": "b", "size": "0x64"}, "size is '0x64'"),
        ({"prompt": "b", "size": "9999x8888"}, "a picture of 8888x9999 pixels; expected at most"),
        ({"prompt": "b", "latent": "99x98"}, "a latent of 98x99 cells; expected at most 4096"),
        ({"prompt": "b", "num_inference_steps": 10_001}, "10001 steps are asked for"),
        ({"prompt": "b", "num_inference_steps": 0}, "steps is 0; expected 1 to 10000"),
        ({"prompt": "b", "seed": -1}, "seed is -1"),
        ({"prompt": "b", "seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"prompt": "b", "guidance_scale": 101}, "guidance_scale is 101"),
        ({"prompt": "b", "solver": "euler"}, "solver is 'euler'; expected ddim or"),
        ({"prompt": 7}, "Expected `str`, got `int` - at `$.prompt`"),
        ({}, "missing required field `prompt`"),
        ({"prompt": "b", "output_format": "gif"}, "output_format`; expected png or jpeg or webp"),
        ({"prompt": "b", "response_format": "x"}, "`$.response_format`; expected b64_json or url"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_the_runtimes_words(
    server: Server, body: dict[str, Any], said: str
) -> None:
    answer = server.draw(**body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"} and said in error["message"]


def test_many_clients_get_what_each_would_get_alone(server: Server, alone: Draw) -> None:
    """Of several sizes, labels, mixtures and steps at once; some of them share batches."""
    sizes = {"24x24": (24, 24), "40x24": (24, 40), "8x8": (8, 8)}
    asked = [
        {"prompt": prompt, "size": size, "seed": seed, "num_inference_steps": steps, "n": 2}
        for seed, prompt in enumerate(("a", "b", "3+4", "none"))
        for size in sizes
        for steps in (3, 4)
    ]
    before = server.metric("r2_batch_pictures_count"), server.metric("r2_pictures_total")
    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda body: server.draw(**body), asked)]
    latents = {"24x24": (4, 4), "40x24": (3, 5), "8x8": (4, 4)}
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        size: Any = body["size"]
        for index, own in enumerate(answer.json()["data"]):
            options: Any = {"seed": body["seed"], "steps": body["num_inference_steps"]}
            options |= {"latent": latents[size], "image": sizes[size]}
            expected = alone(body["prompt"], index, **options)
            assert np.abs(pixels_of(own["b64_json"]).astype(int) - expected).max() <= 1
    batches = server.metric("r2_batch_pictures_count") - before[0]
    assert server.metric("r2_pictures_total") - before[1] == 48 and batches < 40
