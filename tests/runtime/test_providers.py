"""Execution providers: the table, options, profiles, and every way of falling back."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from runtime import open_bundle
from runtime.bundle.interface import Range
from runtime.bundle.manifest import GraphSpec, PlanSpec, read_manifest
from runtime.engines import EngineOptions, open_engine
from runtime.engines import onnxruntime as engine_module
from runtime.errors import IncompatibleError, UsageError
from runtime.images.pixels import read_metadata
from runtime.providers import PROVIDERS, Provider, profile_options, span
from tests.conftest import Command

PROFILES = (
    {"height": (1, 4, 8), "width": (2, 4, 8), "batch": (1, 1, 4), "conditions": (1, 2, 2)},
    {"height": (4, 9, 16), "width": (4, 16, 32), "batch": (1, 2, 4), "conditions": (1, 2, 2)},
    {"height": (8, 64, 64), "width": (8, 64, 64), "batch": (1, 1, 8), "conditions": (1, 2, 3)},
)


def test_the_library_knows_every_provider_that_no_other_package_brings() -> None:
    """A plugin's name comes with the plugin: the library need not list it."""
    known = engine_module.load_library().get_all_providers()
    own = {p.ep_name for p in PROVIDERS.values() if not p.package and not p.plugin}
    assert "CUDAExecutionProvider" in own and own <= set(known)


@pytest.mark.parametrize("name", [n for n, p in PROVIDERS.items() if n != "cpu" and not p.package])
def test_a_provider_that_is_not_there_is_an_error_unless_allowed(
    name: str, tiny_bundle: Path
) -> None:
    if PROVIDERS[name].ep_name in engine_module.load_library().get_available_providers():
        pytest.skip(f"{name} is here")
    with pytest.raises(IncompatibleError, match=f"--provider {name}: .*--allow-fallback"):
        open_bundle(tiny_bundle, EngineOptions(name)).engines.open("r2id_film")
    fallen = open_bundle(tiny_bundle, EngineOptions(name, allow_fallback=True))
    assert fallen.engines.open("r2id_film").provider == fallen.provider == "cpu"


def test_a_provider_that_opens_and_runs_nothing_is_an_error_unless_allowed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's provider is in every build, is first in its session, and takes no node of ours."""
    library = engine_module.load_library()
    if "AzureExecutionProvider" not in library.get_available_providers():
        pytest.skip("this build has no Azure provider")
    monkeypatch.setitem(PROVIDERS, "idle", Provider("AzureExecutionProvider", "no command"))
    with pytest.raises(IncompatibleError, match="fell back to CPUExecutionProvider"):
        open_bundle(tiny_bundle, EngineOptions("idle")).engines.open("r2id")
    fallen = open_bundle(tiny_bundle, EngineOptions("idle", allow_fallback=True))
    assert fallen.engines.open("r2id").provider == "cpu"


def test_a_plugin_that_cannot_be_loaded_says_why(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that names a library which is none: the library's own loader refuses it."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    (tmp_path / "r2_test_plugin.py").write_text(
        f"def get_ep_name(): return 'NoProvider'\ndef get_library_path(): return {str(broken)!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugin = Provider("NoProvider", "no command", plugin="r2_test_plugin")
    monkeypatch.setitem(PROVIDERS, "plugin", plugin)
    with pytest.raises(IncompatibleError, match=r"r2_test_plugin cannot be loaded.*broken\.so"):
        open_bundle(tiny_bundle, EngineOptions("plugin")).engines.open("r2id_film")


def test_options_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(UsageError, match="provider cpu takes no options; found device_id"):
        EngineOptions("cpu", provider_options={"device_id": "0"})
    with pytest.raises(UsageError, match="'abacus'; expected one of cpu, cuda"):
        EngineOptions("abacus")


def test_the_command_line_passes_options_and_names_what_ran(
    tiny_bundle: Path, command: Command, tmp_path: Path
) -> None:
    base = ("--engine", tiny_bundle, "--steps", 1, "--out", "a.png")
    for option, words in (("device_id", "expected KEY=VALUE"), ("a=1", "cpu takes no options")):
        done = command("runtime.generate", *base, "--provider-option", option)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    options = ("--provider-option", "device_id=0", "--provider-option", "a=b=c")
    if "CUDAExecutionProvider" in engine_module.load_library().get_available_providers():
        pytest.skip("cuda is here")
    fallen = ("--provider", "cuda", "--allow-fallback", *options)
    assert command("runtime.generate", *base, *fallen).returncode == 0
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata["provider"] == "cpu"
    assert metadata["provider_options"] == {"device_id": "0", "a": "b=c"}


def test_profiles_become_one_range_per_dynamic_input(tiny_bundle: Path) -> None:
    spec = read_manifest(tiny_bundle).graph("r2id_position")
    assert profile_options("tensorrt", spec, PROFILES) == {
        "trt_profile_min_shapes": "coordinates:1x2x4",
        "trt_profile_opt_shapes": "coordinates:9x16x4",
        "trt_profile_max_shapes": "coordinates:64x64x4",
    }
    whole = profile_options("nv-tensorrt-rtx", read_manifest(tiny_bundle).graph("r2id"), PROFILES)
    assert sorted(whole) == [f"nv_profile_{bound}_shapes" for bound in ("max", "min", "opt")]
    for place, bound in enumerate(("min", "opt", "max")):
        sizes = {axis: values[place] for axis, values in span(PROFILES).items()}
        named = dict(pair.split(":") for pair in whole[f"nv_profile_{bound}_shapes"].split(","))
        dynamic = [t for t in read_manifest(tiny_bundle).graph("r2id").inputs if t.name in named]
        assert {"latent", "position", "text_k", "text_v"} <= set(named)
        for tensor in dynamic:
            assert named[tensor.name] == "x".join(map(str, tensor.shape(sizes)))


def test_profiles_do_not_concern_other_providers_and_must_be_whole(tiny_bundle: Path) -> None:
    spec = read_manifest(tiny_bundle).graph("r2id")
    assert profile_options("cuda", spec, PROFILES) == {} == profile_options("tensorrt", spec, ())
    with pytest.raises(UsageError, match=r"expected \['batch', 'conditions'\] too"):
        profile_options("tensorrt", spec, [{"height": (1, 2, 3), "width": (1, 2, 3)}])


def test_an_engine_gets_the_profiles_of_its_plan(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[GraphSpec, Mapping[str, str]]] = []

    class Recorder:
        def __init__(self, spec: GraphSpec, model: bytes, options: EngineOptions, optimised: bool):
            assert not optimised
            opened.append((spec, options.provider_options))

    monkeypatch.setattr(engine_module, "OnnxRuntimeEngine", Recorder)
    manifest = read_manifest(tiny_bundle)
    manifest = replace(manifest, plans={"r2id_position.plan": plan("r2id_position")})
    own = {"trt_profile_opt_shapes": "coordinates:8x8x4", "device_id": "1"}
    open_engine(manifest, "r2id_position", EngineOptions("tensorrt", provider_options=own))
    open_engine(manifest, "r2id_film", EngineOptions("tensorrt", provider_options=own))
    open_engine(manifest, "r2id_position", EngineOptions("cuda", provider_options=own))
    (spec, options), *others = opened
    assert options == {"trt_profile_min_shapes": "coordinates:1x2x4", **own} | {
        "trt_profile_max_shapes": "coordinates:64x64x4"
    }
    assert spec.ranges["height"] == Range(1, 64)
    assert all(options == own for _, options in others)


def plan(graph: str) -> PlanSpec:
    """A plan's entry in a manifest, of a file that is not there."""
    return PlanSpec(
        file=f"{graph}.plan",
        sha256="0" * 64,
        graph=graph,
        precision="fp32",
        source_sha256="0" * 64,
        flavour="tensorrt_rtx",
        version="1.7.1",
        targets=("sm120", "sm89"),
        platform="linux x86_64",
        profiles=PROFILES,
        build_seconds=12.5,
        bytes=5_000_000,
    )
