"""The families that diffuse pixels, from a tiny model with random weights to pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from calibration import half
from calibration.samples import Samples
from export import verify
from export.chunk_attention import chunk_attention
from export.chunk_axial import chunk_axial
from export.families import family_of
from export.families.hdit import attention
from export.picture_graph import picture_graph, table_rows
from export.single_file import inputs
from export.to_onnx import GraphSource
from reference import checkpoint
from reference.families.hdit.attention import neighbourhood
from reference.train import build_models, read_config
from runtime import Bundle, open_bundle
from runtime.bundle.manifest import read_manifest, relative_error
from runtime.coordinates import grid
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.sampling import solvers
from runtime.sampling.guidance import guidance
from runtime.sampling.labels import Labels
from runtime.sampling.request import Request
from runtime.sampling.schedule import log_snr
from runtime.sampling.solvers import Table
from tests.conftest import Command

# Sizes that no graph was traced at, odd in tokens and not square where that is legal; an illegal
# size and the nearest legal one.
FAMILIES: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, int], tuple[int, int]]] = {
    "siid": (((4, 4), (12, 28)), (13, 18), (12, 20)),
    "s2id": (((1, 1), (3, 8)), (70000, 3), (65536, 3)),
    "hdit": (((16, 16), (20, 36)), (15, 22), (16, 24)),
    "sid2": (((16, 16), (24, 40)), (8, 35), (16, 32)),
}


@pytest.fixture(scope="session")
def bundle(pixel_bundle: Path) -> Path:
    return pixel_bundle


def evaluations(bundle: Bundle, models: Any, size: tuple[int, int]) -> float:
    """The error of one evaluation under three conditions against the reference, the worst."""
    labels = np.zeros((3, 2, len(bundle.interface.labels)), np.float32)
    labels[1, :, 3], labels[2, 0, :2] = 1, (0.3, 0.6)
    shape = (2, bundle.interface.latent_channels, *size)
    latent = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    errors = []
    for alpha_bar in (2e-4, 0.4, 0.999):
        denoise = models.denoiser(torch.from_numpy(labels), np.array([alpha_bar]))
        wanted = denoise(torch.from_numpy(latent), 0).numpy()
        errors.append(relative_error(bundle.denoise(latent, alpha_bar, labels), wanted))
    return max(errors)


def test_graphs_agree_with_the_reference_on_both_engines(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    for _, spec in manifest.forms():
        assert spec.parity and all(row.error <= verify.TOLERANCE for row in spec.parity)
    assert manifest.trajectory is not None
    assert max(manifest.trajectory.errors.values()) <= verify.TRAJECTORY_TOLERANCE
    models = checkpoint.load(bundle / "tiny.safetensors").models
    assert manifest.interface == family_of(models).interface(models, tuple("abcdefghij"))
    for provider in ("cpu", "openvino"):
        opened = open_bundle(bundle, EngineOptions(provider, threads=2))
        for size in FAMILIES[bundle.name][0]:
            assert evaluations(opened, models, size) <= verify.TOLERANCE, (provider, size)


def test_pictures_are_drawn_again_from_their_own_record(
    bundle: Path, command: Command, tmp_path: Path
) -> None:
    engine = ("--engine", bundle, "--threads", 2)
    height, width = FAMILIES[bundle.name][0][1]
    asked = ("--label", "1,3", "--latent", f"{height}x{width}", "--steps", 4)
    done = command("runtime.generate", *engine, *asked)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (2 * width + 2, height)
    before = (tmp_path / "out.png").read_bytes()
    again = ("--from-png", "out.png", "--out", "again.png")
    done = command("runtime.generate", *engine, *again)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.png").read_bytes() == before


def test_illegal_sizes_name_the_nearest(bundle: Path) -> None:
    opened = open_bundle(bundle)
    legal, illegal, nearest = FAMILIES[bundle.name]
    with pytest.raises(UsageError, match=f"nearest legal size is {nearest[0]}x{nearest[1]}"):
        opened.generate([1], illegal)
    with pytest.raises(UsageError, match="diffuses pixels and has no resampler"):
        opened.generate([1], legal[1], image=(legal[1][0] * 2, legal[1][1] * 2))
    assert not opened.engines.opened


def test_one_file_is_the_whole_picture(bundle: Path) -> None:
    """Over nodes and noise of which random weights make neither black nor white alone."""
    opened = open_bundle(bundle, EngineOptions(threads=2))
    nodes = np.array([0.3, 0.6, 0.8, 0.95, 1.0])
    table = Table(nodes, np.array(solvers.rows(nodes, 3, 0.0)))
    guided = np.array([True, False, True, True])
    model = picture_graph(opened.manifest, table_rows(table, guided))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings)
    shares = []  # of what is neither
    for size in FAMILIES[bundle.name][0]:
        request = Request([3, None], size, size, guidance_scale=1.5)
        feeds = inputs(opened, request)
        del feeds["size"]
        feeds["noise"] *= 0.2
        each = Labels(opened.interface.labels).of_images(request.labels)
        weights = guidance(each, 10, 1.5, np.where(guided, 0.5, 1.0), (0.0, 0.9))
        streams = opened.diffuser.noise(request, size)
        wanted = opened.diffuser.sample(feeds["noise"], streams, table, weights, None, (0, 4))
        found = session.run(["pixels"], feeds)[0]
        shares.append((np.abs(wanted) < 1).mean())
        assert np.abs(found - (wanted.clip(-1, 1) + 1) / 2).max() <= 1e-3, size
    assert max(shares) > 0.3


@pytest.mark.parametrize("size", [(7, 9), (8, 23), (17, 14)])
def test_gathered_neighbourhoods_are_exact_at_borders(size: tuple[int, int]) -> None:
    q, k, v = torch.randn(3, 2, *size, 2, 8, generator=torch.Generator().manual_seed(0))
    wanted = neighbourhood(q, k, v, 7)
    tiles = attention.tiling(*(attention.neighbourhood(side, 7) for side in size))
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    found = attention.attend(q, k, v, tiles).transpose(1, 2).unflatten(1, size)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# Settings of [model] that change which graphs there are, or what is in them.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny-siid": {"condition": {"labels": 10, "tokens": 1}},
    "tiny-s2id": {"s2id": {"share_weights": True}},
    "tiny-hdit": {"hdit": {"classes": 0, "patch": [4, 2]}},
    "tiny-sid2": {"sid2": {"types": ["transformer", "transformer", "res"], "head_dim": 8}},
}


@pytest.mark.parametrize("name", [*VARIANTS])
def test_modules_of_other_configurations_are_the_reference(name: str) -> None:
    models = random_models(name, VARIANTS[name])
    labels = torch.zeros(2, 3, models.config.labels)
    if models.config.labels:
        labels[1, :, 4] = 1
    latent = torch.randn(3, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    alpha_bar = np.array([1e-3, 0.7])
    wanted = models.denoiser(labels, alpha_bar)(latent, 1)
    found = through_modules(family_of(models).sources(models), latent, labels, alpha_bar, 1)
    assert relative_error(found.numpy(), wanted[: len(found)].numpy()) <= 1e-5


def test_windows_of_a_rolled_grid_are_the_reference() -> None:
    window = {"attention": "shifted-window", "window": 4, "depth": 2}
    levels = [level | window for level in read_config("tiny-hdit")["model"]["hdit"]["levels"]]
    models = random_models("tiny-hdit", {"hdit": {"levels": levels}})
    labels = torch.eye(10)[[2, 5]].unsqueeze(0)
    latent = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    wanted = models.denoiser(labels, np.array([0.5]))(latent, 0)
    sources = family_of(models).sources(models)
    found = through_modules(sources, latent, labels, np.array([0.5]), 0)
    assert relative_error(found.numpy(), wanted.numpy()) <= 1e-5


def random_models(name: str, changes: dict[str, Any]) -> Any:
    """A tiny configuration with another [model], all its weights random."""
    config = read_config(name)
    for part, own in changes.items():
        config["model"][part] = config["model"][part] | own
    models = build_models(config, name).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in models.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return models


@torch.inference_mode()
def through_modules(
    sources: list[GraphSource], latent: Tensor, labels: Tensor, alpha_bar: Any, step: int
) -> Tensor:
    """eps of a step by the modules of the graphs, wired as the runtime does."""
    known = {
        "coordinates": torch.from_numpy(grid(latent.shape[2], latent.shape[3])),
        "alpha_bar": torch.from_numpy(alpha_bar).float(),
        "log_snr": torch.from_numpy(log_snr(alpha_bar)).float(),
        "condition": labels.flatten(0, 1),
        "latent": latent,
    }
    *kept, last = sources
    for source in kept:
        made = source.module(*(known[spec.name] for spec in source.inputs))
        outputs = made if isinstance(made, tuple) else (made,)
        for spec, tensor in zip(source.outputs, outputs, strict=True):
            axes = [*spec.axes]
            if axes[:1] == ["steps"]:
                tensor, axes = tensor[step], axes[1:]
            if axes[:1] == ["conditions"]:
                tensor = tensor.unflatten(0, labels.shape[:2])
            known[spec.name] = tensor
    eps: Tensor = last.module(*(known[spec.name] for spec in last.inputs))
    return eps


def test_attention_in_parts_is_exact(bundle: Path) -> None:
    """However few scores are held at once, down to a line's head at a time."""
    manifest = read_manifest(bundle)
    spec = manifest.graph(manifest.step_graph)
    model = onnx.load_from_string(manifest.file_bytes(spec))
    height, width = FAMILIES[bundle.name][0][1]
    sizes = {"batch": 2, "conditions": 3, "height": height, "width": width}
    random = np.random.default_rng(0)
    feed = {t.name: random.random(t.shape(sizes), np.float32) for t in spec.inputs}
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]
    for most in (1, 200, 1 << 21):
        chunked = chunk_attention(model, most)
        assert chunked is not None
        assert any(node.op_type == "Attention" for node in chunked.graph.node)
        found = onnxruntime.InferenceSession(chunked.SerializeToString()).run(None, feed)[0]
        assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize("pixel_bundle", ["siid", "s2id"], indirect=True)
def test_axial_blocks_in_parts_are_exact(pixel_bundle: Path) -> None:
    """However few lines are taken at once. SIID's encoder has masks, and stays as it is."""
    manifest = read_manifest(pixel_bundle)
    spec = manifest.graph(manifest.step_graph)
    model = onnx.load_from_string(manifest.file_bytes(spec))
    config = checkpoint.load(pixel_bundle / "tiny.safetensors").models.config
    own = getattr(config, pixel_bundle.name)
    every = own.encoder_blocks + own.decoder_blocks
    parted = every if pixel_bundle.name == "s2id" else own.decoder_blocks
    sizes = {"batch": 2, "conditions": 3, "height": 8, "width": 12}
    random = np.random.default_rng(0)
    feed = {t.name: random.random(t.shape(sizes), np.float32) for t in spec.inputs}
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]
    for most in (1, 200, 1 << 21):
        chunked = chunk_axial(model, most)
        assert chunked is not None
        kinds = [node.op_type for node in chunked.graph.node]
        assert kinds.count("Columns") == kinds.count("Rows") == parted > 0
        assert kinds.count("Finish") == every and "Sigmoid" not in kinds
        assert kinds.count("Spread") >= 2 * every  # and of the norms before the text is read
        found = onnxruntime.InferenceSession(chunked.SerializeToString()).run(None, feed)[0]
        assert relative_error(found, wanted) <= 1e-6


def test_half_forms_stay_close(bundle: Path, tmp_path: Path) -> None:
    """fp16 and bf16 of the step graph, as cores that accumulate in fp32 compute them."""
    manifest = read_manifest(bundle)
    name = manifest.step_graph
    spec = manifest.graph(name)
    model = onnx.load_from_string(manifest.file_bytes(spec))
    height, width = FAMILIES[bundle.name][0][1]
    sizes = {"batch": 2, "conditions": 2, "height": height, "width": width}
    inputs, wanted = Samples(manifest).take(name, sizes, 1)
    for precision in half.HALVES:
        own, engine = half.write_variant(model, spec, name, precision, tmp_path)
        made = onnx.load_from_string((tmp_path / own.file).read_bytes())
        kinds = {tensor.data_type for tensor in made.graph.initializer}
        assert half.HALVES[precision] in kinds  # its large weights at least
        assert half.check(engine.run(inputs), wanted, precision, name) > 0
