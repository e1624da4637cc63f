"""How the server behaves: bounds, clients that go away, who may ask, how it ends."""

import base64
import shlex
import shutil
import socket
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

import serving.__main__
from serving import batch
from tests.conftest import ROOT, Command
from tests.serving.conftest import LONG, Server, pixels_of, running
from tests.serving.test_openai import Draw

TOKEN = "0123456789abcdef"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def begin(server: Server, **body: Any) -> socket.socket:
    """Ask for pictures on a socket of the caller's, who may close it."""
    content = httpx2.Request("POST", server.url, json={"prompt": "b"} | body).content
    host, port = server.url.removeprefix("http://").split(":")
    asking = socket.create_connection((host, int(port)))
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    asking.sendall(head.encode() + content)
    return asking


def test_a_full_queue_and_clients_that_go_away(tiny_bundle: Path, alone: Draw) -> None:
    options = ("--queue", 2, "--max-images", 2, "--max-steps", 10_000)
    with running(tiny_bundle, *options) as server:
        drawn = begin(server, **LONG)
        until(lambda: server.metric("r2_drawing_pictures") == 1)
        waiting = begin(server, **LONG, n=2, stream=True)
        until(lambda: server.metric("r2_queue_pictures") == 2)
        refused = server.draw(prompt="b")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        waiting.close()
        until(lambda: server.metric("r2_queue_pictures") == 0)
        drawn.close()
        until(lambda: server.metric("r2_pictures_stopped_total") == 1)
        answer = server.draw(prompt="b", seed=1)
        assert np.array_equal(pixels_of(answer.json()["data"][0]["b64_json"]), alone("b", seed=1))
        assert server.metric("r2_pictures_total") == 1


def test_a_time_limit(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--max-steps", 10_000, "--time-limit", 0.5) as server:
        late = server.draw(prompt="b", **LONG)
        assert (
            late.status_code == 504 and "not drawn within 0.5 s" in late.json()["error"]["message"]
        )
        stream = server.draw(prompt="b", stream=True, **LONG)
        assert "event: error" in stream.text and "not drawn within 0.5 s" in stream.text
        until(lambda: server.metric("r2_pictures_stopped_total") >= 1)


def test_one_of_a_batch_fails_alone(tiny_bundle: Path, alone: Draw) -> None:
    """Three wait for one that is long; of two that could go together one has gone."""
    with running(tiny_bundle, "--max-steps", 10_000) as server:
        first = begin(server, **LONG)
        until(lambda: server.metric("r2_drawing_pictures") == 1)
        gone = begin(server, seed=1)
        with ThreadPoolExecutor(2) as pool:
            stays = [pool.submit(server.draw, prompt="b", seed=seed) for seed in (2, 3)]
            until(lambda: server.metric("r2_queue_pictures") == 3)
            gone.close()
            until(lambda: server.metric("r2_queue_pictures") == 2)
            first.close()
            for seed, future in zip((2, 3), stays, strict=True):
                own = future.result().json()["data"][0]["b64_json"]
                assert np.abs(pixels_of(own).astype(int) - alone("b", seed=seed)).max() <= 1
        assert server.metric("r2_batch_pictures_sum") == 3


def test_bodies_have_a_largest_size(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--max-body", "0.01MB") as server:
        large = b'{"prompt": "' + b"b" * 20_000 + b'"}'
        kind = {"content-type": "application/json"}
        for content in (large, iter([large[:9_000], large[9_000:]])):  # said before, and chunked
            answer = server.client.post("/v1/images/generations", content=content, headers=kind)
            assert answer.status_code == 413 and "at most 10000 bytes" in answer.text
        assert server.draw(prompt="b").status_code == 200


def test_only_json_is_json(server: Server) -> None:
    """What a form of another origin may send without being asked is refused."""
    answer = server.client.post("/v1/images/generations", content=b'{"prompt": "b"}')
    assert answer.status_code == 415
    kind = {"content-type": "application/json"}
    answer = server.client.post("/v1/images/generations", content=b'{"prompt"', headers=kind)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_pages_of_others_and_names_that_point_here_are_kept_out(server: Server) -> None:
    ask = server.client.get
    assert ask("/v1/models", headers={"Origin": "https://example.org"}).status_code == 403
    assert ask("/v1/models", headers={"Host": "example.org"}).status_code == 403
    assert ask("/v1/models", headers={"Origin": server.url}).status_code == 200
    assert "access-control-allow-origin" not in ask("/v1/models").headers
    assert ask("/v1/nothing").json()["error"]["code"] == "not_found"
    missing = ask("/v1/image/generations").json()["error"]["message"]
    said = "nothing is served at /v1/image/generations; the nearest is /v1/images/generations"
    assert missing.startswith(said)
    refused = ask("/v1/images/generations")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    said = "GET of /v1/images/generations is not served; expected POST"
    assert refused.json()["error"]["message"] == said
    assert "kept for an hour" in ask("/pictures/none").json()["error"]["message"]


def test_a_token_is_needed_beyond_this_machine(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    beyond = command("serving", tiny_bundle, "--host", "0.0.0.0")
    assert beyond.returncode == 2 and "expected a token" in beyond.stderr
    (tmp_path / "token").write_text("short\n")
    short = command("serving", tiny_bundle, "--token-file", "token")
    assert short.returncode == 2 and "holds 5 characters; expected one line of 16" in short.stderr
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    origin = "https://example.org"
    options = ("--host", "0.0.0.0", "--token-file", tmp_path / "token", "--cors", origin)
    with running(tiny_bundle, *options, authorization=f"Bearer {TOKEN}") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for given, status in {
            None: 401,
            "Bearer ": 401,
            f"Bearer {TOKEN}0": 401,
            f"Bearer {TOKEN[:-1]}": 401,
            "Basic ???": 401,
            f"Basic {basic}": 200,
            f"bearer {TOKEN}": 200,
        }.items():
            headers = {} if given is None else {"Authorization": given.strip()}
            assert httpx2.get(f"{url}/v1/models", headers=headers).status_code == status, given
            assert httpx2.get(f"{url}/metrics", headers=headers).status_code == status
        assert httpx2.get(f"{url}/healthz").json() == {"status": "ok", "queue": 0}
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        allowed = httpx2.options(f"{url}/v1/images/generations", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == origin
        other = httpx2.options(f"{url}/v1/models", headers=asked | {"Origin": "https://a.org"})
        assert "access-control-allow-origin" not in other.headers


def test_sigterm_finishes_what_was_accepted_and_refuses_what_comes(
    tiny_bundle: Path, alone: Draw
) -> None:
    with running(tiny_bundle, "--max-steps", 10_000) as server, ThreadPoolExecutor(3) as pool:
        drawing = pool.submit(server.draw, prompt="b", seed=1, num_inference_steps=5000)
        until(lambda: server.metric("r2_drawing_pictures") == 1)
        waiting = pool.submit(server.draw, prompt="b", seed=1)
        until(lambda: server.metric("r2_queue_pictures") == 1)
        code = pool.submit(server.stop)
        until(lambda: refused(server))
        assert drawing.result().status_code == 200
        own = waiting.result().json()["data"][0]["b64_json"]
        assert np.array_equal(pixels_of(own), alone("b", seed=1))
        status, said = code.result()
        assert status == 0 and said.splitlines() == [
            "stopping: 2 accepted pictures are drawn first",
            "stopped: all that was accepted is drawn",
        ]


def refused(server: Server) -> bool:
    try:
        return httpx2.get(f"{server.url}/healthz").status_code == 503
    except httpx2.ConnectError:
        return True


def test_what_is_wrong_with_the_machine_is_said_to_its_log_alone(
    own_bundle: Path, tmp_path: Path
) -> None:
    """A graph that only large pictures need is damaged after the server has begun."""
    with running(own_bundle) as server:
        for path in own_bundle.glob("r2ir_render*"):
            path.write_bytes(b"damaged")
        answer = server.draw(prompt="b", size="1024x1024", num_inference_steps=1)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"
        assert str(tmp_path) not in answer.text and "r2ir" not in answer.text
        assert server.draw(prompt="b").status_code == 200
        code, said = server.stop()
        assert code == 0 and "r2ir_render" in said and "Traceback" not in said


def test_bundles_have_names_of_their_own(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    twice = command("serving", tiny_bundle, tiny_bundle)
    assert twice.returncode == 2 and "two bundles are named tiny" in twice.stderr
    missing = command("serving", tmp_path / "none")
    assert missing.returncode == 3 and "Traceback" not in missing.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = command("serving", tiny_bundle, "--port", port)
    assert used.returncode == 5 and "choose another --port" in used.stderr
    many = command("serving", tiny_bundle, "--queue", 4)
    assert many.returncode == 2 and "--max-images 16: more than the --queue of 4" in many.stderr
    shutil.copytree(tiny_bundle, tmp_path / "b")
    (tmp_path / "b" / "r2id.cpu.onnx").write_bytes(b"damaged")
    damaged = command("serving", tmp_path / "b")
    assert damaged.returncode == 3 and "r2id.cpu.onnx" in damaged.stderr


def test_several_threads_of_work(tiny_bundle: Path, alone: Draw) -> None:
    with running(tiny_bundle, "--workers", 3, "--batch", 2) as server:
        found: dict[int, Any] = {}

        def ask(seed: int) -> None:
            found[seed] = server.draw(prompt="b", seed=seed, n=3).json()["data"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, data in found.items():
            for index, own in enumerate(data):
                expected = alone("b", index, seed=seed)
                assert np.abs(pixels_of(own["b64_json"]).astype(int) - expected).max() <= 1


def test_what_is_missing_is_named_with_the_packages_of_its_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, line in (("serve", serving.__main__.INSTALL), ("ray", batch.INSTALL)):
        packages = shlex.split(line.removeprefix("python -m pip install "))
        assert packages == extras["optional-dependencies"][name]
