"""The server beside the runtime: python -m benchmarks.serve build/mnist

The same requests one by one through the runtime, in a process of its own, then over HTTP from 1, 4,
16 and 64 clients: of mixed sizes, and all of one. Every answer's pixels are compared with the
runtime's. Pictures per second, their ratio to the runtime's, p50 and p99 of an answer's seconds;
then the server's memory while it draws --pictures more. Writes serve.json and serve.png.
"""

import argparse
import base64
import http.client
import io
import json
import multiprocessing
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime import cli, doctor, open_bundle
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import Size
from runtime.bundle.manifest import DEFAULT_BUNDLE
from runtime.engines import EngineOptions
from runtime.images.pixels import png_bytes, to_uint8
from runtime.progress import Bar

# Latent and image (height, width) of requests; the first is the one size.
SIZES: tuple[tuple[Size, Size], ...] = (
    ((8, 8), (32, 32)),
    ((6, 9), (24, 36)),
    ((8, 8), (64, 64)),
    ((10, 4), (80, 32)),
    ((16, 16), (64, 64)),
)
MARKS = 20  # of memory on the way


@dataclass(frozen=True)
class Asked:
    """One request: a picture of a seed's noise, index 0."""

    label: int
    seed: int
    latent: Size
    image: Size

    def body(self) -> bytes:
        """As the server reads it; there the width comes first."""
        size, latent = (f"{own[1]}x{own[0]}" for own in (self.image, self.latent))
        content = {"prompt": str(self.label), "seed": self.seed, "size": size, "latent": latent}
        return json.dumps(content).encode()


@dataclass(frozen=True)
class Row:
    """One load: `ratio` is pictures per second over those of the runtime one by one."""

    load: str
    clients: int
    rate: float
    ratio: float
    p50: float
    p99: float
    worst: int  # the largest difference of a pixel, 0 to 255


def requests(count: int, mixed: bool) -> list[Asked]:
    """`count` requests of the one size, or of all of them in turn."""
    sizes = SIZES if mixed else SIZES[:1]
    return [Asked(i % 10, i, *sizes[i % len(sizes)]) for i in range(count)]


def one_by_one(
    bundle: Path, threads: int, asked: Sequence[Asked]
) -> tuple[float, list[np.ndarray]]:
    """Seconds of the requests through the runtime, each up to its PNG, and their pixels."""
    opened = open_bundle(bundle, EngineOptions(threads=threads))

    def draw(own: Asked) -> np.ndarray:
        made = opened.generate([own.label], own.latent, image=own.image, seed=own.seed)
        pixels = to_uint8(made.images)[0]
        png_bytes(pixels)
        return pixels

    for own in asked[: len(SIZES)]:  # engines open, arenas grown
        draw(own)
    start = time.perf_counter()
    drawn = [draw(own) for own in asked]
    return time.perf_counter() - start, drawn


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[tuple[str, int]]:
    """A server of a bundle: where it listens."""
    line = [sys.executable, "-m", "serving", f"bench={bundle}", "--port", "0", *map(str, options)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            place = process.stdout.readline().rpartition("http://")[2].strip()
            host, _, port = place.partition(":")
            yield host, int(port)
        finally:
            process.send_signal(signal.SIGTERM)


def ask(place: tuple[str, int], asked: Sequence[Asked], clients: int, bar: Bar) -> Any:
    """Requests from so many clients at once: seconds in all, of each, and each one's PNG.

    A client sends its next request when its last one is answered.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(asked)):
        waiting.put(number)
    seconds, files = [0.0] * len(asked), [b""] * len(asked)
    failed: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(*place)
        headers = {"Content-Type": "application/json"}
        while not failed:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            start = time.perf_counter()
            body = asked[number].body()
            connection.request("POST", "/v1/images/generations", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            seconds[number] = time.perf_counter() - start
            if answer.status != 200:
                failed.append(text.decode())
                break
            files[number] = base64.b64decode(json.loads(text)["data"][0]["b64_json"])
            bar.update()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"the server refused a request: {failed[0]}")
    return time.perf_counter() - start, seconds, files


def worst(files: Sequence[bytes], drawn: Sequence[np.ndarray]) -> int:
    """The largest difference of a pixel between answers and what was to come."""
    found = 0
    for file, pixels in zip(files, drawn, strict=True):
        got = np.asarray(Image.open(io.BytesIO(file))).reshape(pixels.shape)
        found = max(found, int(np.abs(got.astype(int) - pixels).max()))
    return found


def memory(place: tuple[str, int]) -> float:
    """Bytes that the server holds, in its own words."""
    connection = http.client.HTTPConnection(*place)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("r2_memory_bytes "))


def measure(args: argparse.Namespace) -> None:
    """All loads, then memory; the report."""
    options = ("--threads", args.threads, "--workers", args.workers, "--batch", args.batch)
    rows: list[Row] = []
    spawned = multiprocessing.get_context("spawn")
    with serving(args.bundle, *options, "--queue", max(64, *args.clients)) as place:
        for load, mixed in (("one size", False), ("mixed", True)):
            asked = requests(args.requests, mixed)
            with ProcessPoolExecutor(1, spawned) as pool:
                alone, drawn = pool.submit(one_by_one, args.bundle, args.threads, asked).result()
            rate = len(asked) / alone
            rows.append(Row(f"{load}: the runtime", 1, rate, 1.0, 1 / rate, 1 / rate, 0))
            with Bar(total=len(asked) * len(args.clients), desc=load, unit="picture") as bar:
                ask(place, asked[: len(SIZES)], 1, bar)
                for clients in args.clients:
                    spent, seconds, files = ask(place, asked, clients, bar)
                    p99 = statistics.quantiles(seconds, n=100)[98]
                    rate = len(asked) / spent
                    found = (rate, rate * alone / len(asked), statistics.median(seconds), p99)
                    rows.append(Row(load, clients, *found, worst(files, drawn)))
        held = [memory(place)]
        with Bar(total=args.pictures, desc="memory", unit="picture") as bar:
            for _ in range(MARKS if args.pictures else 0):
                ask(place, requests(args.pictures // MARKS, True), args.clients[-1], bar)
                held.append(memory(place))
    report(args, rows, held)


def report(args: argparse.Namespace, rows: Sequence[Row], held: Sequence[float]) -> None:
    """A table, JSON and a picture."""
    table: list[list[object]] = [
        ["load", "clients", "pictures/s", "ratio", "p50 s", "p99 s", "off"]
    ]
    for row in rows:
        numbers = [f"{row.rate:.2f}", f"{row.ratio:.2f}", f"{row.p50:.3f}", f"{row.p99:.3f}"]
        table.append([row.load, row.clients, *numbers, row.worst])
    print(cli.table(table))
    marks = [f"{own / 1e6:.0f}" for own in held]
    print(f"memory over {args.pictures} pictures, MB: {' '.join(marks)}")
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "processor": doctor.processor(),
        "cores": os.cpu_count(),
        "requests": args.requests,
        "sizes": SIZES,
        "threads": args.threads,
        "workers": args.workers,
        "batch": args.batch,
        "pictures": args.pictures,
        "memory_bytes": held,
        "rows": [asdict(row) for row in rows],
    }
    with atomic_write(args.out / "serve.json") as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")
    draw(args.out / "serve.png", rows, held, args.pictures)


def draw(path: Path, rows: Sequence[Row], held: Sequence[float], pictures: int) -> None:
    """Pictures per second and answers' seconds over clients, and memory over pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 9), layout="constrained")
    rate, wait, kept = figure.subplots(3)
    for colour, load in enumerate(("one size", "mixed")):
        own = [row for row in rows if row.load == load]
        clients = [row.clients for row in own]
        style: dict[str, Any] = {"color": f"C{colour}", "label": load}
        rate.plot(clients, [row.rate for row in own], "o-", **style)
        alone = next(row.rate for row in rows if row.load == f"{load}: the runtime")
        rate.axhline(alone, color=f"C{colour}", linestyle=":", label=f"{load}: runtime one by one")
        wait.plot(clients, [row.p50 for row in own], "o-", **style)
        wait.plot(clients, [row.p99 for row in own], "s--", color=f"C{colour}")
    for axes, label in ((rate, "pictures per second"), (wait, "seconds: p50, dashed p99")):
        axes.set(xscale="log", xlabel="clients", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    shares = np.linspace(0, pictures, len(held))
    kept.plot(shares, [own / 1e6 for own in held], "o-")
    kept.set(xlabel="pictures drawn", ylabel="memory, MB", ylim=(0, None))
    kept.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.serve", __doc__)
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="a bundle (build/mnist)")
    add("--clients", type=cli.integers, default=[1, 4, 16, 64], help="at once (1,4,16,64)")
    add("--requests", type=cli.number(8, 100_000, int), default=128, help="of each load (128)")
    add("--pictures", type=cli.number(0, 1_000_000, int), default=2000, help="for memory (2000)")
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--workers", type=cli.number(1, 64, int), default=1, help="of the server (1)")
    add("--batch", type=cli.number(1, 4096, int), default=8, help="of the server (8)")
    add("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    cli.run(measure, p)


if __name__ == "__main__":
    main()
