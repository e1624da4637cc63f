"""`/sdapi/v1` as A1111's clients use it."""

import json
import threading
import time
from typing import Any

import numpy as np

from tests.serving.conftest import Server, pixels_of
from tests.serving.test_openai import Draw


def test_the_shape_that_open_webui_sends(server: Server, alone: Draw) -> None:
    """It chooses the model by an option, then asks by POST txt2img."""
    chosen = server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
    titles = [own["title"] for own in server.client.get("/sdapi/v1/sd-models").json()]
    assert chosen == "tiny" and titles == ["tiny", "other"]
    options = {"sd_model_checkpoint": "other"}
    assert server.client.post("/sdapi/v1/options", json=options).status_code == 200
    assert server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other"
    body = {"prompt": "b", "batch_size": 2, "width": 40, "height": 24, "steps": 3}
    own = {"negative_prompt": "ugly", "sampler_name": "DPM++ 2M", "seed": 4, "cfg_scale": 3}
    answer = server.client.post("/sdapi/v1/txt2img", json=body | own).json()
    given: Any = {"latent": (3, 5), "image": (24, 40), "guidance_scale": 3, "solver": "dpm++2m"}
    for index, image in enumerate(answer["images"]):
        assert np.array_equal(pixels_of(image), alone("b", index, seed=4, steps=3, **given))
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [4, 4] and info["sd_model_name"] == "other"
    server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "tiny"})


def test_a_sampler_is_one_of_those_listed(server: Server) -> None:
    names = [own["name"] for own in server.client.get("/sdapi/v1/samplers").json()]
    assert names[0] == "dpm++3m" and set(names) == {"ddim", "dpm++2m", "dpm++3m"}
    refused = server.client.post("/sdapi/v1/txt2img", json={"sampler_name": "Euler a"})
    said = "sampler_name is 'Euler a'; expected ddim or"
    assert refused.status_code == 400 and said in refused.json()["error"]["message"]


def test_progress_with_a_picture_and_an_interruption(server: Server) -> None:
    assert server.client.get("/sdapi/v1/progress").json()["progress"] == 0
    found: list[dict[str, Any]] = []

    def ask() -> None:
        body = {"prompt": "b", "steps": 10_000, "n_iter": 2}
        found.append(server.client.post("/sdapi/v1/txt2img", json=body).json())

    thread = threading.Thread(target=ask)
    thread.start()
    seen: dict[str, Any] = {}
    end = time.monotonic() + 60
    while not seen.get("current_image") and time.monotonic() < end:
        seen = server.client.get("/sdapi/v1/progress").json()
        time.sleep(0.05)
    assert pixels_of(seen["current_image"]).shape[:2] == (16, 16)
    assert 0 < seen["progress"] < 1 and seen["eta_relative"] > 0
    assert seen["state"]["job_count"] == 2 and seen["state"]["sampling_steps"] == 10_000
    server.client.post("/sdapi/v1/interrupt")
    thread.join(30)
    assert not thread.is_alive()
    assert found[0]["images"] == [] and json.loads(found[0]["info"])["interrupted"]
