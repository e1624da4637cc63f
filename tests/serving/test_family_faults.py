"""A server of every family: what it cannot draw it says, and goes on."""

import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import helper, numpy_helper

from runtime import open_bundle
from runtime.bundle.files import sha256
from runtime.bundle.manifest import read_manifest
from runtime.images.pixels import png_bytes, to_uint8
from tests.conftest import PIXELS, Command
from tests.serving.conftest import Server, pixels_of, running

NAMES = ("tiny", *PIXELS)
EACH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, exported: Callable[[str], Path]) -> dict[str, Path]:
    return {"tiny": tiny_bundle} | {name: exported(name) for name in PIXELS}


@pytest.fixture(scope="module")
def families(bundles: dict[str, Path]) -> Iterator[Server]:
    with running(*bundles.values()) as server:
        yield server


@EACH
@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": "z"},
        {"n": 0},
        {"n": 1000},
        {"latent": "0x0"},
        {"latent": "9999x9999"},
        {"size": "-1x4"},
        {"num_inference_steps": 0},
        {"num_inference_steps": 10**9},
        {"seed": -1},
        {"guidance_scale": 1e300},
        {"eta": -1},
        {"solver": "euler"},
        {"index": -1},
    ],
)
def test_a_request_that_cannot_be_met_is_the_clients_fault(
    name: str, wrong: dict[str, Any], families: Server
) -> None:
    answer = families.draw(**{"prompt": "b", "model": name, **wrong})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "code"}


@EACH
@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", None])
def test_a_picture_that_is_none_is_the_clients_fault(
    name: str, field: str, data: bytes | None, families: Server
) -> None:
    whole = png_bytes(np.zeros((16, 16, 1), np.uint8))
    files = {"image": whole, "mask": whole} | {field: whole[:-20] if data is None else data}
    fields = {"model": name, "prompt": "b"}
    answer = families.client.post("/v1/images/edits", files=files, data=fields)
    assert answer.status_code == 400 and answer.json()["error"]["code"].startswith("invalid_")


def test_sixteen_clients_get_what_each_would_get_alone(
    families: Server, bundles: dict[str, Path]
) -> None:
    """Of all families at once."""

    def ask(number: int) -> int:
        name = NAMES[number % len(NAMES)]
        body = {"prompt": "b", "model": name, "seed": number, "num_inference_steps": 2}
        return int(np.abs(found(families.draw(**body)) - alone(name, number)).max())

    def alone(name: str, seed: int) -> Any:
        bundle = open_bundle(bundles[name])
        return to_uint8(bundle.generate(["b"], steps=2, seed=seed).images)[0].astype(int)

    def found(answer: Any) -> Any:
        assert answer.status_code == 200, answer.text
        return pixels_of(answer.json()["data"][0]["b64_json"]).astype(int)

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(30))) <= 1


@pytest.fixture(scope="module")
def poisoned(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Each family's step gives NaN, behind a right hash."""
    folder = tmp_path_factory.mktemp("poisoned")
    for name, path in bundles.items():
        own = Path(shutil.copytree(path, folder / name))
        manifest = read_manifest(own)
        step = manifest.step_graph
        model = onnx.load_model_from_string(manifest.file_bytes(manifest.graphs[step]))
        for node in model.graph.node:
            node.output[:] = ["whole" if output == "eps" else output for output in node.output]
        nan = numpy_helper.from_array(np.array(np.nan, np.float32), "nan")
        model.graph.initializer.append(nan)
        model.graph.node.append(helper.make_node("Add", ["whole", "nan"], ["eps"]))
        data = model.SerializeToString()
        spec = replace(manifest.graphs[step], sha256=sha256(data))
        (own / spec.file).write_bytes(data)
        replace(manifest, graphs={**manifest.graphs, step: spec}, for_cpu={}).write(own)
    with running(*(folder / name for name in bundles)) as server:
        yield server


@EACH
def test_nan_is_said_and_the_server_goes_on(name: str, poisoned: Server) -> None:
    for _ in range(2):
        answer = poisoned.draw(prompt="b", model=name, num_inference_steps=2)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "not_finite"
        assert "at step 1 of 2" in answer.json()["error"]["message"]
    assert poisoned.client.get("/healthz").status_code == 200


@EACH
@pytest.mark.parametrize("kind", ["missing", "cut", "manifest"])
def test_a_damaged_bundle_ends_the_start_with_3(
    name: str, kind: str, bundles: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    own = Path(shutil.copytree(bundles[name], tmp_path / name))
    manifest = read_manifest(own)
    step = (
        own / manifest.for_cpu.get(manifest.step_graph, manifest.graphs[manifest.step_graph]).file
    )
    if kind == "missing":
        step.unlink()
    elif kind == "cut":
        step.write_bytes(step.read_bytes()[:-1])
    else:
        (own / "manifest.json").write_text("{}")
    done = command("serving", own, "--port", 0)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr


def test_a_signal_ends_the_server_once_all_is_drawn(tiny_bundle: Path) -> None:
    with running(tiny_bundle) as server:
        assert server.draw(prompt="b").status_code == 200
        server.process.send_signal(signal.SIGINT)
        said = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0 and "Traceback" not in said


def test_without_its_packages_the_server_names_them(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no uvicorn', name='uvicorn')")
    done = command("serving", tiny_bundle)
    assert done.returncode == 4 and "pip install" in done.stderr
    assert "Traceback" not in done.stderr
