"""A bundle in Triton: its configuration by Triton's own schema, its pictures by a real server."""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.images.png import Rows
from serving.triton import INPUTS, OUTPUTS
from tests.conftest import ROOT, Command

OWN = ROOT / ".venv-triton"  # of the server and its clients: its numpy is older than ours
NONE = "no .venv-triton: run `make triton`, on Linux with glibc 2.35 or newer"
CLIENT = Path(__file__).with_name("triton_client.py")
Draw = Callable[..., Rows]
Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
read = text_format.Parse(sys.stdin.read(), ModelConfig())
print(json_format.MessageToJson(read, preserving_proto_field_name=True))
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    """The packages of the server's environment."""
    found = next(OWN.glob("lib/python*/site-packages/pytriton/tritonserver"), None)
    if found is None or not (OWN / ".triton").exists():
        pytest.skip(NONE)
    return found.parents[1]


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the tiny bundle, two instances, as the command writes it."""
    made = tmp_path_factory.mktemp("triton") / "repository"
    line = [sys.executable, "-m", "serving.triton", str(tiny_bundle), str(made)]
    line += ["--instances", "2", "--max-steps", "10000"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def ask(
    packages: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ask]:
    """Requests, each by a gRPC client of its own, to a server that runs meanwhile."""
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDLIBRARY"))
    stub = (
        packages
        / "pytriton/tritonserver/python_backend_stubs"
        / ".".join(platform.python_version_tuple()[:2])
    )
    if library.suffix == ".a" or not library.exists() or not stub.exists():
        pytest.skip(f"no shared library of Python, or no backend of Triton for {sys.version}")
    scratch = tmp_path_factory.mktemp("server")
    server = packages / "pytriton/tritonserver"
    shutil.copytree(server / "backends", scratch / "backends")
    shutil.copy(stub / "triton_python_backend_stub", scratch / "backends/python")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [str(server / "bin/tritonserver"), f"--model-repository={repository}"]
    line += [f"--backend-directory={scratch / 'backends'}", "--grpc-address=127.0.0.1"]
    line += [f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"]
    # The backend's Python is isolated, and takes its packages from where PATH has a python3.
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{library.parent}:{packages / 'nvidia_pytriton.libs'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def sent(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        line = [str(OWN / "bin/python"), str(CLIENT), f"127.0.0.1:{port}", "tiny"]
        done = subprocess.run(line, input=json.dumps(requests), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + (scratch / "log").read_text()[-5000:]
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + 300
            while b"Started GRPCInferenceService" not in (said := (scratch / "log").read_bytes()):
                assert process.poll() is None and time.monotonic() < end, said.decode()
                time.sleep(0.05)
            yield sent
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, (scratch / "log").read_text()[-5000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_the_configuration_is_of_tritons_own_schema(packages: Path, repository: Path) -> None:
    text = (repository / "tiny" / "config.pbtxt").read_text()
    line = [str(OWN / "bin/python"), "-c", PARSE]
    done = subprocess.run(line, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert (read["name"], read["backend"]) == ("tiny", "python")
    assert read["model_transaction_policy"] == {"decoupled": True}
    assert read["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    for field, tensors in (("input", INPUTS), ("output", OUTPUTS)):
        found = {own["name"]: (own["data_type"], own["dims"]) for own in read[field]}
        assert found == {
            name: (f"TYPE_{kind}", [str(side) for side in dims])
            for name, (kind, dims) in tensors.items()
        }
    options = json.loads(read["parameters"]["engine"]["string_value"])
    assert (options["provider"], options["threads"]) == ("cpu", 1)
    assert json.loads(read["parameters"]["limits"]["string_value"])["steps"] == 10_000


def test_eight_clients_get_what_the_runtime_draws(ask: Ask, alone: Draw) -> None:
    sizes = [((8, 8), (32, 32)), ((6, 9), (24, 36)), ((12, 5), (48, 20)), ((4, 4), (17, 16))]
    asked = []
    for number in range(8):
        latent, image = sizes[number % 4]
        own = {"labels": "abcdefgh"[number], "latent": latent, "image": image, "seed": number}
        asked.append(own | {"steps": 3, "guidance_scale": 1.5})
    for own, got in zip(asked, ask(asked), strict=True):
        assert got["error"] is None
        (response,) = got["responses"]
        assert (response["number"], response["step"], response["seed"]) == ([0], [3], [own["seed"]])
        expected = alone(own.pop("labels"), **own)
        assert np.array_equal(response["pixels"], expected)


def test_previews_and_pictures_come_one_by_one(ask: Ask, alone: Draw) -> None:
    (got,) = ask([{"labels": "a-c", "count": 2, "seed": 5, "steps": 4, "previews": 1}])
    told = [(*own["number"], *own["step"], "pixels" in own) for own in got["responses"]]
    assert sorted(told) == sorted((n, s, s == 4) for n in range(6) for s in (2, 4))
    pictures = {own["number"][0]: own["pixels"] for own in got["responses"] if "pixels" in own}
    for number, label in enumerate("aabbcc"):
        expected = alone(label, number, seed=5, steps=4).astype(int)
        # Products of a batch may round otherwise than those of one picture.
        assert np.abs(pictures[number] - expected).max() <= 1


def test_a_request_that_cannot_be_drawn_is_answered(ask: Ask, alone: Draw) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"labels": "nobody"}, "nobody"),
        ({"image": [0, 8]}, "image is 0x8"),
        ({"latent": [3000, 3000]}, "--max-pixels"),
        ({"steps": 0}, "steps is 0"),
        ({"previews": 101}, "previews is 101"),
    ]
    for (_, said), got in zip(wrong, ask([own for own, _ in wrong]), strict=True):
        assert said in got["error"] and not got["responses"]
    (got,) = ask([{"labels": "a", "seed": 1}])
    assert np.array_equal(got["responses"][0]["pixels"], alone("a", seed=1))


def test_what_a_client_has_left_is_drawn_no_longer(ask: Ask, alone: Draw) -> None:
    """Runs of many minutes on both instances, which then draw again and end when they are told."""
    long = {"labels": "a", "steps": 10_000, "latent": [32, 32], "previews": 100, "cancel": True}
    assert all("preview" in got["responses"][0] for got in ask([dict(long), dict(long)]))
    for got in ask([{"labels": "b", "seed": 1}] * 4):
        assert np.array_equal(got["responses"][0]["pixels"], alone("b", seed=1))


def test_what_is_there_stays(command: Command, repository: Path, tiny_bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    done = command("serving.triton", tiny_bundle, repository)
    assert done.returncode == 5 and "is there already" in done.stderr
    done = command("serving.triton", tiny_bundle, repository, "--name", "../x")
    assert done.returncode == 2 and "--name is '../x'" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_a_damaged_bundle_is_refused(command: Command, own_bundle: Path, tmp_path: Path) -> None:
    graph = own_bundle / "r2ir_encode.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    done = command("serving.triton", own_bundle, tmp_path / "repository", "--name", "x")
    assert done.returncode == 3 and "r2ir_encode.onnx" in done.stderr
    assert not [*(tmp_path / "repository").iterdir()]
