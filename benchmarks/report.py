"""What a comparison found: rows, a table, JSON and two pictures."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, GEMMS, Measured, Prepared, Size
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import relative_error

REFERENCE = CONTENDERS[0]
PEERS = tuple(contender.name for contender in CONTENDERS if contender.peer)
Runs = dict[Size, dict[str, list[Measured]]]


@dataclass(frozen=True)
class Row:
    """One contender at one size. `faster`: the median of each peer over its own median.

    `gemm_share`: counted FLOPs per second of the fastest step over the machine's rate in fp32.
    `peak_bytes` and `own_bytes`: resident memory, in all and since the model was loaded.
    `file_bytes`: the graph's file, None where there is none.
    """

    contender: str
    height: int
    width: int
    minimum: float
    median: float
    error: float
    flops: int
    gemm_share: float
    peak_bytes: int
    own_bytes: int
    file_bytes: int | None
    faster: dict[str, float]

    @property
    def tokens(self) -> int:
        return self.height * self.width


def gemm_rates(prepared: Prepared, runs: Runs, name: str) -> list[float]:
    """FLOPs per second of the fastest product of every process that ran one."""
    return [
        prepared.flops["gemm"][size] / min(run.seconds)
        for size, own in runs.items()
        for run in own[name]
    ]


def rows_of(prepared: Prepared, runs: Runs) -> list[Row]:
    """Every contender at every size, in the order of CONTENDERS."""
    rate = max(gemm_rates(prepared, runs, GEMMS[0].name))
    rows = []
    for size, own in runs.items():
        times = {name: [s for run in found for s in run.seconds] for name, found in own.items()}
        wanted = own[REFERENCE.name][0].eps
        for contender in (c for c in CONTENDERS if c.name in own):
            name, found = contender.name, own[contender.name]
            median, flops = statistics.median(times[name]), prepared.flops[contender.graph][size]
            is_graph = not contender.engine.startswith("torch")
            rows.append(
                Row(
                    name,
                    *size,
                    min(times[name]),
                    median,
                    relative_error(found[0].eps.reshape(wanted.shape), wanted),
                    flops,
                    flops / min(times[name]) / rate,
                    max(run.peak for run in found),
                    max(run.own for run in found),
                    prepared.file(contender.graph).stat().st_size if is_graph else None,
                    {p: statistics.median(times[p]) / median for p in PEERS if p in own},
                )
            )
    return rows


def as_text(rows: list[Row], rates: dict[str, list[float]]) -> str:
    """A table per size, then the machine's rates and how evenly time grows with tokens."""
    peers = [peer for peer in PEERS if peer in rows[0].faster]
    heading: list[object] = ["", "min s", "median s", "µs/token", "of GEMM"]
    heading += ["peak MB", "own MB", "file MB", "error"]
    lines = []
    for size in dict.fromkeys((row.height, row.width) for row in rows):
        table: list[list[object]] = [
            heading + [f"vs {peer.removeprefix('torch ')}" for peer in peers]
        ]
        for row in (row for row in rows if (row.height, row.width) == size):
            times = [f"{row.minimum:.4f}", f"{row.median:.4f}"]
            times += [f"{row.minimum / row.tokens * 1e6:.1f}", f"{row.gemm_share:.0%}"]
            memory = [f"{row.peak_bytes / 1e6:.0f}", f"{row.own_bytes / 1e6:.0f}"]
            memory.append(f"{row.file_bytes / 1e6:.1f}" if row.file_bytes else "")
            ratios = [f"{row.faster[peer]:.2f}" for peer in peers]
            table.append([row.contender, *times, *memory, f"{row.error:.0e}", *ratios])
        lines += [size_name(size), cli.table(table), ""]
    for name, found in rates.items():
        low, high = min(found) / 1e9, max(found) / 1e9
        lines.append(f"{name}: {high:.0f} GFLOP/s at best, {low:.0f} in the slowest process")
    return "\n".join([*lines, *evenness(rows)])


def evenness(rows: list[Row]) -> Iterable[str]:
    """Per contender, the largest time per token over the smallest, among all sizes."""
    for name in dict.fromkeys(row.contender for row in rows):
        each = [row.minimum / row.tokens for row in rows if row.contender == name]
        if len(each) > 1:
            yield f"{name}: time per token within {max(each) / min(each):.2f}×"


def write_json(
    path: Path, rows: list[Row], rates: dict[str, list[float]], about: dict[str, Any]
) -> None:
    """All rows and rates, with what they were measured on."""
    content = {
        **about,
        "gemm_flops_per_second": rates,
        "memory": "bytes resident at the peak; own: less those before the model was loaded",
        "rows": [vars(row) for row in rows],
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def draw(folder: Path, rows: list[Row], rate: float) -> None:
    """`time.png` (seconds over tokens, with the limit) and `memory.png` (MB over pixels)."""
    flops = {row.tokens: row.flops for row in rows if row.contender.startswith("ours")}
    limit = {tokens: count / rate for tokens, count in flops.items()}
    note = f"limit: {rate / 1e9:.0f} GFLOP/s"
    time = {"seconds per step (minimum)": lambda row: row.minimum}
    memory = {"peak memory, MB": lambda row: row.peak_bytes / 1e6}
    for file, measure, line in (("time.png", time, limit), ("memory.png", memory, {})):
        ((label, value),) = measure.items()
        _plot(folder / file, rows, label, value, line, note)


def _plot(
    path: Path, rows: list[Row], label: str, value: Any, limit: dict[int, float], note: str
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row.contender for row in rows)):
        own = [row for row in rows if row.contender == name]
        points = [row.tokens for row in own], [value(row) for row in own]
        style = "o-" if name.startswith("ours") else "s--"
        axes.plot(*points, style, color=f"C{number}", label=name, linewidth=1.4, markersize=4)
    if limit:
        axes.plot([*limit], [*limit.values()], "k:", label=note, linewidth=1.2)
    sizes = {row.tokens: f"{row.height}×{row.width}" for row in rows}
    axes.set(xscale="log", yscale="log", xlabel="latent pixels (tokens)", ylabel=label)
    axes.set_xticks([*sizes], [*sizes.values()])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")
