"""What runs graphs, by the names of `--provider`, and the options of what builds engines."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.bundle.profiles import Profile
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.bundle.manifest import GraphSpec


@dataclass(frozen=True)
class Provider:
    """`ep_name` is ONNX Runtime's own name and `install` the command that brings it.

    `plugin` is a module that registers the provider with a plain onnxruntime; `profiles` starts
    the names of its profile options, where it builds engines for ranges of sizes. `defaults` are
    options that it gets where they are not given, `device` is the library's name of its memory and
    `capture` of the option that captures CUDA graphs. One without `ep_name` is no provider of ONNX
    Runtime but the library in module `package`, with an engine of its own.
    """

    ep_name: str
    install: str
    plugin: str = ""
    profiles: str = ""
    package: str = ""
    defaults: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    capture: str = ""


PLANS = "plans"  # what runs a bundle's TensorRT plans, beside the names of providers
PIP = "python -m pip"
# Builds of ONNX Runtime overwrite each other's files: the plain one goes first.
ALONE = f"{PIP} uninstall -y onnxruntime && {PIP} install"
GPU = f"{ALONE} 'onnxruntime-gpu>=1.30.1'"
CUDA = f"{PIP} install 'cuda-bindings>=13'"
TENSORRT = f"{PIP} install 'tensorrt>=11' 'cuda-bindings>=13'"
TENSORRT_RTX = f"{PIP} install 'tensorrt-rtx>=1.7' 'cuda-bindings>=13'"
PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", f"{PIP} install 'onnxruntime>=1.30.1'"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        GPU,
        defaults={"use_tf32": "0"},  # the library's own default is 1: products of 10-bit fractions
        device="cuda",
        capture="enable_cuda_graph",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        f"{GPU} 'tensorrt>=10,<11'",
        profiles="trt",
        device="cuda",
        capture="trt_cuda_graph_enable",
    ),
    "nv-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        f"{PIP} install onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        profiles="nv",
    ),
    "directml": Provider("DmlExecutionProvider", f"{ALONE} onnxruntime-directml"),
    "coreml": Provider("CoreMLExecutionProvider", f"{PIP} install 'onnxruntime>=1.30.1'"),
    "openvino": Provider("", f"{PIP} install 'openvino>=2026.4'", package="openvino"),
}


def check_options(provider: str, options: Mapping[str, str]) -> None:
    """Raise UsageError for an unknown provider, or options for the CPU, which drops them."""
    if provider not in PROVIDERS:
        raise UsageError(f"provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
    if options and provider == "cpu":
        raise UsageError(
            f"provider cpu takes no options; found {', '.join(options)}. "
            "Choose another --provider, or --threads for the number of CPU threads"
        )


def span(profiles: Iterable[Profile]) -> dict[str, tuple[int, int, int]]:
    """One profile over the ranges of all, with the middle one's optimum; empty for none."""
    known = list(profiles)
    return {
        axis: (
            min(profile[axis][0] for profile in known),
            known[len(known) // 2][axis][1],
            max(profile[axis][2] for profile in known),
        )
        for axis in (known[0] if known else ())
    }


def profile_options(
    provider: str, spec: "GraphSpec", profiles: Iterable[Profile]
) -> dict[str, str]:
    """The provider's options that make it build one engine for the span of all `profiles`.

    One range and not several: ONNX Runtime's TensorRT provider builds several profiles, but runs
    the first alone (its pull request 31624), and the RTX provider wants an index with each run.
    Inputs of fixed shape have no range. Empty without profiles, or for a provider that builds no
    engines. Raises UsageError where the profiles lack an axis of the graph.

    Format: ONNX Runtime, "TensorRT Execution Provider", Explicit shape range.
    """
    prefix, ranges = PROVIDERS[provider].profiles, span(profiles)
    if not prefix or not ranges:
        return {}
    dynamic = [tensor for tensor in spec.inputs if tensor.names]
    missing = {axis for tensor in dynamic for axis in tensor.names} - set(ranges)
    if missing:
        raise UsageError(
            f"{spec.file}: the profiles have {sorted(ranges)}; expected {sorted(missing)} too. "
            "Build the plans again, with a range for each axis"
        )
    return {
        f"{prefix}_profile_{bound}_shapes": ",".join(
            f"{tensor.name}:{'x'.join(map(str, tensor.shape(sizes)))}" for tensor in dynamic
        )
        for bound, sizes in (
            (bound, {axis: values[place] for axis, values in ranges.items()})
            for place, bound in enumerate(("min", "opt", "max"))
        )
    }
