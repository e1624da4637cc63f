"""What a certificate measures: an engine at a size, in a process of its own, beside a reference.

The reference is the fp32 graphs as they were exported, on ONNX Runtime's CPU provider; it knows of
no form for processors, precision or plan. All goes by the calls that a program makes of a bundle,
so that every family's is measured alike.
"""

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Interface, Size, size_name
from runtime.bundle.manifest import Manifest, relative_error
from runtime.engines import Engine, EngineOptions
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import NumericalError, ToolkitError
from runtime.images.pixels import psnr
from runtime.memory import is_out_of_memory, memory_error, peak_resident
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.pipeline.opened import Engines
from runtime.pipeline.tiles import SAMPLE
from runtime.providers import PLANS, PROVIDERS
from runtime.sampling.labels import Labels

Pixels = NDArray[np.float32]
SEED = 0
ALPHA_BARS = (0.05, 0.2, 0.5, 0.8, 0.95)  # where eps is compared


@dataclass(frozen=True)
class Bound:
    """What an engine may differ from the reference by.

    `parity`: the largest `relative_error` of what a graph gives for the same inputs. `drift`: that
    of the latent at the end of a trajectory. `psnr`: the least, in dB, of its image.
    """

    parity: float
    drift: float
    psnr: float


# fp32: as the export and the tests on a GPU have it. Halves: 64 unit roundoffs of each, and the
# 45 dB of calibration.report, which 8 bits have 35 of. A drift is bounded by its picture there: a
# latent's largest error is that of one number, at an edge, where no picture shows it.
BOUNDS = {
    "fp32": Bound(1e-4, 1e-3, 60.0),
    "fp16": Bound(64 * 2**-11, math.inf, 45.0),
    "bf16": Bound(64 * 2**-8, math.inf, 45.0),
    **dict.fromkeys(("int8", "int8w", "fp8"), Bound(0.5, math.inf, 35.0)),
}


@dataclass(frozen=True)
class SizeClass:
    """A request's sizes, and what they stand for."""

    name: str
    latent: Size
    image: Size

    def __str__(self) -> str:
        latent, image = size_name(self.latent), size_name(self.image)
        return latent if latent == image else f"{latent} → {image}"


@dataclass(frozen=True)
class Contender:
    """What is certified: a provider's name or PLANS, and a precision."""

    provider: str
    precision: str

    def __str__(self) -> str:
        return f"{self.provider} {self.precision}"

    def options(self, threads: int) -> EngineOptions:
        """How the bundle is opened; never with a fallback, which would certify another engine."""
        if self.provider == PLANS:
            return EngineOptions(threads=threads, precision=self.precision, plans=True)
        return EngineOptions(self.provider, threads=threads, precision=self.precision)


@dataclass(frozen=True)
class Case:
    """A size, and what the reference gives there: all `[1, ...]`, images in [-1, 1].

    `noisy` and `eps` are latents on their way from noise and what the model makes of them, one per
    `alpha_bars`; `decoded` is `latent` drawn with ratios from every pixel, `encoded` is `image` as
    a latent: both None where pixels are diffused.
    """

    size: SizeClass
    steps: int | None
    conditions: Pixels
    alpha_bars: tuple[float, ...]
    noisy: list[Pixels]
    eps: list[Pixels]
    latent: Pixels
    image: Pixels
    decoded: Pixels | None
    encoded: Pixels | None


class Reference(Engines):
    """The fp32 graphs as they were exported, on the CPU."""

    def open(self, graph: str, precision: str | None = None) -> Engine:
        """The engine of a graph, whatever precision is asked for."""
        key = graph, "fp32"
        if key not in self.opened:
            spec = self.manifest.graph(graph)
            data = self.manifest.file_bytes(spec)
            self.opened[key] = OnnxRuntimeEngine(spec, data, self.options)
        return self.opened[key]


def size_classes(interface: Interface, quick: bool = False) -> list[SizeClass]:
    """The sizes that stand for all: the usual one, what training saw at the most, and beyond.

    Where images are drawn of latents, also one that is drawn in tiles. `quick`: three of them.
    """
    trained, usual = interface.trained, interface.default_latent
    low = trained.shortest if trained else min(usual) // 2
    high = trained.longest if trained else 2 * max(usual)
    narrow = high / (trained.aspect if trained else 2)
    wanted = {
        "usual": usual,
        "wide": (narrow, high),
        "largest": (high, high),
        "tall": (high, narrow),
        "smallest": (low, low),
        "beyond": (2 * high, 2 * high),
    }
    near = interface.latent_sides.nearest
    found = [
        sized(interface, (near(math.ceil(height)), near(math.ceil(width))), name)
        for name, (height, width) in [*wanted.items()][: 3 if quick else None]
    ]
    if interface.decoupled and not quick:
        height, width = interface.image_size(usual)
        factor = 1 + int(SAMPLE / math.sqrt(height * width))
        found.append(SizeClass("tiled", usual, (factor * height, factor * width)))
    return [*{(own.latent, own.image): own for own in reversed(found)}.values()][::-1]


def sized(interface: Interface, latent: Size, name: str = "asked") -> SizeClass:
    """A latent with the image that it was trained to decode to; raises UsageError."""
    interface.latent_sides.check(latent, "latent")
    return SizeClass(name, latent, interface.image_size(latent))


def contenders(
    manifest: Manifest, providers: Iterable[str], precisions: Iterable[str] | None
) -> list[Contender]:
    """Every precision that the bundle has on every provider, and every one that has plans."""
    planned = {plan.precision for plan in manifest.plans.values()}
    found = []
    for provider in providers:
        for precision in ("fp32", *manifest.variants) if precisions is None else precisions:
            if provider != PLANS or precision in planned:
                found.append(Contender(provider, precision))
    return found


def request(bundle: Bundle, size: SizeClass, steps: int | None) -> dict[str, Any]:
    """The arguments of the trajectory that all engines draw."""
    labels = Labels(bundle.interface.labels, bundle.interface.parts)
    sizes = {"latent": size.latent, "image": size.image}
    return {"labels": [labels.turn(0)], "seed": SEED, "steps": steps, **sizes}


def reference_case(
    manifest: Manifest, size: SizeClass, steps: int | None, quick: bool, threads: int
) -> Case:
    """What the reference gives at a size; its graphs are opened for it and freed after it."""
    bundle = Bundle(manifest, engines=Reference(manifest, EngineOptions(threads=threads)))
    made = bundle.generate(**request(bundle, size, steps))
    alpha_bars = ALPHA_BARS[1::2] if quick else ALPHA_BARS
    noise = np.random.default_rng(SEED).standard_normal(made.latents.shape).astype(np.float32)
    noisy = [
        np.float32(a**0.5) * made.latents + np.float32((1 - a) ** 0.5) * noise for a in alpha_bars
    ]
    labels = Labels(bundle.interface.labels, bundle.interface.parts)
    conditions = np.zeros((2, 1, len(labels.names)), np.float32)  # the first is no condition
    if labels.names:
        conditions[1, 0, list(labels.combination(labels.turn(0)))] = 1
    eps = [bundle.denoise(x, a, conditions) for x, a in zip(noisy, alpha_bars, strict=True)]
    decoded = encoded = None
    if bundle.interface.decoupled:
        decoded = bundle.decode(made.latents, size.image, exact=True)
        encoded = bundle.encode(made.images, size.latent)
    return Case(
        *(size, steps, conditions, alpha_bars, noisy, eps, made.latents, made.images),
        *(decoded, encoded),
    )


def measured(folder: Path, contender: Contender, threads: int, case: Case) -> dict[str, Any]:
    """A row of the certificate, in a process that does nothing else.

    Holds `image` `[c, h, w]`; or `failed` and `exit_code` where the engine could not do it.
    """
    try:
        return _measured(folder, contender.options(threads), case)
    except ToolkitError as error:
        return {"failed": str(error), "exit_code": error.exit_code}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        own = memory_error(error)
        return {"failed": str(own), "exit_code": own.exit_code}


def _measured(folder: Path, options: EngineOptions, case: Case) -> dict[str, Any]:
    free = device_free(options)
    seconds = []
    began = time.perf_counter()
    bundle = open_bundle(folder, options)
    drawn = request(bundle, case.size, case.steps)
    for _ in range(2):
        made = bundle.generate(**drawn)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    row: dict[str, Any] = {"seconds": [round(own, 4) for own in seconds], "peak_mib": None}
    with contextlib.suppress(ImportError):  # Windows tells no peak
        row["peak_mib"] = round(peak_resident() / (1 << 20))
    if free is not None and (left := device_free(options)) is not None:
        row["device_mib"] = round((free - left) / (1 << 20))
    parity = {
        "eps": max(
            relative_error(bundle.denoise(x, a, case.conditions), eps)
            for x, a, eps in zip(case.noisy, case.alpha_bars, case.eps, strict=True)
        )
    }
    if case.decoded is not None and case.encoded is not None:
        decoded = bundle.decode(case.latent, case.size.image, exact=True)
        encoded = bundle.encode(case.image, case.size.latent)
        parity["decode"] = relative_error(decoded, case.decoded)
        parity["encode"] = relative_error(encoded, case.encoded)
    row["parity"] = {name: float(f"{error:.3e}") for name, error in parity.items()}
    row["drift"] = float(f"{relative_error(made.latents, case.latent):.3e}")
    row["psnr_db"] = round(psnr(made.images, case.image), 2)
    return row | {"ran_on": bundle.provider, "image": made.images[0]}


def device_free(options: EngineOptions) -> int | None:
    """Free bytes of the GPU that an engine runs on; None where there is none, or none tells."""
    if not (options.plans or PROVIDERS[options.provider].device == "cuda"):
        return None
    from runtime.engines.cuda import Device, load_cuda

    try:
        device = Device(load_cuda())
        error, free, _total = device.cuda.cudaMemGetInfo()
        return int(free) if error == device.cuda.cudaError_t.cudaSuccess else None
    except ToolkitError:  # ONNX Runtime needs no CUDA bindings
        return None


def broken(precision: str, row: dict[str, Any]) -> list[str]:
    """The bounds of a precision that a row is outside of, each in words."""
    if "failed" in row:
        return [row["failed"]] if row["exit_code"] == NumericalError.exit_code else []
    bound = BOUNDS[precision]
    found = [
        f"{name} differs by {error:.1e}, expected at most {bound.parity:.1e}"
        for name, error in row["parity"].items()
        if not error <= bound.parity
    ]
    if not row["drift"] <= bound.drift:
        found.append(f"drift {row['drift']:.1e}, expected at most {bound.drift:.1e}")
    if not row["psnr_db"] >= bound.psnr:
        found.append(f"PSNR {row['psnr_db']:.1f} dB, expected at least {bound.psnr:g}")
    return found
