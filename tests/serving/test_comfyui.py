"""ComfyUI's nodes, on the tiny bundle. ComfyUI is no package: what they need of it is STOOD IN.

The stand-in records schemas, progress and previews, and interrupts; the rest is the real thing.
"""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import Bundle
from runtime.errors import UsageError

torch = pytest.importorskip("torch")
DRAWN = {"seed": 4, "steps": 3, "guidance_scale": 1.5, "height": 24, "width": 40}
DRAWN |= {"latent_height": 3, "latent_width": 5}
UNSET = dict.fromkeys(("height", "width", "latent_height", "latent_width"), 0)


class Interrupted(Exception):  # noqa: N818
    """Stand-in of ComfyUI's InterruptProcessingException."""


class Comfy:
    """STAND-IN of ComfyUI: what it is told, and after how many tellings its user interrupts."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float, Any]] = []
        self.interrupt_after: int | None = None

    def set_progress(self, value: float, max_value: float, preview_image: Any = None) -> None:
        self.told.append((value, max_value, preview_image))

    def throw(self) -> None:
        if self.interrupt_after is not None and len(self.told) >= self.interrupt_after:
            raise Interrupted

    def modules(self) -> dict[str, ModuleType]:
        def kind(name: str) -> SimpleNamespace:
            def declared(id: str, **more: Any) -> SimpleNamespace:
                return SimpleNamespace(kind=name, id=id, **more)

            return SimpleNamespace(Input=declared, Output=declared)

        kinds = {name: kind(name) for name in ("String", "Int", "Float", "Combo", "Image", "Mask")}
        io = SimpleNamespace(
            **kinds,
            Custom=kind,
            ComfyNode=type("ComfyNode", (), {}),
            Schema=lambda **fields: SimpleNamespace(**fields),
            NodeOutput=lambda *values: SimpleNamespace(result=values),
        )
        api = SimpleNamespace(execution=SimpleNamespace(set_progress=self.set_progress))
        names = ("comfy", "comfy.model_management", "comfy_api", "comfy_api.latest")
        found = {name: ModuleType(name) for name in names}
        vars(found["comfy.model_management"])["throw_exception_if_processing_interrupted"] = (
            self.throw
        )
        vars(found["comfy_api.latest"]).update(
            io=io, ComfyAPISync=lambda: api, ComfyExtension=type("ComfyExtension", (), {})
        )
        return found


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    own = Comfy()
    for name, module in own.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield own
    for name in ("serving.comfyui", "serving.comfyui.nodes"):
        sys.modules.pop(name, None)


@pytest.fixture
def nodes(comfy: Comfy) -> dict[str, Any]:
    """The pack's nodes by their id, found as ComfyUI finds them."""
    extension = asyncio.run(importlib.import_module("serving.comfyui").comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture
def bundle(nodes: dict[str, Any], tiny_bundle: Path) -> Bundle:
    (opened,) = nodes["R2OpenBundle"].execute(str(tiny_bundle), "cpu").result
    assert isinstance(opened, Bundle)
    return opened


def image_of(pixels: np.ndarray) -> np.ndarray:
    """Grey pixels `[B, 1, h, w]` in [-1, 1] as what an IMAGE holds."""
    return np.repeat(np.clip(pixels.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1), 3, axis=3)


def run(node: Any, **inputs: Any) -> Any:
    """Execute as ComfyUI does: by the schema's ids, what is optional left out."""
    schema = node.define_schema()
    needed = {each.id for each in schema.inputs if not getattr(each, "optional", False)}
    assert needed <= set(inputs) <= {each.id for each in schema.inputs}
    (image,) = node.execute(**inputs).result
    assert image.dtype == torch.float32 and image.shape[3] == 3
    assert image.min() >= 0 and image.max() <= 1
    return image


def test_draws_what_the_runtime_draws_with_previews(
    nodes: dict[str, Any], bundle: Bundle, comfy: Comfy
) -> None:
    found = run(nodes["R2Draw"], bundle=bundle, labels="1-2,0+2", **DRAWN)
    wanted = bundle.generate(
        [1, 2, "0+2"], (3, 5), image=(24, 40), steps=3, seed=4, guidance_scale=1.5
    )
    np.testing.assert_allclose(found.numpy(), image_of(wanted.images), atol=1e-6)
    steps = [told for told in comfy.told if told[2] is not None]
    assert [told[:2] for told in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(preview.size == (40, 24) for *_, preview in steps)
    assert comfy.told[-1][:2] == (3 * 24, 3 * 24)


def test_zeros_are_the_defaults_and_large_previews_are_small(
    nodes: dict[str, Any], bundle: Bundle, comfy: Comfy
) -> None:
    own = {"seed": 1, "steps": 1, "guidance_scale": 2.0}
    found = run(nodes["R2Draw"], bundle=bundle, labels="none", **own, **UNSET)
    wanted = bundle.generate([None], steps=1, seed=1).images
    np.testing.assert_allclose(found.numpy(), image_of(wanted), atol=1e-6)
    large = UNSET | {"height": 300, "width": 600}
    run(nodes["R2Draw"], bundle=bundle, labels="1", **own, **large)
    assert max(preview.size for *_, preview in comfy.told if preview) == (256, 128)
    with pytest.raises(UsageError, match="0"):
        run(nodes["R2Draw"], bundle=bundle, labels="1", **own, **UNSET | {"height": 32})


@pytest.mark.parametrize("after", [0, 2, 4])
def test_an_interrupt_ends_a_run_before_between_and_after_steps(
    nodes: dict[str, Any], bundle: Bundle, comfy: Comfy, after: int
) -> None:
    comfy.interrupt_after = after
    with pytest.raises(Interrupted):
        run(nodes["R2Draw"], bundle=bundle, labels="1,2", **DRAWN)
    assert len(comfy.told) == after


def test_edits_keep_what_the_mask_leaves(nodes: dict[str, Any], bundle: Bundle) -> None:
    image = torch.rand(1, 24, 40, 1).expand(1, 24, 40, 3).contiguous()
    mask = torch.zeros(1, 12, 20)
    mask[..., 10:] = 1
    own = {"bundle": bundle, "image": image, "strength": 0.8, "seed": 2, "steps": 4}
    own |= {"guidance_scale": 2.0, **UNSET}
    found = run(nodes["R2Edit"], labels="1,2", mask=mask, **own)
    init = image.numpy()[None, ..., 0] * 2 - 1
    wanted = bundle.generate(
        [1, 2], init=init, mask=mask[:, None].numpy(), strength=0.8, seed=2, steps=4
    )
    assert found.shape == (2, 24, 40, 3)
    np.testing.assert_allclose(found.numpy(), image_of(wanted.images), atol=1e-4)
    np.testing.assert_allclose(found[:, :, :20], image[:, :, :20].expand(2, -1, -1, -1), atol=1e-6)
    both = torch.cat([image, 1 - image])
    assert run(nodes["R2Edit"], labels="1", **own | {"image": both}).shape == (2, 24, 40, 3)


def test_resamples_colours_and_alpha_as_pillow_s_grey(
    nodes: dict[str, Any], bundle: Bundle, comfy: Comfy
) -> None:
    image = torch.rand(2, 16, 24, 4)
    found = run(nodes["R2Resample"], bundle=bundle, image=image, height=40, width=20)
    grey = image.numpy()[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    wanted = bundle.resample(grey[:, None] * 2 - 1, (40, 20))
    np.testing.assert_allclose(found.numpy(), image_of(wanted), atol=1e-5)
    assert comfy.told[-1][:2] == (80, 80)
    comfy.interrupt_after = 0
    with pytest.raises(Interrupted):
        run(nodes["R2Resample"], bundle=bundle, image=image, height=40, width=20)


def test_a_bundle_is_opened_anew_when_it_was_written_anew(
    nodes: dict[str, Any], own_bundle: Path
) -> None:
    ask = nodes["R2OpenBundle"].fingerprint_inputs
    first = ask(str(own_bundle), "cpu")
    assert ask(str(own_bundle / "r2id.onnx"), "cpu") == first
    manifest = own_bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert ask(str(own_bundle), "cpu") != first


def test_seeds_are_turned_by_comfyui_and_names_are_unique(nodes: dict[str, Any]) -> None:
    assert set(nodes) == {"R2OpenBundle", "R2Draw", "R2Edit", "R2Resample"}
    for name in ("R2Draw", "R2Edit"):
        inputs = {each.id: each for each in nodes[name].define_schema().inputs}
        assert inputs["seed"].control_after_generate and inputs["seed"].max == 2**63 - 1
