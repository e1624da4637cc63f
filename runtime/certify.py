"""Certify a bundle on this machine: python -m runtime.certify build/mnist.

Every precision and plan of the bundle, on every provider that is here, at sizes that stand for
all, beside the fp32 graphs on ONNX Runtime's CPU provider: what graphs give for the same inputs,
how far a whole trajectory drifts, seconds of a first and of a second request, memory. Each runs in
a process of its own. Writes certificate.json and certificate.png; exit code 6 where a bound is
broken.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.errors import (
    IncompatibleError,
    NumericalError,
    ResourceError,
    ToolkitError,
    UsageError,
)
from runtime.providers import PLANS, PROVIDERS

if TYPE_CHECKING:
    from runtime.bundle.manifest import Manifest
    from runtime.certificate import Case, Contender, SizeClass

FORMAT = 1
CELL = 96  # pixels of the longer side of a picture in certificate.png
MARGIN, LINE = 6, 14  # pixels
Rows = dict["Contender", list[dict[str, Any]]]


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.certify", __doc__)
    add = p.add_argument
    cli.add_bundle(p)
    add("--quick", action="store_true", help="three sizes and few steps: in a minute")
    providers = f"what runs the graphs, or {PLANS}; may be repeated (all that are here)"
    add("--provider", choices=(*PROVIDERS, PLANS), action="append", help=providers)
    precision = "which precision; may be repeated (all of the bundle)"
    add("--precision", choices=cli.PRECISIONS, action="append", help=precision)
    sizes = "latent sizes, as in 8x8,16x9 (those that stand for all)"
    add("--sizes", type=cli.sizes, metavar="HxW,…", help=sizes)
    steps = "of a trajectory (the solver's own; with --quick 6)"
    add("--steps", type=cli.number(1, 1000, int), help=steps)
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--out", type=Path, default=Path("certificate"), help="folder of the certificate")
    add("--expect-sha256", help="refuse a manifest of any other SHA-256")
    return p


def certify(args: argparse.Namespace) -> None:
    """Measure, write the certificate and print its table.

    Raises NumericalError where a bound is broken, else the error of what could not be measured
    though it should have been.
    """
    from runtime.bundle.folders import make_folder
    from runtime.bundle.manifest import find_bundle, read_manifest
    from runtime.certificate import size_classes, sized

    manifest = read_manifest(find_bundle(args.bundle), args.expect_sha256)
    for precision in args.precision or ():
        check_precision(manifest, precision, args.provider)
    interface = manifest.interface
    sizes = size_classes(interface, args.quick)
    if args.sizes:
        sizes = [sized(interface, size) for size in args.sizes]
    make_folder(args.out)
    steps = args.steps or (6 if args.quick else None)
    found, references = measure(manifest, chosen(manifest, args), sizes, steps, args)
    report = as_report(manifest, found, sizes, steps, args)
    write(args.out, report, found, references, sizes)
    print(as_text(report))
    print(f"\n{args.out / 'certificate.json'}, {args.out / 'certificate.png'}")
    conclude(report, found, args)


def check_precision(manifest: "Manifest", precision: str, providers: Sequence[str] | None) -> None:
    """Raise UsageError where nothing of a precision is there; OpenVINO makes bf16 by itself."""
    if not (precision == "bf16" and "openvino" in (providers or ())):
        manifest.check_precision(precision)


def chosen(manifest: "Manifest", args: argparse.Namespace) -> list["Contender"]:
    """What is certified; raises UsageError where that is nothing."""
    from runtime.certificate import contenders
    from runtime.doctor import library, providers

    here = [name for name, own in providers(library("onnxruntime")).items() if own["available"]]
    found = contenders(manifest, args.provider or [*here, PLANS], args.precision)
    if not found:
        raise UsageError(
            f"{manifest.folder}: has no plans of what was asked for; found {[*manifest.plans]}. "
            "Build them with: python -m export.to_plan, or leave --provider plans out"
        )
    return found


def measure(
    manifest: "Manifest",
    engines: Sequence["Contender"],
    sizes: Sequence["SizeClass"],
    steps: int | None,
    args: argparse.Namespace,
) -> tuple[Rows, list["Case"]]:
    """A row per engine and size. What an engine cannot run at all is not asked for again."""
    from runtime.certificate import measured, reference_case
    from runtime.progress import Bar

    found: Rows = {engine: [] for engine in engines}
    cases = []
    with Bar(total=len(sizes) * (1 + len(engines)), desc="certify", unit="run") as bar:
        for size in sizes:
            bar.set_postfix_str(f"reference {size}")
            case = reference_case(manifest, size, steps, args.quick, args.threads)
            cases.append(case)
            bar.update()
            for engine, rows in found.items():
                bar.set_postfix_str(f"{engine} {size}")
                if rows and rows[-1].get("exit_code") == IncompatibleError.exit_code:
                    row = rows[-1]
                else:
                    row = alone(measured, manifest.folder, engine, args.threads, case)
                rows.append(row)
                bar.update()
    return found, cases


def alone(function: Any, *args: Any) -> Any:
    """What a function gives in a process of its own, which may crash."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        failed = "its process ended without a word: out of memory, or a crash of the library"
        return {"failed": failed, "exit_code": ResourceError.exit_code}


def as_report(
    manifest: "Manifest",
    found: Rows,
    sizes: Sequence["SizeClass"],
    steps: int | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """What certificate.json holds."""
    from dataclasses import asdict

    from runtime.certificate import BOUNDS, SEED, broken
    from runtime.doctor import examine

    machine = examine(manifest.folder)
    del machine["bundle"], machine["next"]
    rows = [
        {
            "engine": str(engine),
            "provider": engine.provider,
            "precision": engine.precision,
            "size": asdict(size),
            **{key: value for key, value in row.items() if key != "image"},
            "broken": broken(engine.precision, row),
        }
        for engine, own in found.items()
        for size, row in zip(sizes, own, strict=True)
    ]
    words = {verdict(row) for row in rows}
    precisions = dict.fromkeys(engine.precision for engine in found)
    files = {spec.file: spec.sha256 for _, spec in manifest.forms()}
    return {
        "format": FORMAT,
        "passes": "passes" in words and words.isdisjoint(("BROKEN", "FAILED")),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runtime": cli.version(),
        "bundle": {
            "name": manifest.interface.name,
            "manifest_sha256": manifest.sha256,
            "checkpoint_sha256": manifest.checkpoint and manifest.checkpoint.sha256,
            "files": files | {file: plan.sha256 for file, plan in manifest.plans.items()},
            "versions": manifest.versions,
        },
        "machine": machine,
        "settings": {"steps": steps, "seed": SEED, "threads": args.threads, "quick": args.quick},
        "bounds": {precision: bounds(BOUNDS[precision]) for precision in precisions},
        "rows": rows,
    }


def bounds(own: Any) -> dict[str, float | None]:
    """A bound for JSON, which has no infinity."""
    return {
        "parity": own.parity,
        "drift": own.drift if own.drift < float("inf") else None,
        "psnr_db": own.psnr,
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The table of at most 100 columns, and below it what was broken or failed, and why."""
    rows = [["engine", "latent", "image", "parity", "drift", "PSNR", "first", "second", "MiB", ""]]
    notes: dict[str, list[str]] = {}
    for own in report["rows"]:
        latent, image = ("x".join(map(str, own["size"][side])) for side in ("latent", "image"))
        start = [own["engine"], latent, image]
        if "failed" in own:
            rows.append([*start, *[""] * 6, verdict(own)])
            notes.setdefault(f"{own['engine']}: {own['failed']}", []).append(latent)
            continue
        first, second = own["seconds"]
        memory = "+".join(str(own[key]) for key in ("peak_mib", "device_mib") if key in own)
        figures = [f"{max(own['parity'].values()):.1e}", f"{own['drift']:.1e}"]
        figures += [f"{own['psnr_db']:.0f} dB", f"{first:.2f} s", f"{second:.2f} s", memory]
        rows.append([*start, *figures, verdict(own)])
        for reason in own["broken"]:
            notes.setdefault(f"{own['engine']}: {reason}", []).append(latent)
    lines = [f"  {note} ({', '.join(dict.fromkeys(at))})" for note, at in notes.items()]
    return cli.printable("\n".join([cli.table(rows, ""), *lines]))


def verdict(row: Mapping[str, Any]) -> str:
    """A row in a word."""
    if row["broken"]:
        return "BROKEN"
    if "failed" not in row:
        return "passes"
    return {UsageError.exit_code: "not covered", IncompatibleError.exit_code: "not here"}.get(
        row["exit_code"], "FAILED"
    )


def write(
    out: Path,
    report: dict[str, Any],
    found: Rows,
    references: Sequence["Case"],
    sizes: Sequence["SizeClass"],
) -> None:
    """certificate.png and certificate.json, the latter last."""
    from runtime.bundle.files import atomic_write
    from runtime.images.pixels import save_png

    made = {"bundle": report["bundle"]["manifest_sha256"], "seed": report["settings"]["seed"]}
    save_png(out / "certificate.png", picture(found, references, sizes), made)
    with atomic_write(out / "certificate.json") as file:
        file.write(json.dumps(report, indent=1).encode() + b"\n")


def picture(found: Rows, references: Sequence["Case"], sizes: Sequence["SizeClass"]) -> Any:
    """One seed, a column per size and a row per engine below the reference: uint8 `[h, w, 3]`."""
    import numpy as np
    from PIL import Image, ImageDraw

    from runtime.images.pixels import to_uint8

    rows = {"reference": [case.image[0] for case in references]}
    rows |= {str(engine): [row.get("image") for row in own] for engine, own in found.items()}
    left = max(8 * len(name) for name in rows) + MARGIN
    step = CELL + LINE + MARGIN
    sheet = Image.new(
        "RGB", (left + len(sizes) * (CELL + MARGIN), LINE + len(rows) * step), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, size in enumerate(sizes):
        draw.text((left + column * (CELL + MARGIN), 1), str(size).replace("→", "-"), "black")
    for line, (name, images) in enumerate(rows.items()):
        top = LINE + line * step
        draw.text((MARGIN, top + CELL // 2), name, "black")
        for column, image in enumerate(images):
            if image is None:
                continue
            pixels = to_uint8(image)
            cell = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
            scale = CELL / max(cell.size)
            cell = cell.resize([max(1, round(side * scale)) for side in cell.size])
            sheet.paste(cell, (left + column * (CELL + MARGIN), top))
    return np.asarray(sheet)


def conclude(report: Mapping[str, Any], found: Rows, args: argparse.Namespace) -> None:
    """Raise the error that the certificate's exit code comes from, if it has one.

    A precision or provider that cannot run here, or a size that a plan does not cover, is no
    fault unless it was asked for by name, or nothing ran at all.
    """
    rows, where = report["rows"], args.out / "certificate.json"
    if bad := [row for row in rows if row["broken"]]:
        engines = ", ".join(dict.fromkeys(row["engine"] for row in bad))
        raise NumericalError(
            f"{len(bad)} of {len(rows)} rows are outside their bounds: {engines}. Do not ship "
            f"these on this machine; {where} says why"
        )
    expected = (UsageError.exit_code, IncompatibleError.exit_code)
    failed = [row for row in rows if "failed" in row]
    asked = args.provider or args.precision or len(failed) == len(rows)
    serious = [row for row in failed if asked or row["exit_code"] not in expected]
    if serious:
        kinds = {kind.exit_code: kind for kind in ToolkitError.__subclasses__()}
        raise kinds.get(serious[0]["exit_code"], ResourceError)(
            f"{serious[0]['engine']}: {serious[0]['failed']} ({len(serious)} of {len(rows)} rows "
            "failed)"
        )


if __name__ == "__main__":
    cli.run(certify, parser())
