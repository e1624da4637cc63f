"""What a comparison found: rows, a table, JSON and pictures."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Measured, Prepared, Size
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.interface import size_name
from runtime.bundle.manifest import relative_error

FEW = 10  # lines of a chart that colours tell apart at a glance
Runs = dict[Size, dict[str, list[Measured]]]
# FLOPs per second that the machine's products reach in a contender's precision; None if unmeasured.
Rate = Callable[[Contender], float | None]


@dataclass(frozen=True)
class Failed:
    """A contender that gave nothing at some sizes, and why; at none where it failed after all."""

    contender: str
    sizes: tuple[Size, ...]
    reason: str


@dataclass(frozen=True)
class Row:
    """One contender at one size. `faster`: the median of each peer over its own median.

    `error`: of eps, relative to the first contender's, None where that has none. `gemm_share`:
    counted FLOPs per second of the fastest step over the machine's rate. `peak_bytes` and
    `own_bytes`: memory, in all and since the model was loaded. `file_bytes`: the graph's file,
    None where there is none.
    """

    contender: str
    height: int
    width: int
    minimum: float
    median: float
    error: float | None
    flops: int
    gemm_share: float | None
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
        prepared.work("gemm", size) / min(run.seconds)
        for size, own in runs.items()
        for run in own[name]
    ]


def rows_of(
    prepared: Prepared, runs: Runs, contenders: Sequence[Contender], rate: Rate
) -> list[Row]:
    """Every contender at every size where it ran, in their order; errors are to the first's eps."""
    rows = []
    for size, own in runs.items():
        medians = {
            name: statistics.median(s for run in found for s in run.seconds)
            for name, found in own.items()
            if found
        }
        peers = {c.name: medians[c.name] for c in contenders if c.peer and c.name in medians}
        first = own.get(contenders[0].name)
        for contender in (c for c in contenders if c.name in medians):
            name, found = contender.name, own[contender.name]
            minimum = min(s for run in found for s in run.seconds)
            flops, most = prepared.work(contender.graph, size), rate(contender)
            error = None
            if first:
                wanted = first[0].eps
                error = relative_error(found[0].eps.reshape(wanted.shape), wanted)
            is_graph = not contender.engine.startswith("torch")
            rows.append(
                Row(
                    name,
                    *size,
                    minimum,
                    medians[name],
                    error,
                    flops,
                    flops / minimum / most if most else None,
                    max(run.peak for run in found),
                    max(run.own for run in found),
                    prepared.file(contender.graph).stat().st_size if is_graph else None,
                    {peer: median / medians[name] for peer, median in peers.items()},
                )
            )
    return rows


def as_text(rows: list[Row], rates: dict[str, list[float]], failed: Sequence[Failed] = ()) -> str:
    """A table per size, then the machine's rates, how evenly time grows, and what did not run."""
    peers = [*dict.fromkeys(peer for row in rows for peer in row.faster)]
    heading: list[object] = ["", "min s", "median s", "steps/s", "µs/token", "of GEMM"]
    heading += ["peak MB", "own MB", "file MB", "error"]
    lines = []
    for size in dict.fromkeys((row.height, row.width) for row in rows):
        table: list[list[object]] = [
            heading + [f"vs {peer.removeprefix('torch ')}" for peer in peers]
        ]
        for row in (row for row in rows if (row.height, row.width) == size):
            times = [f"{row.minimum:.4f}", f"{row.median:.4f}", f"{1 / row.median:.4g}"]
            times += [f"{row.minimum / row.tokens * 1e6:.1f}", shown(row.gemm_share, ".0%")]
            memory = [f"{row.peak_bytes / 1e6:.0f}", f"{row.own_bytes / 1e6:.0f}"]
            memory.append(f"{row.file_bytes / 1e6:.1f}" if row.file_bytes else "")
            ratios = [shown(row.faster.get(peer), ".2f") for peer in peers]
            table.append([row.contender, *times, *memory, shown(row.error, ".0e"), *ratios])
        lines += [size_name(size), cli.table(table), ""]
    for name, found in ((name, found) for name, found in rates.items() if found):
        low, high = min(found) / 1e9, max(found) / 1e9
        lines.append(f"{name}: {high:.0f} GFLOP/s at best, {low:.0f} in the slowest process")
    lines += evenness(rows)
    for one in failed:
        sizes = ", ".join(map(size_name, one.sizes))
        where = f"did not run at {sizes}" if sizes else "ran, and then"
        lines.append(f"{one.contender}: {where}: {one.reason}")
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def evenness(rows: list[Row]) -> Iterable[str]:
    """Per contender, the largest time per token over the smallest, among all sizes."""
    for name in dict.fromkeys(row.contender for row in rows):
        each = [row.minimum / row.tokens for row in rows if row.contender == name]
        if len(each) > 1:
            yield f"{name}: time per token within {max(each) / min(each):.2f}×"


def write_json(
    path: Path, rows: list[Row], failed: Sequence[Failed], about: dict[str, Any]
) -> None:
    """All rows and what did not run, with what they were measured on."""
    content = {
        **about,
        "rows": [vars(row) for row in rows],
        "failed": [vars(one) for one in failed],
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


@dataclass(frozen=True)
class Panel:
    """A chart over latent sizes: what of a row it shows, its axis' label, and curves of limits."""

    label: str
    value: Callable[[Row], float]
    limits: dict[str, dict[int, float]]


def limit(rows: list[Row], rate: float) -> dict[int, float]:
    """Seconds that a step's products alone take at a rate, by tokens."""
    return {row.tokens: row.flops / rate for row in rows if row.contender.startswith("ours")}


def memory_panel() -> Panel:
    return Panel("peak memory, MB", lambda row: row.peak_bytes / 1e6, {})


def draw(path: Path, rows: list[Row], panels: Sequence[Panel], title: str = "") -> None:
    """Panels above each other, a line per contender: ours solid, a colour for each kind."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [*dict.fromkeys(row.contender for row in rows)]
    many = len(names) > FEW
    colours = mpl.colormaps["turbo" if many else "tab10"].resampled(max(len(names), FEW))
    figure = Figure(figsize=(7, 4.6 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=9)
    sizes = {row.tokens: f"{row.height}×{row.width}" for row in rows}
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row.contender == name]
            points = [row.tokens for row in own], [panel.value(row) for row in own]
            style = "o-" if name.startswith("ours") else "s--"
            axes.plot(
                *points, style, color=colours(number), label=name, linewidth=1.4, markersize=4
            )
        for name, curve in panel.limits.items():
            axes.plot([*curve], [*curve.values()], "k:", label=name, linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlabel="latent pixels (tokens)", ylabel=panel.label)
        axes.set_xticks([*sizes], [*sizes.values()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5 if many else 7, ncols=1 + many)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")
