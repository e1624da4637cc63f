"""Draw many pictures on one machine or a cluster: python -m serving.batch requests.jsonl OUT

A line of requests.jsonl is the body of /v1/images/generations with an "id", as in
{"id": "seven", "prompt": "7", "size": "256x128"}. OUT gets a file per picture and pictures.jsonl;
what is there and whole is not drawn again. Without --address Ray is started on this machine alone.
"""

import argparse
import contextlib
import json
import logging
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from runtime import cli, open_bundle
from runtime.bundle.files import atomic_write, check_folder, open_file, sha256
from runtime.bundle.interface import Size
from runtime.engines import EngineOptions
from runtime.errors import ArtefactError, IncompatibleError, ResourceError, ToolkitError, UsageError
from runtime.progress import Bar
from serving.encode import Format, encode
from serving.errors import ApiError
from serving.generation import Generation
from serving.limits import Limits
from serving.pictures import Model, Picture, batches, check_name, write_size

JOURNAL, TABLE = "pictures.jsonl", "pictures.parquet"
LIMITS = Limits(pixels=1 << 30, cells=1 << 24, steps=10_000, images=10_000)
PER_TASK, MOST_TASKS = 16, 4096  # pictures that are handed out, and lost with an actor, together
STORE = 256 << 20  # bytes of Ray's object store on one machine: pictures on their way to OUT
INSTALL = "python -m pip install 'ray[data]>=2.55' 'pyarrow>=22'"
log = logging.getLogger("runtime")


class Line(Generation, kw_only=True):
    """A line of requests."""

    id: str


class Drawn(Struct, frozen=True):
    """A row of pictures.jsonl: what is in `file`, with sizes as WIDTHxHEIGHT.

    `request` is the SHA-256 of what was asked and of the bundle, `sha256` that of the file.
    """

    id: str
    file: str
    seed: int
    index: int
    size: str
    latent: str
    request: str
    sha256: str


class Task(Struct, frozen=True):
    """One picture to be drawn: the fields of `Picture` after its model, and its file's."""

    id: str
    file: str
    picture: tuple[Any, ...]
    form: Format
    quality: int | None
    request: str

    @property
    def cost(self) -> tuple[int, Size, Size, str]:
        """What tasks are sorted by: those that are diffused together, the longest first."""
        own = self.picture[0]
        cells = own.latent[0] * own.latent[1] * own.steps
        return -cells, own.latent, own.image, repr(own)


class Draw:
    """An actor: a bundle that stays open, and pictures drawn from it.

    Ray lays the bundle's folder where its workers run, on whichever machine that is.
    """

    def __init__(self, name: str, options: EngineOptions, manifest: str, batch: int):
        self.model = Model(name, open_bundle(Path.cwd(), options, manifest))
        self.batch = batch

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Pickled tasks -> the bytes of each one's file, or why there are none."""
        tasks: list[Task] = [pickle.loads(row) for row in rows["task"]]
        pictures = [Picture(self.model, *task.picture) for task in tasks]
        rest = iter(tasks)
        found: list[tuple[bytes, str]] = []
        for group in batches(pictures, self.batch):
            found += self.drawn([*islice(rest, len(group))], group)
        files, errors = zip(*found, strict=True)
        return {"task": [*rows["task"]], "data": [*files], "error": [*errors]}

    def drawn(
        self, tasks: Sequence[Task], pictures: Sequence[Picture]
    ) -> Iterator[tuple[bytes, str]]:
        """A batch's files, each with what went wrong; where all fail each is tried alone."""
        try:
            latents = self.model.diffuse(pictures, lambda _: None)
        except ToolkitError as error:
            if len(tasks) == 1:
                yield b"", str(error)
                return
            for task, picture in zip(tasks, pictures, strict=True):
                yield from self.drawn([task], [picture])
            return
        for number, (task, picture) in enumerate(zip(tasks, pictures, strict=True)):
            try:
                own = latents[number : number + 1]
                pixels = self.model.draw(picture, own, picture.settings.image)
            except ToolkitError as error:
                yield b"", str(error)
                continue
            yield encode(pixels, task.form, picture.metadata, task.quality), ""


def planned(path: Path, model: Model) -> list[Task]:
    """Every picture that a file of requests asks for, checked, in its order.

    Raises UsageError and ArtefactError naming the line.
    """
    tasks: dict[str, Task] = {}
    with open_file(path, "a request per line", "Give the path of a file of requests") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                own = [*line_tasks(text, model)]
            except (UsageError, ApiError, msgspec.DecodeError) as error:
                raise UsageError(f"{path} line {number}: {error}") from None
            for task in own:
                if task.file in tasks:
                    raise UsageError(
                        f"{path} line {number}: {task.file} is an earlier line's file as well; "
                        "expected every id once"
                    )
                tasks[task.file] = task
    if not tasks:
        raise ArtefactError(f"{path}: holds no request; expected one per line, as JSON")
    return [*tasks.values()]


def line_tasks(text: bytes, model: Model) -> Iterator[Task]:
    """A line's pictures; raises UsageError, ApiError and msgspec.DecodeError.

    A seed that is not given follows from the id, so that it is the same when it is run again.
    """
    line = msgspec.json.decode(text, type=Line, strict=False)
    check_name("id", line.id)
    if line.seed is None:
        line.seed = int(sha256(line.id.encode())[:8], 16)
    pictures = line.asked().pictures({model.name: model}, LIMITS)
    form = line.output_format or "png"
    for number, picture in enumerate(pictures):
        own = picture.settings, picture.label, picture.seed, picture.index
        wanted = [asdict(picture.settings), repr(picture.label), *own[2:]]
        wanted += [form, line.output_compression, model.bundle.manifest.sha256]
        name = line.id if len(pictures) == 1 else f"{line.id}-{number}"
        digest = sha256(json.dumps(wanted).encode())
        yield Task(line.id, f"{name}.{form}", own, form, line.output_compression, digest)


def whole(out: Path, tasks: Sequence[Task]) -> dict[str, Drawn]:
    """What earlier runs have drawn of these tasks, by its file: still there, byte for byte."""
    wanted = {task.file: task.request for task in tasks}
    found: dict[str, Drawn] = {}
    journal = out / JOURNAL
    if not journal.exists():
        return found
    with open_file(journal, "rows of pictures", "Choose another OUT, or remove the file") as file:
        for text in file:
            with contextlib.suppress(msgspec.DecodeError):  # cut off where a run was stopped
                row = msgspec.json.decode(text, type=Drawn)
                if wanted.get(row.file) == row.request:
                    found[row.file] = row
    for name, row in [*found.items()]:
        try:
            data = (out / name).read_bytes()
        except OSError:
            data = b""
        if sha256(data) != row.sha256:
            del found[name]
    return found


@contextlib.contextmanager
def connected(args: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Ray, joined at --address or started here; workers find the bundle's folder and our code."""
    import ray

    import runtime
    import serving

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": args.address}
    if args.address is None:
        cores = args.actors * max(1, args.threads)
        options |= {
            "address": "local",
            "num_cpus": cores,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    shipped = {"working_dir": str(folder.resolve()), "py_modules": [runtime, serving]}
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(**options, **quiet, runtime_env=shipped)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(f"--address {args.address}: no Ray there ({error})") from None
    try:
        for each, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(each, handler)
        yield
    finally:
        ray.shutdown()


def drawing(args: argparse.Namespace, model: Model, tasks: Sequence[Task]) -> Iterator[Any]:
    """Rows of a task, its file's bytes and what went wrong, as they come."""
    import ray.data

    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"task": pickle.dumps(task)} for task in sorted(tasks, key=lambda task: task.cost)]
    blocks = max(1, min(MOST_TASKS, -(-len(rows) // PER_TASK)))
    manifest = model.bundle.manifest.sha256
    given = (model.name, cli.engine_options(args), manifest, args.batch)
    return iter(
        ray.data.from_items(rows, override_num_blocks=blocks)
        .map_batches(
            Draw,
            fn_constructor_args=given,
            batch_size=None,  # a block
            num_cpus=max(1, args.threads),
            num_gpus=args.gpus,
            compute=ray.data.ActorPoolStrategy(size=min(args.actors, blocks)),
        )
        .iter_rows()
    )


def batch(args: argparse.Namespace) -> None:
    """Check every line, draw what is missing, write the rows in the order of the requests."""
    missing = [name for name in ("ray", "pyarrow") if find_spec(name) is None]
    if missing:
        raise IncompatibleError(
            f"{missing[0]} is not installed; expected it for batches. Install it with: {INSTALL}"
        )
    args.threads = args.threads or 1
    bundle = cli.open_bundle(args)
    model = Model(bundle.manifest.folder.resolve().name, bundle)
    tasks = planned(args.requests, model)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{args.out}: cannot be a folder ({error.strerror})") from None
    check_folder(args.out)
    done = whole(args.out, tasks)
    left = [task for task in tasks if task.file not in done]
    if len(left) < len(tasks):
        log.warning("%s of %s pictures are there and whole", len(tasks) - len(left), len(tasks))
    failed = draw(args, model, left, done) if left else {}
    rows = [done[task.file] for task in tasks if task.file in done]
    with atomic_write(args.out / JOURNAL) as file:
        file.writelines(msgspec.json.encode(row) + b"\n" for row in rows)
    if args.parquet:
        write_table(args.out / TABLE, rows)
    print(f"{len(rows)} pictures in {args.out}")
    if failed:
        name, reason = next(iter(failed.items()))
        raise ResourceError(f"{len(failed)} pictures were not drawn, {name} first: {reason}")


def draw(
    args: argparse.Namespace, model: Model, tasks: Sequence[Task], done: dict[str, Drawn]
) -> dict[str, str]:
    """Draw tasks into OUT, and a row of each into `done` and the journal at once.

    Gives what went wrong by its file.
    """
    failed: dict[str, str] = {}
    bar = Bar(total=len(tasks), desc="batch", unit="picture")
    with connected(args, model.bundle.manifest.folder), journal(args.out, done) as add, bar:
        for row in drawing(args, model, tasks):
            task: Task = pickle.loads(row["task"])
            if row["error"]:
                failed[task.file] = row["error"]
            else:
                with atomic_write(args.out / task.file) as file:
                    file.write(row["data"])
                own, _, seed, index = task.picture
                sizes = write_size(own.image), write_size(own.latent)
                hashes = task.request, sha256(row["data"])
                done[task.file] = Drawn(task.id, task.file, seed, index, *sizes, *hashes)
                add(done[task.file])
            bar.update()
    return failed


@contextlib.contextmanager
def journal(out: Path, done: dict[str, Drawn]) -> Iterator[Any]:
    """What adds a row to pictures.jsonl, which begins with those that are there."""
    with atomic_write(out / JOURNAL) as file:
        file.writelines(msgspec.json.encode(row) + b"\n" for row in done.values())
    with (out / JOURNAL).open("ab", buffering=0) as kept:
        yield lambda row: kept.write(msgspec.json.encode(row) + b"\n")


def write_table(path: Path, rows: Sequence[Drawn]) -> None:
    """The rows as Parquet."""
    import pyarrow
    from pyarrow import parquet

    with atomic_write(path) as file:
        columns = [msgspec.structs.asdict(row) for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(columns), file)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("serving.batch", __doc__)
    add = p.add_argument
    add("requests", type=Path, help="a request per line, as JSON")
    add("out", type=Path, metavar="OUT", help="folder of the pictures and pictures.jsonl")
    add("--address", help="of a Ray cluster, as in auto or ray://HOST:10001 (none: started here)")
    add("--actors", type=cli.number(1, 10_000, int), default=2, help="bundles that draw (2)")
    add("--gpus", type=cli.number(0, 64), default=0, help="of each actor; 0.5 lets two share one")
    add("--batch", type=cli.number(1, 4096, int), default=8, help="pictures at once, at most (8)")
    add("--parquet", action="store_true", help=f"also write {TABLE}")
    cli.add_engine_options(p)
    return p


if __name__ == "__main__":
    from serving.batch import batch as main  # so that Ray finds what it pickles by its own name

    cli.run(main, parser())
