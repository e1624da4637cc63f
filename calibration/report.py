"""What a precision costs and gains: python -m calibration.report build/mnist.

Per precision and size: eps error over t on fp32's own trajectory, drift of a trajectory, PSNR of
the final images, of R2IR's reconstructions and of what it renders in tiles against fp32 with the
same seed, digits read right; file sizes, seconds per step and peak memory on each engine here. fp16
and bf16 are judged by `calibration.half`'s emulation. The verdict is a rule: see VERDICTS.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calibration.choices import choice_file, read_choices, rms_error
from calibration.digits import classifier, digits_read
from calibration.half import HALVES, emulated
from calibration.quantize import FORMS
from calibration.recorder import Recorder
from calibration.samples import heavy
from calibration.speed import engines_here, speed
from runtime import cli
from runtime.bundle.commit import note
from runtime.bundle.files import Measures, atomic_write, sha256
from runtime.bundle.folders import make_folder
from runtime.bundle.interface import Size, size_name
from runtime.bundle.manifest import DEFAULT_BUNDLE, Array, Manifest, find_bundle, read_manifest
from runtime.engines import Engine, EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library
from runtime.images.pixels import contact_sheet, psnr, save_png, to_uint8
from runtime.pipeline.bundle import Bundle
from runtime.pipeline.diffuser import Progress
from runtime.pipeline.tiles import SAMPLE
from runtime.progress import Bar
from runtime.sampling.labels import Labels
from runtime.sampling.request import Request

# precision -> least PSNR in dB, most points of digits read right lost against fp32.
VERDICTS = dict.fromkeys(HALVES, (45.0, 1.0)) | dict.fromkeys(FORMS, (35.0, 1.0))
GUIDANCE = 2.0
PICTURES = 4  # images of a trajectory, fewer where their tokens would be more than MOST_TOKENS
MOST_TOKENS = 32_768
DIGIT_TOKENS = 25_600  # large latents draw slowly: a size's digits have no more tokens in all,
FEWEST_DIGITS = 10  # but one of each label is read


@dataclass(frozen=True)
class Trajectory:
    """What fp32 does at one size: the latent and eps of every step, and the images."""

    latents: list[Array]
    eps: list[Array]
    images: Array


class Emulated(Recorder):
    """Engines in one precision; halves are emulated, since no engine here runs bf16."""

    def __init__(self, manifest: Manifest, precision: str):
        super().__init__(manifest, EngineOptions(precision=precision))
        self.emulated: dict[str, Engine] = {}

    def open(self, graph: str, precision: str | None = None) -> Engine:
        precision = precision or self.options.precision
        spec = self.manifest.graph(graph, precision)
        if spec.precision not in HALVES:
            return super().open(graph, precision)
        if graph not in self.emulated:
            model = emulated(onnx.load_model_from_string(self.manifest.file_bytes(spec)))
            data = model.SerializeToString()
            self.emulated[graph] = OnnxRuntimeEngine(spec, data, EngineOptions())
        return self.recording(graph, self.emulated[graph])


class Judged(Bundle):
    """A bundle in one precision, its runs kept."""

    def __init__(self, manifest: Manifest, precision: str):
        self.recorder = Emulated(manifest, precision)
        super().__init__(manifest, engines=self.recorder)

    def pictures(self, size: Size, steps: int) -> Request:
        """The images that are compared."""
        count = max(1, min(PICTURES, MOST_TOKENS // (size[0] * size[1])))
        labels = Labels(self.interface.labels, self.interface.parts)
        own = [labels.turn(i) for i in range(count)]
        return Request(own, size, steps=steps, guidance_scale=GUIDANCE, solver="ddim")

    def trajectory(self, size: Size, steps: int, bar: Any) -> Trajectory:
        """Draw the images, every run of the step graph kept."""
        latents, eps = [], []

        def keep(progress: Progress) -> None:
            inputs, outputs = self.recorder.recorded[self.diffuser.step_graph]
            latents.append(inputs["latent"])
            eps.append(outputs["eps"])
            bar.update()

        x = self.diffuse(self.pictures(size, steps), keep)
        return Trajectory([*latents, x], eps, self.decode(x, self.interface.image_size(size)))

    def eps_errors(self, fp32: Trajectory, size: Size, steps: int, bar: Any) -> list[float]:
        """`rms_error` of eps at every step, given the latents of fp32.

        Also of the first steps, which `Diffuser.exact_steps` leaves to fp32 in a trajectory.
        """
        inputs = self.diffuser.prepare(self.pictures(size, steps), size)
        engine, errors = self.engines.open(self.diffuser.step_graph), []
        for step, wanted in enumerate(fp32.eps):
            given = {"latent": fp32.latents[step], **inputs.at(step)}
            errors.append(rms_error(engine.run(given), {"eps": wanted}))
            bar.update()
        return errors


def quality(
    manifest: Manifest, precisions: Sequence[str], size: Size, steps: int, out: Path
) -> dict[str, dict[str, Any]]:
    """precision -> errors at a latent size; writes a sheet of images, a row per precision."""
    found: dict[str, dict[str, Any]] = {}
    pipelines = {p: Judged(manifest, p) for p in ("fp32", *precisions)}
    total = (1 + 2 * len(precisions)) * steps
    with Bar(total=total, desc=f"quality {size_name(size)}", unit="step") as bar:
        fp32 = pipelines["fp32"].trajectory(size, steps, bar)
        rows = [fp32.images]
        for precision in precisions:
            own = pipelines[precision]
            errors = own.eps_errors(fp32, size, steps, bar)
            made = own.trajectory(size, steps, bar)
            pairs = zip(made.latents, fp32.latents, strict=True)
            found[precision] = {
                "eps_error_over_t": rounded(errors),
                "drift": rounded([rms_error({"x": a}, {"x": b}) for a, b in pairs]),
                "psnr_db": round(psnr(made.images, fp32.images), 2),
                **reconstruction(own, pipelines["fp32"], fp32.images, size),
                **rendering(own, pipelines["fp32"], fp32.latents[-1][:1]),
            }
            rows.append(made.images)
    sheet = contact_sheet(to_uint8(np.concatenate(rows)), len(fp32.images))
    made_of = {"rows": ["fp32", *precisions], "latent": list(size)}
    save_png(out / f"images-{size_name(size)}.png", sheet, made_of)
    return found


def reconstruction(own: Bundle, fp32: Bundle, images: Array, size: Size) -> dict[str, float]:
    """MSE of images through R2IR and back in both precisions, and their PSNR."""
    image = (images.shape[2], images.shape[3])
    made = own.decode(own.encode(images, size), image)
    wanted = fp32.decode(fp32.encode(images, size), image)
    return {
        "r2ir_mse": float(f"{np.mean(np.square(made - images)):.3e}"),
        "r2ir_mse_fp32": float(f"{np.mean(np.square(wanted - images)):.3e}"),
        "r2ir_psnr_db": round(psnr(made, wanted), 2),
    }


def rendering(own: Bundle, fp32: Bundle, latent: Array) -> dict[str, float]:
    """How far an image that is drawn in tiles is from fp32's of the same latent `[1, C, H, W]`.

    PSNR, and the largest error of a pixel, where black and white are 2 apart.
    """
    height, width = fp32.interface.image_size((latent.shape[2], latent.shape[3]))
    factor = 1 + int(SAMPLE / math.sqrt(height * width))  # beyond the sample there are tiles
    size = factor * height, factor * width
    made, wanted = own.decode(latent, size), fp32.decode(latent, size)
    return {
        "render_psnr_db": round(psnr(made, wanted), 2),
        "render_largest_error": float(f"{np.abs(made - wanted).max():.3e}"),
    }


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.3e}") for value in values]


def files(manifest: Manifest, precision: str) -> dict[str, float]:
    """Bytes of the heavy graphs in a precision, in all and against the same in fp32."""

    def size(form: str) -> int:
        specs = [manifest.graph(name, form) for name in heavy(manifest)]
        return sum((manifest.folder / spec.file).stat().st_size for spec in specs)

    own = size(precision)
    return {"bytes": own, "times_fp32": round(own / size("fp32"), 3)}


def layer_errors(manifest: Manifest, precision: str) -> dict[str, Any]:
    """The error that each layer alone gives, from the choice file where there is one."""
    path = note(manifest, choice_file(precision), precision)
    if not path.is_file():
        return {}
    choices = read_choices(path, manifest).graphs
    return {
        name: {"fp32": [*choice.fp32], "error": choice.error, "alone": choice.alone}
        for name, choice in choices.items()
    }


def verdict(precision: str, own: dict[str, Any], fp32_digits: dict[str, float]) -> dict[str, Any]:
    """Whether a precision passes at every size, and what fails; see VERDICTS."""
    least, points = VERDICTS[precision]
    failures = [
        f"PSNR {row['psnr_db']:.1f} dB at {size}, expected {least:g}"
        for size, row in own["sizes"].items()
        if not row["psnr_db"] >= least
    ]
    for size, share in own["digits_read_right"].items():
        lost = 100 * (fp32_digits[size] - share)
        if lost > points + 1e-9:
            failures.append(f"{lost:.1f} points of digits lost at {size}, expected {points:g}")
    return {"passes": not failures, "failures": failures}


def draw_errors(report: dict[str, Any], path: Path) -> None:
    """eps error over t, a line per precision and size."""
    from matplotlib.figure import Figure

    names = [*report["precisions"]]
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axes, name in zip(
        np.ravel(figure.subplots(1, len(names), sharey=True)), names, strict=True
    ):
        for size, row in report["precisions"][name]["sizes"].items():
            errors = row["eps_error_over_t"]
            axes.plot(np.linspace(1, 0, report["steps"] + 1)[: len(errors)], errors, label=size)
        axes.set(title=name, xlabel="t (0 clean, 1 noise)", yscale="log")
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("relative error of eps")
    with atomic_write(path) as png:
        figure.savefig(png, format="png", dpi=100)


def as_text(report: dict[str, Any]) -> str:
    """The report's tables."""
    rows: list[list[object]] = [
        ["precision", "size", "eps error", "drift", "PSNR", "R2IR PSNR", "render PSNR", "digits"]
    ]
    for name, own in report["precisions"].items():
        for size, row in own["sizes"].items():
            digits = own["digits_read_right"].get(size)
            rows.append(
                [
                    *(name, size, f"{np.sqrt(np.mean(np.square(row['eps_error_over_t']))):.1e}"),
                    *(f"{row['drift'][-1]:.1e}", f"{row['psnr_db']:.1f} dB"),
                    f"{row['r2ir_psnr_db']:.1f} dB",
                    f"{row['render_psnr_db']:.1f} dB",
                    "" if digits is None else f"{digits:.1%}",
                ]
            )
    counts = report["digits"]
    shares = [f"{s} {share:.1%} of {counts[s]}" for s, share in report["fp32_digits"].items()]
    said = f"digits {', '.join(shares)}" if shares else "no classifier: digits are not read"
    parts = [f"quality against fp32 ({said})"]
    parts.append(cli.table(rows))
    rows = [
        ["engine", "size", "precision", "s per step", "times fp32", "times fp32 on cpu", "peak MiB"]
    ]
    for engine, sizes in report["speed"].items():
        for size, forms in sizes.items():
            for name, row in forms.items():
                keys = ("seconds_per_step", "times_fp32", "times_fp32_on_cpu", "peak_mib")
                figures = [row[key] for key in keys] if "refused" not in row else ["refused"]
                rows.append([engine, size, name, *figures, *[""] * (len(keys) - len(figures))])
    parts += ["speed", cli.table(rows), "verdict"]
    for name, own in report["precisions"].items():
        share = f"files {own['files']['times_fp32']:.2f}× of fp32"
        end = "passes" if own["verdict"]["passes"] else "; ".join(own["verdict"]["failures"])
        parts.append(f"  {name}: {share}; {end}")
    return "\n".join(parts)


def report(args: argparse.Namespace) -> None:
    """Measure, then write report.json and pictures, and print the tables."""
    manifest = read_manifest(find_bundle(args.bundle))
    precisions = [p for p in manifest.variants if not args.precision or p in args.precision]
    for precision in args.precision or ():
        manifest.check_precision(precision)
    if not precisions:
        manifest.check_precision("int8")
    reader = classifier(args.classifier) if args.classifier else None
    make_folder(args.out)
    measures = Measures(args.out / "measures.json", settings(manifest, precisions, args))
    sizes = {
        size_name(s): measures.take(
            "quality",
            size_name(s),
            partial(quality, manifest, precisions, s, args.steps, args.out),
        )
        for s in args.sizes
    }
    digits: dict[str, dict[str, float]] = {p: {} for p in ("fp32", *precisions)}
    counts = {s: digit_count(s, args.digits) for s in args.sizes if reader is not None}
    for p, s in itertools.product(digits, counts):
        count = (counts[s], args.steps, GUIDANCE)
        read = partial(digits_read, Judged(manifest, p), s, reader, *count)
        digits[p][size_name(s)] = measures.take("digits", f"{p} {size_name(s)}", read)
    timings = partial(speed, manifest.folder, precisions, args.sizes, args.threads)
    found: dict[str, Any] = {
        "bundle": manifest.sha256,
        "steps": args.steps,
        "guidance_scale": GUIDANCE,
        "digits": {size_name(s): count for s, count in counts.items()},
        "fp32_digits": digits["fp32"],
        "precisions": {},
        "speed": measures.take("speed", "all engines", timings),
    }
    for precision in precisions:
        own = {
            "sizes": {name: row[precision] for name, row in sizes.items()},
            "digits_read_right": digits[precision],
            "files": files(manifest, precision),
            "layers": layer_errors(manifest, precision),
        }
        own["verdict"] = verdict(precision, own, digits["fp32"])
        found["precisions"][precision] = own
    draw_errors(found, args.out / "eps-error-over-t.png")
    with atomic_write(args.out / "report.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    print(as_text(found))
    print(f"report and pictures: {args.out}")


def digit_count(size: Size, most: int) -> int:
    """How many digits are read at a size."""
    return min(most, max(FEWEST_DIGITS, DIGIT_TOKENS // (size[0] * size[1])))


def settings(
    manifest: Manifest, precisions: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """What measures depend on: they are taken anew where any of it has changed."""
    return {
        "bundle": manifest.sha256,
        "precisions": [*precisions],
        "steps": args.steps,
        "digits": args.digits,
        "classifier": sha256(args.classifier.read_bytes()) if args.classifier else "",
        "sizes": [size_name(size) for size in args.sizes],
        "threads": args.threads,
        "engines": engines_here(),
        "onnxruntime": load_library().__version__,
    }


def main() -> None:
    """The command line."""
    sizes = [(8, 8), (16, 16), (9, 16), (64, 64), (128, 128)]
    p = cli.parser("calibration.report", __doc__)
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="its folder")
    add("--precision", type=lambda text: text.split(","), help="which ones (all the bundle has)")
    add("--sizes", type=cli.sizes, default=sizes, help="latent sizes (8x8 to 128x128)")
    add("--steps", type=cli.number(1, 1000, int), default=50, help="DDIM steps (50)")
    add("--classifier", type=Path, help="classifier.safetensors of reference.evaluate")
    add("--digits", type=cli.number(10, 100_000, int), default=100, help="per size, at most (100)")
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--out", type=Path, default=Path("build/calibration"), help="folder of the report")
    cli.run(report, p)


if __name__ == "__main__":
    main()
