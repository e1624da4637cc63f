"""Bound sessions, on memory of the host: the same calls as on a device, save for its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import open_bundle
from runtime.bundle.manifest import Array, GraphSpec, read_manifest
from runtime.engines import EngineOptions, open_engine
from runtime.engines import onnxruntime as engine_module
from runtime.engines.bound import MOST_CAPTURED, NOT_CAPTURED, Binding, BoundSession, own
from runtime.engines.onnxruntime import OnnxRuntimeEngine, load_library
from runtime.providers import PROVIDERS


@pytest.fixture
def engine(tiny_bundle: Path) -> OnnxRuntimeEngine:
    """The step graph, its tensors not bound."""
    opened = open_engine(read_manifest(tiny_bundle), "r2id", EngineOptions(threads=1))
    assert isinstance(opened, OnnxRuntimeEngine)
    return opened


def bound(engine: OnnxRuntimeEngine, capture: bool = False) -> BoundSession:
    return BoundSession(load_library(), engine.session, engine.spec, ("cpu", 0), capture)


def feed(engine: OnnxRuntimeEngine, height: int, width: int) -> dict[str, Array]:
    """Random inputs of a guided step."""
    rng = np.random.default_rng(height * width)
    sizes = {"height": height, "width": width, "batch": 1, "conditions": 2}
    shapes = {tensor.name: tensor.shape(sizes) for tensor in engine.spec.inputs}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def run(session: BoundSession, inputs: dict[str, Array]) -> Array:
    sizes = session.spec.check_inputs(inputs)
    return session.run(inputs, sizes, ["eps"])["eps"]


@pytest.mark.parametrize("capture", [False, True])
def test_bound_runs_give_what_runs_give(engine: OnnxRuntimeEngine, capture: bool) -> None:
    """At sizes that come and go, through in-place changes; what was given before stays."""
    session, kept = bound(engine, capture), []
    for height, width in ((3, 5), (4, 4), (3, 5), (2, 9), (6, 6), (7, 5), (7, 5), (8, 4)):
        inputs = feed(engine, height, width)
        for _ in range(2):
            inputs["latent"] += 1
            kept.append((run(session, inputs), engine.run(inputs)["eps"]))
    for found, wanted in kept:
        np.testing.assert_array_equal(found, wanted)


def test_only_what_may_have_changed_is_copied_again(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[int, ...]] = []
    value = load_library().OrtValue
    update = value.update_inplace

    def record(self: Any, data: Array) -> None:
        copied.append(data.shape)
        update(self, data)

    monkeypatch.setattr(value, "update_inplace", record)
    session, inputs = bound(engine), feed(engine, 3, 5)
    inputs["position"].flags.writeable = False
    first = run(session, inputs)
    assert len(copied) == len(inputs)
    copied.clear()
    np.testing.assert_array_equal(run(session, inputs), first)
    assert inputs["position"].shape not in copied and len(copied) == len(inputs) - 1
    inputs["position"] = inputs["position"] + 1  # another array: copied, though of the same shape
    inputs["position"].flags.writeable = False
    np.testing.assert_array_equal(run(session, inputs), engine.run(inputs)["eps"])


def test_what_outlives_a_step_is_copied_once_a_request(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request: dict[str, Any] = {"labels": [3], "latent": (5, 7), "steps": 4, "seed": 2}
    wanted = open_bundle(tiny_bundle, EngineOptions(threads=1)).generate(**request)
    copied: list[tuple[int, ...]] = []
    value = load_library().OrtValue
    update = value.update_inplace

    def record(self: Any, data: Array) -> None:
        copied.append(data.shape)
        update(self, data)

    def bind(session: Any, spec: GraphSpec, options: EngineOptions) -> BoundSession:
        return BoundSession(load_library(), session, spec, ("cpu", 0), capture=False)

    monkeypatch.setattr(value, "update_inplace", record)
    monkeypatch.setattr(engine_module, "_bound", bind)
    bundle = open_bundle(tiny_bundle, EngineOptions(threads=1))
    np.testing.assert_array_equal(bundle.generate(**request).latents, wanted.latents)
    position = next(t for t in bundle.manifest.graphs["r2id"].inputs if t.name == "position")
    shape = position.shape({"height": 5, "width": 7})
    assert copied.count(shape) == 1
    assert sum(own[:2] == (2, 1) for own in copied) == 2  # text_k and text_v, once each
    bundle.generate(**request)
    assert copied.count(shape) == 1  # of the same size: it is still there


def test_a_few_sizes_are_captured_each_in_a_graph_of_its_own(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []
    init = Binding.__init__

    def record(self: Binding, owner: Any, sizes: Any, names: Any, graph: int) -> None:
        graphs.append(graph)
        init(self, owner, sizes, names, graph)

    monkeypatch.setattr(Binding, "__init__", record)
    session = bound(engine, capture=True)
    for width in (*range(1, MOST_CAPTURED + 3), 1, MOST_CAPTURED):
        run(session, feed(engine, 3, width))
    assert graphs == [*range(1, MOST_CAPTURED + 1), NOT_CAPTURED, NOT_CAPTURED]


def test_an_array_that_is_the_caller_s_is_not_copied() -> None:
    array = np.zeros(3)
    assert own(array) is array
    assert own(array[:2]).flags.owndata


def test_fp32_on_cuda_is_not_tf32_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = load_library()
    monkeypatch.setattr(library, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(library, "preload_dlls", lambda msvc: None)
    for given, wanted in (({}, "0"), ({"use_tf32": "1"}, "1")):
        options = EngineOptions("cuda", provider_options=given)
        ((name, chosen),) = engine_module._choose(library, None, options) or []
        assert name == PROVIDERS["cuda"].ep_name and chosen["use_tf32"] == wanted


def test_bound_memory_follows_the_provider_and_its_options(engine: OnnxRuntimeEngine) -> None:
    """No graph is captured unless asked for, and none without memory that stays."""

    def made(provider: str, **options: str) -> BoundSession | None:
        asked = EngineOptions(provider, provider_options=options)
        return engine_module._bound(engine.session, engine.spec, asked)

    assert made("cpu") is None and made("directml", device_id="0") is None
    plain, captured = made("cuda", device_id="1"), made("cuda", enable_cuda_graph="1")
    assert plain is not None and (plain.device, plain.capture) == (("cuda", 1), False)
    assert captured is not None and (captured.device, captured.capture) == (("cuda", 0), True)
    other = made("tensorrt", trt_cuda_graph_enable="True")
    assert other is not None and other.capture
