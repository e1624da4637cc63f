"""What many pictures cost: python -m benchmarks.scaling build/mnist

Processor seconds of a picture on one thread, part by part and by size, pictures a day of a core and
cores for a million pictures an hour; memory of a process; how fast one process writes files. With
--actors-draw N also N pictures by serving.batch: two actors of one thread beside one of two.
Writes scaling.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runtime import cli, doctor, open_bundle
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE
from runtime.progress import Bar
from serving.asked import Asked
from serving.encode import encode
from serving.limits import Limits
from serving.pictures import Model, write_size

# Latent and image, (height, width).
SIZES: tuple[tuple[Size, Size], ...] = (
    ((8, 8), (64, 64)),
    ((8, 8), (256, 256)),
    ((16, 16), (64, 64)),
    ((16, 16), (512, 512)),
)
DAY, MILLION = 86_400, 1_000_000
LIMITS = Limits(images=4096)
ARRANGEMENTS = ((2, 1), (1, 2))  # actors, threads of each
FILES = 200  # that are written to see how fast that is


@dataclass(frozen=True)
class Row:
    """One size and batch: processor seconds of a picture's parts, and bytes of its PNG."""

    latent: Size
    image: Size
    batch: int
    diffuse: float
    decode: float
    png: float
    bytes: float

    @property
    def seconds(self) -> float:
        """Of a picture, all parts."""
        return self.diffuse + self.decode + self.png


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of `work`, of all threads, and what it gave."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def cost(model: Model, latent: Size, image: Size, batch: int, rounds: int) -> Row:
    """The medians of several batches, after one that opens the graphs."""
    own = Asked("7", count=batch, latent=latent, image=image, seed=1)
    pictures = own.pictures({model.name: model}, LIMITS)
    parts: list[tuple[float, float, float, float]] = []
    for _ in range(rounds + 1):
        diffuse, latents = spent(lambda: model.diffuse(pictures, lambda _: None))
        decode = png = size = 0.0
        for number, picture in enumerate(pictures):
            one = latents[number : number + 1]
            seconds, pixels = spent(partial(model.draw, picture, one, image))
            decode += seconds
            seconds, file = spent(partial(encode, pixels, "png", picture.metadata))
            png, size = png + seconds, size + len(file)
        parts.append((diffuse, decode, png, size))
    each = (statistics.median(own) / batch for own in zip(*parts[1:], strict=True))
    return Row(latent, image, batch, *each)


def writing(folder: Path, size: int) -> float:
    """Seconds of a file of `size` bytes, whole and flushed to the disk."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        begun = time.perf_counter()
        for number in range(FILES):
            with atomic_write(Path(scratch, f"{number}.png")) as file:
                file.write(bytes(size))
        return (time.perf_counter() - begun) / FILES


def drawn(args: argparse.Namespace, actors: int, threads: int) -> float:
    """Pictures per second of serving.batch between its first and its last file."""
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        requests, out = Path(scratch, "requests.jsonl"), Path(scratch, "out")
        size = {"size": write_size(SIZES[0][1]), "latent": write_size(SIZES[0][0])}
        lines = (
            {"id": f"p{number}", "prompt": str(number % 10), "seed": number, **size}
            for number in range(args.actors_draw)
        )
        requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
        line = [sys.executable, "-m", "serving.batch", str(requests), str(out), "--quiet"]
        line += ["--engine", str(args.bundle), "--provider", args.provider]
        line += ["--actors", str(actors), "--threads", str(threads)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        times = sorted(path.stat().st_mtime for path in out.glob("*.png"))
        return (len(times) - 1) / (times[-1] - times[0])


def measure(args: argparse.Namespace) -> None:
    """Every part, a table, and the JSON."""
    args.threads = 1
    model = Model("bundle", open_bundle(args.bundle, cli.engine_options(args)))
    rows = []
    for latent, image in Bar(SIZES, desc="sizes"):
        for batch in (1, args.batch):
            rows.append(cost(model, latent, image, batch, args.rounds))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    args.out.mkdir(parents=True, exist_ok=True)
    file = writing(args.out, int(rows[0].bytes))
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds if args.actors_draw else 0):  # in turn, since machines change
        for actors, threads in ARRANGEMENTS:
            own = rates.setdefault(f"{actors} actors of {threads} threads", [])
            own.append(drawn(args, actors, threads))
    head = ["latent", "image", "batch", "diffuse", "decode", "PNG", "s", "a day and core"]
    table: list[list[object]] = [[*head, "cores for 1M/h", "bytes"]]
    for row in rows:
        parts = [f"{own:.4f}" for own in (row.diffuse, row.decode, row.png, row.seconds)]
        counts = [f"{DAY / row.seconds:,.0f}", f"{MILLION * row.seconds / 3600:.1f}"]
        sizes = [size_name(row.latent), size_name(row.image), row.batch]
        table.append([*sizes, *parts, *counts, f"{row.bytes:.0f}"])
    print(cli.table(table))
    print(f"memory of this process: {held / 1e6:.0f} MB; a file is written in {file * 1e3:.2f} ms")
    for name, found in rates.items():
        each = ", ".join(f"{own:.1f}" for own in found)
        print(f"{name}: {statistics.median(found):.1f} pictures/s ({each})")
    about = {
        "processor": doctor.processor(),
        "cores": os.cpu_count(),
        "provider": args.provider,
        "precision": args.precision or "fp32",
        "rows": [asdict(row) for row in rows],
        "memory_bytes": held,
        "file_seconds": file,
        "pictures_per_second": rates,
    }
    with atomic_write(args.out / "scaling.json") as kept:
        kept.write(json.dumps(about, indent=1).encode() + b"\n")


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.scaling", __doc__)
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="a bundle (build/mnist)")
    add("--batch", type=cli.number(2, 4096, int), default=8, help="pictures diffused at once (8)")
    add("--rounds", type=cli.number(1, 1000, int), default=3, help="of which medians are taken (3)")
    many = "pictures that serving.batch draws in each arrangement of actors (0: none)"
    add("--actors-draw", type=cli.number(0, 1_000_000, int), default=0, metavar="N", help=many)
    add("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    cli.add_provider_options(p)
    cli.run(measure, p)


if __name__ == "__main__":
    main()
