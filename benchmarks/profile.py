"""Where a step's time goes on ONNX Runtime: python -m benchmarks.profile

The step graph in the forms that the runtime opens, fp32 in chunks and int8, profiled node by node
by ONNX Runtime itself, in turns, the fastest process of each kept. Width and blocks as published,
random weights, guidance pair, batch 1, 2 threads. Prints milliseconds and shares of each kind of
node, and writes profile.json and profile.png. Profiling costs each node a little, small ones most.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.contenders import Prepared, Size, add_options, prepare
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import size_name
from runtime.engines.onnxruntime import load_library
from runtime.progress import Bar

SIZES = [(16, 16), (128, 128)]
FORMS = {"fp32, chunks": "r2id.cpu", "int8": "r2id.int8"}
WARM_UP = 2
STEPS = 10
EIGHT_BITS = "products in 8 bits"
QUANTISING = "quantising and back"
FP32 = "products in fp32, sums included"
PASSES = "passes over tokens and the rest"
KINDS = {
    EIGHT_BITS: ("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"),
    QUANTISING: ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    FP32: ("MatMul", "FusedMatMul", "Gemm"),
}
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops}
HOLLOW = ("Scan",)  # its time is that of the nodes in it, which are there too


def node_times(
    prepared: Prepared, graph: str, size: Size, threads: int, folder: Path
) -> dict[str, float]:
    """Milliseconds a step by operator; for a process of its own."""
    library = load_library()
    settings = library.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / f"{graph}-{size_name(size)}")
    model = str(prepared.file(graph))
    session = library.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    feed = prepared.inputs(graph, size)
    for _ in range(WARM_UP + STEPS):
        session.run(None, feed)
    return by_operator(json.loads(Path(session.end_profiling()).read_text()))


def by_operator(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a step of a profile's nodes by operator, the first steps left out."""
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    total: Counter[str] = Counter()
    for event in events:
        operator = event.get("args", {}).get("op_name")
        timed = event["name"].endswith("_kernel_time") and event["ts"] >= runs[WARM_UP]
        if timed and operator not in HOLLOW:
            total[operator] += event["dur"]
    return {name: micros / 1e3 / (len(runs) - WARM_UP) for name, micros in total.items()}


def by_kind(operators: dict[str, float]) -> dict[str, float]:
    """The same by kind, in the order in which kinds are shown."""
    found = dict.fromkeys((*KINDS, PASSES), 0.0)
    for operator, milliseconds in operators.items():
        found[KIND_OF.get(operator, PASSES)] += milliseconds
    return found


def profile(args: argparse.Namespace) -> None:
    """Export once, profile every form at every size, print, write and draw."""
    make_folder(args.out)
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as name, pool:
        prepared = pool.submit(prepare, Path(name), args.config, args.sizes).result()
        turns = [(size, form) for size in args.sizes for form in FORMS]
        for size, form in Bar(turns * (args.rounds or 3), desc="profile", unit="run"):
            given = prepared, FORMS[form], size, args.threads, Path(name)
            own = pool.submit(node_times, *given).result()
            known = found[size_name(size)].get(form, own)
            # The fastest process is the one that was disturbed least.
            found[size_name(size)][form] = min(own, known, key=lambda ops: sum(ops.values()))
    print(as_text(found))
    with atomic_write(args.out / "profile.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    draw(args.out / "profile.png", found)
    print(f"{args.out}: profile.json, profile.png")


def as_text(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table per size: a row per kind, a column per form."""
    lines = []
    for size, forms in found.items():
        kinds = {form: by_kind(own) for form, own in forms.items()}
        table: list[list[object]] = [["", *forms]]
        for kind in (*KINDS, PASSES):
            cells = [(own[kind], sum(own.values())) for own in kinds.values()]
            table.append([kind, *(f"{ms:.1f} ms {ms / total:.0%}" for ms, total in cells)])
        table.append(["all nodes", *(f"{sum(own.values()):.1f} ms" for own in kinds.values())])
        lines += [size, cli.table(table), ""]
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """A bar per form and size, its kinds side by side, relative to fp32's bar of that size."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 1.1 + 0.9 * len(found)), layout="constrained")
    axes = figure.subplots()
    names: list[str] = []
    first = next(iter(FORMS))
    for size, forms in found.items():
        whole = sum(forms[first].values())
        for form, own in forms.items():
            left = 0.0
            for number, (_, milliseconds) in enumerate(by_kind(own).items()):
                width = milliseconds / whole
                axes.barh(len(names), width, left=left, color=f"C{number}")
                left += width
            names.append(f"{size}, {form}")
    kinds = [Patch(color=f"C{n}", label=kind) for n, kind in enumerate((*KINDS, PASSES))]
    figure.legend(handles=kinds, loc="outside upper center", ncols=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time of all nodes, fp32 = 1")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.profile", __doc__)
    p.add_argument("--sizes", type=cli.sizes, default=SIZES, help="HxW,… (16x16,128x128)")
    add_options(p)
    cli.run(profile, p)


if __name__ == "__main__":
    main()
