"""Build TensorRT plans of a bundle: python -m export.to_plan build/mnist --target sm120,sm89.

TensorRT for RTX builds for GPUs that are not there; standard TensorRT for the one at hand.
"""

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from tqdm import tqdm

from export.profiles import Ranges, SizeRange, expected_slowdown, plan_profiles
from runtime import cli
from runtime.engines.cuda import device_target
from runtime.engines.onnx_file import check_self_contained
from runtime.engines.tensorrt import (
    FLAVOURS,
    OUT_OF_MEMORY,
    installed,
    load_library,
    message_log,
    plan_interface,
    platform_name,
)
from runtime.errors import ArtefactError, IncompatibleError, ResourceError, ToolkitError, UsageError
from runtime.files import atomic_write, sha256, staging
from runtime.manifest import (
    DEFAULT_BUNDLE,
    GraphSpec,
    Manifest,
    PlanSpec,
    TensorSpec,
    find_bundle,
    read_manifest,
)
from runtime.profiles import Cost, Profile, describe

FP8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv")


@dataclass(frozen=True)
class Job:
    """One plan to build: a graph in a precision, as ONNX bytes, and its profiles."""

    name: str
    spec: GraphSpec
    model: bytes
    profiles: tuple[Profile, ...]


def build(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then build every plan, the manifest last."""
    folder = find_bundle(args.bundle)
    manifest = read_manifest(folder)
    ranges = Ranges(
        latent=SizeRange(args.latent[0], args.latent[1], args.aspect),
        image=SizeRange(args.image[0], args.image[1], args.aspect),
        batch=args.batch,
        conditions=args.conditions,
        steps=args.steps,
        profiles=args.profiles,
        cost=Cost(fixed=args.fixed_tokens),
    )
    names = chosen(manifest, args.graphs, args.precision)
    wanted = {
        name: ranges.of_graph(
            name, manifest.graph(name, args.precision), manifest.model.condition.labels
        )
        for name in names
    }
    if args.explain is not None:
        explain(ranges, args.explain)
        return
    flavour = args.flavour or default_flavour()
    library = load_library(flavour)
    targets = resolve_targets(library, flavour, args.target)
    with staging(folder) as scratch:
        manifest = read_manifest(folder)
        jobs = []
        for name in names:
            spec = manifest.graph(name, args.precision)
            data = manifest.file_bytes(spec)
            check_self_contained(data, spec.file)
            jobs.append(Job(name, spec, data, tuple(wanted[name])))
            check_targets(jobs[-1], targets)
        build_all(manifest, jobs, library, flavour, targets, scratch)


def build_all(
    manifest: Manifest,
    jobs: list[Job],
    library: Any,
    flavour: str,
    targets: tuple[str, ...],
    scratch: Path,
) -> None:
    """Build into `scratch`, then move all plans to their place and write the manifest."""
    folder, plans = manifest.folder, dict(manifest.plans)
    started = time.perf_counter()
    with tqdm(total=float(len(jobs)), desc="plans", bar_format=BAR) as bar:
        for number, job in enumerate(jobs):
            bar.set_postfix_str(job.name)
            builder = PlanBuilder(library, flavour, targets, folder, bar, number)
            data, spec = builder.plan(job)
            (scratch / spec.file).write_bytes(data)
            plans[spec.file] = spec
    for job in jobs:
        name = plan_file(job.spec)
        (scratch / name).replace(folder / name)
    replace(manifest, plans=plans).write(folder)
    size = sum(plans[plan_file(job.spec)].bytes for job in jobs)
    print(
        f"plans: {folder} ({len(jobs)} for {', '.join(targets)}, {size / 1e6:.1f} MB, "
        f"{time.perf_counter() - started:.0f} s)"
    )


def plan_file(spec: GraphSpec) -> str:
    """A plan's file name: `r2id.fp16.onnx` → `r2id.fp16.plan`."""
    return Path(spec.file).with_suffix(".plan").name


def chosen(manifest: Manifest, graphs: list[str] | None, precision: str) -> list[str]:
    """The graphs to build, all by default; raises UsageError for an unknown one or precision."""
    unknown = [name for name in graphs or () if name not in manifest.graphs]
    if unknown:
        raise UsageError(f"--graphs {','.join(unknown)}: expected some of {[*manifest.graphs]}")
    manifest.check_precision(precision)
    return graphs or [*manifest.graphs]


def default_flavour() -> str:
    """The flavour that is installed; TensorRT for RTX, which builds for any target, of both."""
    found = installed()
    if not found:
        raise IncompatibleError(
            "no TensorRT is installed here; expected one to build plans with. Install it with: "
            "python -m pip install '.[tensorrt-rtx]' (GeForce and RTX cards) or '.[tensorrt]'"
        )
    return found[-1]


def resolve_targets(library: Any, flavour: str, target: str) -> tuple[str, ...]:
    """Compute capabilities such as `sm89`; `current` is that of the GPU at hand.

    Raises UsageError for one that the library cannot build for, IncompatibleError for no GPU.
    """
    version = f"{flavour} {library.__version__}"
    if target == "current":
        return (device_target(),)
    if not FLAVOURS[flavour].ahead:
        raise UsageError(
            f"--target {target}: {version} builds for the GPU at hand only; expected current, or "
            "--flavour tensorrt_rtx, which builds for GPUs that are not there"
        )
    known = [n.lower() for n in library.ComputeCapability.__members__ if n.startswith("SM")]
    targets = tuple(dict.fromkeys(target.lower().split(",")))
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise UsageError(
            f"--target {','.join(unknown)}: no target of {version}; expected current or some of "
            f"{', '.join(sorted(known, key=lambda name: int(name[2:])))}"
        )
    return targets


def check_targets(job: Job, targets: Sequence[str]) -> None:
    """Raise UsageError, before any build, where a target lacks what a graph needs."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(job.model))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types |= {value.name: value.type.tensor_type.elem_type for value in values}
    products = (node for node in model.graph.node if node.op_type in PRODUCTS)
    fp32 = next((n.name for n in products if types.get(n.input[0]) == TensorProto.FLOAT), None)
    fp8 = next((name for name, kind in types.items() if kind in FP8), None)
    for target in targets:
        if fp32 is not None and target == "sm75":
            raise UsageError(
                f"{job.spec.file}: its matrix product {fp32} is fp32, which TensorRT for RTX "
                "cannot do on sm75. Leave sm75 out, or use --engine with an ONNX graph there"
            )
        if fp8 is not None and int(target[2:]) < 89:
            raise UsageError(
                f"{job.spec.file}: {fp8} is FP8, which GPUs have from sm89 on; {target} is "
                f"older. Leave {target} out or choose another --precision"
            )


def with_update(name: str, spec: GraphSpec, model: bytes) -> tuple[GraphSpec, bytes]:
    """The graph with what `plan_interface` says a plan of it also has: the DDIM update."""
    interface = plan_interface(name, spec)
    if interface is spec:
        return spec, model
    made = onnx.load_from_string(model)
    graph = made.graph
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [len(axes)], axes)
        for name, axes in (("update_branches", [0]), ("update_all", [0, 1, 2, 3]))
    )
    node = helper.make_node
    graph.node.extend(
        (
            node("Cast", ["eps"], ["update_eps"], to=TensorProto.FLOAT),
            node("Mul", ["update_eps", "weights"], ["update_weighted"]),
            node("ReduceSum", ["update_weighted", "update_branches"], ["update_move"], keepdims=0),
            node("Mul", ["latent", "keep"], ["update_kept"]),
            node("Add", ["update_kept", "update_move"], ["update_moved"]),
            node("Add", ["update_moved", "noise"], ["next"]),
            node("Abs", ["next"], ["update_abs"]),
            node("ReduceMean", ["update_abs", "update_all"], ["size"], keepdims=1),
        )
    )
    graph.input.extend(_value(s) for s in interface.inputs[len(spec.inputs) :])
    graph.output.extend(_value(s) for s in interface.outputs[len(spec.outputs) :])
    return interface, made.SerializeToString()


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.axes))


class PlanBuilder:
    """One build: the library's builder, its messages, its progress on a bar, and Ctrl-C."""

    def __init__(
        self,
        library: Any,
        flavour: str,
        targets: tuple[str, ...],
        folder: Path,
        bar: Any,
        place: int,
    ):
        self.trt, self.flavour, self.targets = library, flavour, targets
        self.folder = folder
        self.log = message_log(library)
        self.monitor = progress_monitor(library, bar, place)

    def plan(self, job: Job) -> tuple[bytes, PlanSpec]:
        """Build a plan; raises ArtefactError, IncompatibleError or ResourceError.

        All of it in a thread of its own: Ctrl-C reaches the main thread, where no native call can
        swallow it, and stops the build through the monitor.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._plan, job)
            try:
                while not wait([future], timeout=0.1).done:
                    pass
            except BaseException:
                self.monitor.stopped = True
                raise
            return future.result()

    def _plan(self, job: Job) -> tuple[bytes, PlanSpec]:
        started = time.perf_counter()
        interface, model = with_update(job.name, job.spec, job.model)
        builder = self.trt.Builder(self.log)
        network = builder.create_network(0)
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse(model):
            errors = (parser.get_error(i) for i in range(parser.num_errors))
            said = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
            raise ArtefactError(
                f"{job.spec.file}: {self.flavour} {self.trt.__version__} cannot read it: "
                f"{'; '.join(said) or self._said()}. Make the bundle again with: make export"
            )
        config = self._config(builder, interface, job)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise self._failure(job)
        for message in dict.fromkeys((*self.log.errors, *self.log.warnings)):
            tqdm.write(f"{job.name}: {self.flavour} says: {message}", file=sys.stderr)
        if FLAVOURS[self.flavour].timing_cache:
            with atomic_write(self._timings) as file:
                file.write(bytes(config.get_timing_cache().serialize()))
        plan = bytes(data)
        return plan, PlanSpec(
            file=plan_file(job.spec),
            sha256=sha256(plan),
            graph=job.name,
            precision=job.spec.precision,
            source_sha256=job.spec.sha256,
            flavour=self.flavour,
            version=str(self.trt.__version__),
            targets=self.targets,
            platform=platform_name(),
            profiles=job.profiles,
            build_seconds=round(time.perf_counter() - started, 2),
            bytes=len(plan),
        )

    @property
    def _timings(self) -> Path:
        return self.folder / f"{self.flavour}.timings"

    def _config(self, builder: Any, interface: GraphSpec, job: Job) -> Any:
        """Targets, profiles and caches. fp32 is fp32: TF32's 10-bit products are off."""
        library = self.trt
        config = builder.create_builder_config()
        config.progress_monitor = self.monitor
        config.clear_flag(library.BuilderFlag.TF32)
        if FLAVOURS[self.flavour].ahead:
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                capability = getattr(library.ComputeCapability, target.upper())
                if not config.set_compute_capability(capability, index):
                    raise self._failure(job)
        if FLAVOURS[self.flavour].timing_cache:
            known = self._timings.read_bytes() if self._timings.exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        for number, profile in enumerate(job.profiles):
            made = builder.create_optimization_profile()
            for spec in interface.inputs:
                shapes = [
                    spec.shape({axis: limits[end] for axis, limits in profile.items()})
                    for end in range(3)
                ]
                made.set_shape(spec.name, *shapes)
            if config.add_optimization_profile(made) != number:
                raise self._failure(job)
        return config

    def _said(self) -> str:
        return "; ".join(dict.fromkeys(self.log.errors)) or "it gave no reason"

    def _failure(self, job: Job) -> ToolkitError:
        """The error for a builder that returned nothing."""
        profiles = " | ".join(map(describe, job.profiles))
        said = self._said()
        where = (
            f"{job.spec.file}: {self.flavour} {self.trt.__version__} built no plan for "
            f"{', '.join(self.targets)} with profiles {profiles}: {said}. "
        )
        if any(words in said.lower() for words in OUT_OF_MEMORY):
            return ResourceError(where + "Ask for smaller ranges or fewer --profiles")
        return IncompatibleError(
            where + "Try one --target at a time, smaller ranges, or another --precision"
        )


def progress_monitor(library: Any, bar: Any, place: int) -> Any:
    """A monitor that moves `bar` from `place` to `place + 1` and stops a build on `stopped`."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.stopped = False
            self.phases: dict[str, tuple[int, int]] = {}  # open ones: steps done, steps in all
            self.lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.phases[name] = (0, steps)

        def phase_finish(self, name: str) -> None:
            with self.lock:
                self.phases.pop(name, None)
                self._show(1.0 if not self.phases else 0.0)

        def step_complete(self, name: str, step: int) -> bool:
            with self.lock:
                if name in self.phases:
                    self.phases[name] = (step + 1, self.phases[name][1])
                self._show(0.0)
            return not self.stopped

        def _show(self, fraction: float) -> None:
            share = 1.0
            for done, steps in self.phases.values():  # a phase is a step of the one before it
                fraction += share * min(done, steps - 1) / steps
                share /= steps
            bar.n = max(bar.n, place + min(fraction, 1.0))
            bar.refresh()

    return Monitor()


def explain(ranges: Ranges, path: Path) -> None:
    """Print the profiles of both ranges and draw them: tokens against expected time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sides = {"latent": ranges.latent, "image": ranges.image}
    for axes, (name, sizes) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        own = (sizes, ranges.batch)
        slow = [
            expected_slowdown(*own, plan_profiles(*own, n, ranges.cost), ranges.cost)
            for n in range(1, ranges.profiles + 1)
        ]
        profiles = plan_profiles(*own, ranges.profiles, ranges.cost)
        print(f"{name}: expected slow-down with 1, 2, … profiles: " + ", ".join(map(_ratio, slow)))
        for number, profile in enumerate(profiles):
            print(f"  profile {number}: {describe(profile)} (min..optimum..max)")
        draw(axes, profiles, ranges.cost)
        axes.set_title(f"{name}: {_ratio(slow[-1])} × the time of a profile for every size")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(path)


def draw(axes: Any, profiles: list[Profile], cost: Cost) -> None:
    """One range: each profile's band of tokens and what a run takes with it; smaller is better."""

    def tokens(profile: Profile, end: int) -> int:
        return profile["batch"][end] * profile["height"][end] * profile["width"][end]

    for number, profile in enumerate(profiles):
        low, best, high = (tokens(profile, end) for end in range(3))
        counts = [low * (high / low) ** (i / 99) for i in range(100)]
        colour = f"C{number}"
        label = f"profile {number}: {profile['height'][1]}x{profile['width'][1]}"
        axes.plot(counts, [cost.time(n, best) for n in counts], colour, label=label)
        axes.plot(best, cost.time(best, best), "o", color=colour)
        axes.axvspan(low, high, color=colour, alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel="tokens: batch × height × width")
    axes.set_ylabel("expected time, in tokens at an optimum")
    axes.legend()


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def span(text: str) -> tuple[int, int]:
    """`LOW..HIGH`, or one number for both."""
    match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; expected one as in 1..8 or 4")
    return low, high


def size_span(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """`HxW..HxW`, or one size, as (heights, widths)."""
    first, _, last = text.partition("..")
    low, high = cli.size(first), cli.size(last or first)
    if low[0] > high[0] or low[1] > high[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of sizes; expected the smaller size first, as in 4x4..256x256"
        )
    return (low[0], high[0]), (low[1], high[1])


def aspect(text: str) -> Fraction:
    """`3`, `1.5` or `16:9`: the longer side over the shorter one, at least 1."""
    try:
        value = Fraction(text.replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no aspect; expected 1 or more, as in 16:9")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("export.to_plan", __doc__)
    add: Callable[..., Any] = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="folder of the bundle")
    add("--target", default="current", help="sm120,sm89,… or current, the GPU at hand (current)")
    add("--flavour", choices=[*FLAVOURS], help="the library (the installed one; of both, RTX)")
    add("--precision", default="fp32", help="fp32, or a precision that the bundle has graphs in")
    add("--graphs", type=lambda text: text.split(","), help="names of graphs (all)")
    add("--latent", type=size_span, default="4x4..256x256", help="HxW..HxW (4x4..256x256)")
    add("--image", type=size_span, default="16x16..2048x2048", help="HxW..HxW (16x16..2048x2048)")
    add("--aspect", type=aspect, help="most the longer side may be of the shorter, as in 3 or 16:9")
    add("--batch", type=span, default="1..8", help="images at once (1..8)")
    add("--conditions", type=span, default="1..4", help="guidance branches, 2 for a label (1..4)")
    add("--steps", type=span, default="1..1000", help="DDIM steps (1..1000)")
    add("--profiles", type=cli.number(1, 16, int), default=3, help="most profiles per plan (3)")
    add(
        "--fixed-tokens",
        type=cli.number(0, 1e9),
        default=Cost.fixed,
        help=f"a run's fixed time in tokens, for the cost ({Cost.fixed})",
    )
    add(
        "--explain",
        type=Path,
        nargs="?",
        const=Path("profiles.png"),
        metavar="PNG",
        help="print and draw the profiles, build nothing",
    )
    return p


def main() -> None:
    """The command line."""
    cli.run(build, parser())


if __name__ == "__main__":
    main()
