"""Hours of use in small: memory stays flat, and every answer is what it is alone.

Each engine and the server draw for $SOAK_SECONDS at mixed sizes, of all families, edits among them:
an engine for 8 threads at once, the server for 64 clients. The same measure must see a leak.
"""

import ctypes
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import EngineOptions, open_bundle
from runtime.bundle.interface import Size
from runtime.images.pixels import png_bytes, to_uint8
from runtime.images.png import Rows
from tests.conftest import PIXELS
from tests.serving.conftest import Server, pixels_of, running
from tests.soak.leaky import LEAK

SECONDS = float(os.environ.get("SOAK_SECONDS", "4"))
SHORT = 6.0  # seconds in which a leak must show
THREADS, CLIENTS = 8, 64
FLAT = 48 << 20  # bytes that memory may grow by after the warm-up, however long
WARM = 0.4  # of the time
NAMES = ("tiny", *PIXELS)
LEVELS = 1  # of 255 that batches of other sizes may differ by, and so a server's pictures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc as on Linux")


@dataclass(frozen=True)
class Ask:
    """A picture that is asked for, and what it is alone: uint8 `[h, w, c]`."""

    name: str
    label: int
    latent: Size
    seed: int
    edit: tuple[Rows, Rows] | None  # a picture and where it is drawn anew
    alone: Rows

    @property
    def options(self) -> dict[str, Any]:
        return request(self.latent, self.seed, self.edit)


def request(latent: Size, seed: int, edit: tuple[Rows, Rows] | None) -> dict[str, Any]:
    own: dict[str, Any] = {"latent": latent, "seed": seed, "steps": 2}
    if edit is not None:
        init, mask = (rows[None].transpose(0, 3, 1, 2).astype(np.float32) for rows in edit)
        own |= {"init": init / np.float32(127.5) - 1, "mask": mask / np.float32(255)}
        own |= {"image": init.shape[2:], "strength": 0.6}
    return own


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, exported: Callable[[str], Path]) -> dict[str, Path]:
    return {"tiny": tiny_bundle} | {name: exported(name) for name in PIXELS}


def asks(bundles: dict[str, Path], options: EngineOptions) -> tuple[dict[str, Any], list[Ask]]:
    """Every bundle opened, and what is asked of each at three sizes, drawn one by one."""
    opened, found = {name: open_bundle(path, options) for name, path in bundles.items()}, []
    draw = np.random.default_rng(0)
    for name, bundle in opened.items():
        sides = bundle.interface.latent_sides
        for number in range(6):
            height, width = (sides.minimum + (number * i % 3) * sides.multiple for i in (1, 2))
            image = bundle.interface.image_size((height, width))
            shape = *image, bundle.interface.color_channels
            init = draw.integers(0, 256, shape, dtype=np.uint8)
            mask = np.zeros((*image, 1), np.uint8)
            mask[:, image[1] // 2 :] = 255
            edit = (init, mask) if number % 2 and image[1] > 1 else None
            size = (height, width)
            made = bundle.generate([number], **request(size, number, edit))
            found.append(Ask(name, number, size, number, edit, to_uint8(made.images)[0]))
    return opened, found


def grown(
    use: Callable[[random.Random], None], held: Callable[[], int], seconds: float, threads: int
) -> tuple[int, int]:
    """How often `use` was called by threads, and the bytes that what is `held` grew by at the end.

    At the very end, over the most in the middle of the time that the warm-up leaves.
    """
    began, counts = time.monotonic(), [0] * threads

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds or counts[number] < 2:
            use(draw)
            counts[number] += 1

    samples: list[tuple[float, int]] = []
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, number) for number in range(threads)]
        while not all(future.done() for future in running):
            samples.append((time.monotonic() - began, held()))
            time.sleep(min(0.2, seconds / 50))
        for future in running:
            future.result()
    samples.append((time.monotonic() - began, held()))
    end, warm = samples[-1][0], WARM * samples[-1][0]
    middle = (warm + end) / 2
    earlier = [size for at, size in samples if warm <= at <= middle]
    return sum(counts), samples[-1][1] - max(earlier)


def resident(process: int | str) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def own_memory() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed could hide what leaks
    return resident("self")


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_an_engine_draws_on_and_on(provider: str, leak: bool, bundles: dict[str, Path]) -> None:
    if provider == "openvino" and not find_spec("openvino"):
        pytest.skip("no openvino: python -m pip install '.[openvino]'")
    opened, each = asks(bundles, EngineOptions(provider, threads=1))
    kept: list[Rows] = []

    def use(draw: random.Random) -> None:
        ask = draw.choice(each)
        made = opened[ask.name].generate([ask.label], **ask.options)
        assert np.array_equal(to_uint8(made.images)[0], ask.alone)
        if leak:
            kept.append(np.ones(LEAK, np.uint8))

    count, growth = grown(use, own_memory, SHORT if leak else SECONDS, THREADS)
    print(f"{provider}: {count} pictures, {growth >> 20} MiB more{', with a leak' * leak}")
    assert (growth > FLAT) == leak


@pytest.fixture(params=["serving", "tests.soak.leaky"])
def server(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Iterator[Server]:
    options = ("--queue", 1000, "--time-limit", 600)
    with running(*bundles.values(), *options, module=request.param) as found:
        yield found


def test_the_server_answers_on_and_on(server: Server, bundles: dict[str, Path]) -> None:
    _, each = asks(bundles, EngineOptions(threads=1))
    leak = "leaky" in str(server.process.args)

    def use(draw: random.Random) -> None:
        ask = draw.choice(each)
        height, width = ask.latent
        body: dict[str, Any] = {"prompt": str(ask.label), "model": ask.name, "seed": ask.seed}
        body |= {"latent": f"{width}x{height}", "num_inference_steps": 2}
        if ask.edit is None:
            answer = server.draw(**body)
        else:
            image, mask = map(png_bytes, ask.edit)
            fields = {key: str(value) for key, value in (body | {"strength": 0.6}).items()}
            files = {"image": image, "mask": mask}
            answer = server.client.post("/v1/images/edits", files=files, data=fields)
        assert answer.status_code == 200, answer.text
        pixels = pixels_of(answer.json()["data"][0]["b64_json"]).astype(int)
        assert np.abs(pixels - ask.alone).max() <= LEVELS

    seconds = SHORT if leak else SECONDS
    count, growth = grown(use, lambda: resident(server.process.pid), seconds, CLIENTS)
    print(f"server: {count} answers, {growth >> 20} MiB more{', with a leak' * leak}")
    assert (growth > FLAT) == leak
