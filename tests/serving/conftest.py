"""A server in a process of its own, of the tiny bundle under two names."""

import base64
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from runtime import Bundle, open_bundle
from runtime.images.pixels import to_uint8
from runtime.images.png import Rows
from tests.conftest import ROOT

pytest.importorskip("starlette")
LONG = {"num_inference_steps": 10_000}  # a run of many seconds


@dataclass
class Server:
    """A running server: its process, where it listens, what asks it."""

    process: "subprocess.Popen[str]"
    url: str
    client: httpx2.Client

    def draw(self, **body: Any) -> httpx2.Response:
        """POST /v1/images/generations."""
        return self.client.post("/v1/images/generations", json=body)

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> tuple[int, str]:
        """SIGTERM, as a service manager sends it: the exit code and what was said."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


@contextmanager
def running(*args: object, module: str = "serving", **headers: str) -> Iterator[Server]:
    """A server with options, stopped at the end."""
    line = [sys.executable, "-m", module, *map(str, args), "--port", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, env=environment, **options) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = process.stdout.readline()
            assert " at http://" in said, process.stderr.read()
            url = said.split(" at ")[1].strip()
            with httpx2.Client(base_url=url, timeout=120, headers=headers) as client:
                yield Server(process, url, client)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def server(tiny_bundle: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it is."""
    with running(tiny_bundle, f"other={tiny_bundle}", "--max-steps", 10_000) as found:
        yield found


@pytest.fixture(scope="session")
def alone(tiny_bundle: Path) -> Callable[..., Rows]:
    """What the runtime draws for one picture: uint8 `[h, w, c]`."""
    bundle: Bundle = open_bundle(tiny_bundle)

    def draw(label: Any, index: int = 0, **options: Any) -> Rows:
        made = bundle.generate([label], first_index=index, **options)
        return to_uint8(made.images)[0]

    return draw


def pixels_of(text: str | bytes) -> Rows:
    """uint8 `[h, w, c]` of a picture, as a file or in base64."""
    data = base64.b64decode(text) if isinstance(text, str) else text
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels.reshape(*pixels.shape[:2], -1)
