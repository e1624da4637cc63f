"""Export: graphs agree with the models, and what does not is stopped before the manifest."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import to_onnx, verify
from export.families.r2 import bundle as r2
from export.families.r2 import graphs
from reference.families.r2.model import R2Models
from runtime.bundle.manifest import read_manifest, relative_error
from runtime.coordinates import grid
from runtime.errors import ArtefactError
from tests.conftest import Command
from tests.tiny import tiny_models

NAMES = {
    *("r2id_position", "r2id_film", "r2id_condition", "r2id"),
    *("r2ir_image_summary", "r2ir_encode", "r2ir_latent_summary"),
    *("r2ir_decode", "r2ir_render", "r2ir_response"),
}


@pytest.fixture(scope="module")
def models() -> R2Models:
    return tiny_models()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = relative_error(found.detach().numpy(), wanted.detach().numpy())
    assert error <= verify.TOLERANCE


def at(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(grid(height, width))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (6, 2)])
def test_the_step_graph_is_the_reference_model(models: R2Models, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(2, 4, *size), torch.rand(3, 2, 10)
    alpha_bar = torch.tensor([0.4])
    text = [t.unflatten(0, (3, 2)) for t in graphs.Condition(models)(labels.flatten(0, 1))]
    film = graphs.Film(models)(alpha_bar)[0]
    found = graphs.Denoise(models)(x, graphs.Position(models)(at(*size)), film, *text)
    close(found, models.r2id(x, alpha_bar.expand(2), models.condition(labels)))


@pytest.mark.parametrize(("image", "latent"), [((1, 7), (1, 1)), ((9, 12), (3, 4))])
def test_the_resampler_graphs_are_the_reference_model(
    models: R2Models, image: tuple[int, int], latent: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(2, 1, *image) * 2 - 1
    kv, k = graphs.ResamplerSummary(models, "image")(pixels, at(*image))
    z = graphs.Encode(models, "latent")(at(*latent), kv, k)
    close(z, models.r2ir.encode(pixels, latent))
    kv, k = graphs.ResamplerSummary(models, "latent")(z, at(*latent))
    drawn, response = graphs.Decode(models, "image")(at(*image), kv, k)
    close(drawn, models.r2ir.decode(z, image))
    tile = at(*image)[:, 1:4]
    close(graphs.Render(models, "image")(tile, kv, k, response), drawn[..., 1:4])


def test_sums_over_tiles_add_up(models: R2Models) -> None:
    pixels = torch.rand(1, 1, 10, 6) * 2 - 1
    summary = graphs.ResamplerSummary(models, "image")
    whole = summary(pixels, at(10, 6))
    top, rest = summary(pixels[:, :, :3], at(10, 6)[:3]), summary(pixels[:, :, 3:], at(10, 6)[3:])
    for total, first, second in zip(whole, top, rest, strict=True):
        close(first + second, total)


def test_the_ratios_of_tiles_are_those_of_the_whole(models: R2Models) -> None:
    """Site by site: each graph run on both halves gives the next ratio of the untiled decode."""
    torch.manual_seed(0)
    kv, k = graphs.ResamplerSummary(models, "latent")(torch.randn(1, 4, 3, 2), at(3, 2))
    coordinates = at(8, 6)
    wanted = graphs.Decode(models, "image")(coordinates, kv, k)[1]
    response = torch.ones_like(wanted)
    for site in range(2 * wanted.shape[1]):
        halves = [
            graphs.Response(models, "image")(half, kv, k, response)[site]
            for half in coordinates.split(4)
        ]
        root = ((halves[0] + halves[1]) / 2).sqrt()
        response[:, site // 2, site % 2] = root / (root.mean(1, keepdim=True) + 1e-6)
        close(response[:, site // 2, site % 2], wanted[:, site // 2, site % 2])


def test_the_bundle_is_whole_and_measured(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.graphs.keys() == NAMES
    for _, spec in manifest.forms():
        model = onnx.load_from_string(manifest.file_bytes(spec))
        assert model.opset_import[0].version >= 20
        assert not any(t.external_data for t in model.graph.initializer)
        for wanted, value in zip(spec.inputs, model.graph.input, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert tuple(d.dim_param or d.dim_value for d in dims) == wanted.axes
        assert spec.parity and all(0 <= row.error <= verify.TOLERANCE for row in spec.parity)
    rows = [row.sizes for row in manifest.graphs["r2id"].parity]
    assert {(r["height"], r["width"]) for r in rows} >= {(1, 1), (1, 9), (7, 5), (31, 64)}
    assert {r["batch"] for r in rows} == {1, 3} and {r["conditions"] for r in rows} == {1, 2, 3}
    assert manifest.trajectory is not None
    assert manifest.trajectory.errors["latent"] <= verify.TRAJECTORY_TOLERANCE
    assert manifest.interface.labels == tuple("abcdefghij")


def test_a_graph_that_differs_stops_the_export(models: R2Models) -> None:
    """The parity check fails for outputs off by 3e-4, for NaN and for another shape."""
    source = next(s for s in r2.sources(models) if s.name == "r2id_film")

    model = to_onnx.onnx_from_source(source)
    largest = max(float(source.module(a).detach().abs().max()) for a in torch.eye(2))

    def altered(change: float) -> bytes:
        own = onnx.ModelProto.FromString(model.SerializeToString())
        graph = own.graph
        last = next(node for node in graph.node if "film" in node.output)
        last.output[[*last.output].index("film")] = "exact"
        added = np.array(change * largest, np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(added, "added"))
        graph.node.append(onnx.helper.make_node("Add", ["exact", "added"], ["film"]))
        return own.SerializeToString()

    verify.parity(source, altered(0.0), r2.SIDES)
    for change in (3e-4, np.nan, np.inf):
        with pytest.raises(ArtefactError, match="differs from PyTorch by"):
            verify.parity(source, altered(change), r2.SIDES)
    assert relative_error(np.zeros((2, 1)), np.zeros((1, 2))) == np.inf


def test_a_wrong_rewrite_is_caught_by_the_trajectory(models: R2Models, tiny_bundle: Path) -> None:
    other = copy.deepcopy(models)
    other.get_parameter("r2id.decoder.1.cross.out.bias").add_(0.05)
    with pytest.raises(ArtefactError, match="20 steps through the graphs differ"):
        verify.trajectory_parity(r2, other, read_manifest(tiny_bundle))


def test_a_baked_in_size_stops_the_export(models: R2Models) -> None:
    source = next(s for s in r2.sources(models) if s.name == "r2id_position")
    model = to_onnx.onnx_from_source(source)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    with pytest.raises(ArtefactError, match=r"has 7 where 'width' is expected: .* baked"):
        to_onnx.name_axes(model, source)


def test_a_failed_export_leaves_the_old_bundle(
    own_bundle: Path, tmp_path: Path, command: Command
) -> None:
    before = {p.name: p.read_bytes() for p in own_bundle.iterdir()}
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    args = ("--checkpoint", "bad.safetensors", "--out", own_bundle)
    done = command("export", *args)
    assert done.returncode == 3 and "safetensors" in done.stderr
    assert {p.name: p.read_bytes() for p in own_bundle.iterdir()} == before
    assert json.loads(before["manifest.json"])["format"] == 3


def test_an_export_into_a_file_is_refused(
    tiny_bundle: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("")
    args = ("--checkpoint", tiny_bundle / "tiny.safetensors", "--out", tmp_path / "file")
    done = command("export", *args)
    assert done.returncode == 5 and "cannot be written" in done.stderr


def test_more_weights_than_a_file_holds_are_refused() -> None:
    module = torch.nn.Linear(1 << 15, 1 << 14, device="meta")
    source = to_onnx.graph_source(
        "wide", "step", module, {"x": ("batch", 1 << 15)}, {"y": ("batch", 1 << 14)}
    )
    with pytest.raises(ArtefactError, match=r"wide: has weights of 2.15 GB; expected at most 2.15"):
        to_onnx.onnx_from_source(source)


def test_parity_leaves_out_what_takes_minutes() -> None:
    def cases(width: int) -> list[dict[str, int]]:
        module = torch.nn.Linear(width, width, bias=False, device="meta")
        axes = ("batch", "height", "width", width)
        source = to_onnx.graph_source("wide", "step", module, {"x": axes}, {"y": axes})
        return [*verify.size_cases(source, to_onnx.ANY)]

    every, some = cases(8), cases(1 << 14)
    assert len(every) == len(verify.SIZES) * len(verify.BATCHES)
    tokens = [case["batch"] * case["height"] * case["width"] for case in some]
    assert {*map(str, some)} < {*map(str, every)} and max(tokens) == 1984 < verify.MOST_WORK >> 28
