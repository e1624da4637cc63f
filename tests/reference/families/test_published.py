"""`reference.published` finds the family of published files, asks for what they do not tell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reference import checkpoint, published
from runtime.errors import ArtefactError, UsageError
from tests.conftest import Command
from tests.reference.families.golden import Golden

AXIAL = pytest.mark.parametrize("name", ["siid", "s2id"])
OPTIONS = {"siid": ("--heads", "4", "--fold", "2"), "s2id": ("--heads", "6")}


def convert(out: Path, *args: object) -> checkpoint.Checkpoint:
    """What the command makes of `args`, opened."""
    published.convert(published.parser().parse_args([*map(str, args), "--name", "own"]))
    return checkpoint.load(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def state_dicts(name: str, folder: Path) -> tuple[Path, Path]:
    """The golden weights as the published code saves them: the denoiser, the text encoder."""
    golden, paths = Golden(name), (folder / "denoiser.pt", folder / "text.pt")
    for part, path in zip((name, "text"), paths, strict=True):
        torch.save(golden.state(part).tensors, path)
    return paths


@AXIAL
def test_axial_state_dicts_are_told_apart_in_any_order(
    name: str, tmp_path: Path, out: Path
) -> None:
    denoiser, text = state_dicts(name, tmp_path)
    first = convert(out, denoiser, text, out, *OPTIONS[name])
    assert first.family.name == name and first.models.config.name == "own"
    config, meta = getattr(first.models.config, name), Golden(name).meta[name]
    found = (config.channels, config.encoder_blocks, config.high_frequencies, config.film_dim)
    wanted = ("c_channels", "enc_blocks", "pos_high_freq", "film_dim")
    assert found == tuple(meta[key] for key in wanted)
    assert (config.time_high_frequencies, config.low_frequencies) == (meta["time_high_freq"], 3)
    assert set(first.provenance["published"]) == {"denoiser.pt", "text.pt"}
    other = convert(out, text, denoiser, out, *OPTIONS[name])
    for key, tensor in first.models.state_dict().items():
        assert torch.equal(other.models.state_dict()[key], tensor)


@AXIAL
def test_what_shapes_do_not_tell_is_asked_for(name: str, tmp_path: Path, out: Path) -> None:
    paths = state_dicts(name, tmp_path)
    with pytest.raises(UsageError, match=r"Give --heads N"):
        convert(out, *paths, out)
    if name == "siid":
        with pytest.raises(UsageError, match=r"--fold N .*--heads 8 --fold 8"):
            convert(out, *paths, out, "--heads", "4")
    with pytest.raises(UsageError, match="multiples of"):
        convert(out, *paths, out, "--heads", "7", "--fold", "2")
    with pytest.raises(UsageError, match="0 of a text encoder among 1 files"):
        convert(out, paths[0], out, *OPTIONS[name])
    assert not out.exists()


def test_weights_that_rows_and_columns_share_are_kept_once(tmp_path: Path, out: Path) -> None:
    denoiser, text = state_dicts("s2id", tmp_path)
    state = torch.load(denoiser, weights_only=True)
    state = {k: state[k.replace("col_mha", "row_mha")] for k in state}
    # The author's oldest checkpoint has its output convolution under this name.
    for part in ("weight", "bias"):
        state[f"latent_to_epsilon.0.{part}"] = state.pop(f"latent_to_epsilon.{part}")
    torch.save(state, denoiser)
    found = convert(out, denoiser, text, out, *OPTIONS["s2id"])
    assert found.models.config.s2id.share_weights
    assert not any(".column." in key for key in found.models.state_dict())
    separate = Golden("s2id").meta["s2id"]["d_channels"]
    attention = found.models.s2id.encoder[0].attention
    x = torch.randn(1, 3, 4, separate)
    turned = attention(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(attention(x), turned, rtol=0, atol=1e-5)


def hdit_files(folder: Path, name: str = "hour") -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = Golden("hdit").state(name)
    return {key: tensor.clone() for key, tensor in file.tensors.items()}, dict(file.settings)


def test_hdit_is_read_from_every_form_that_it_is_published_in(tmp_path: Path, out: Path) -> None:
    state, settings = hdit_files(tmp_path)
    text = json.dumps(settings)
    slim, half = tmp_path / "slim.safetensors", tmp_path / "half.safetensors"
    bare, whole = tmp_path / "bare.safetensors", tmp_path / "training.pt"
    alone = tmp_path / "config.json"
    save_file(state, slim, {"config": text})
    save_file({k: v.half() for k, v in state.items()}, half, {"config": text})
    save_file(state, bare)
    raw = {k: v + 1 for k, v in state.items()}
    torch.save({"model": raw, "model_ema": state, "config": settings, "step": 7}, whole)
    alone.write_text(text)
    wanted = convert(out, slim, out).models
    assert wanted.config.hdit.levels[0].attention == "neighborhood"
    assert wanted.config.sigma_max == 80 and wanted.config.labels == 10
    for args in ((whole,), (bare, alone), (alone, bare), (bare, "--config", alone)):
        files, flags = args[:-2] if "--config" in args else args, ()
        flags = args[-2:] if "--config" in args else ()  # type: ignore[assignment]
        found = convert(out, *files, out, *flags).models
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), (args, key)
    rounded = convert(out, half, out).models
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(rounded.state_dict()[key], tensor, rtol=1e-3, atol=1e-6)
    assert rounded.hdit.rotations(32, 32, torch.device("cpu"))[0][0].dtype == torch.float32
    with pytest.raises(UsageError, match=r"Give k-diffusion's configuration: --config FILE\.json"):
        convert(out, bare, out)


def damaged(state: dict[str, Tensor], settings: dict[str, Any], kind: str) -> str:
    """Damage a checkpoint; returns words that its error must hold."""
    model = settings["model"]
    if kind == "type":
        model["type"] = "image_transformer_v1"
        return "type 'image_transformer_v1'; expected 'image_transformer_v2'"
    if kind == "variance":
        model["has_variance"] = True
        return "has_variance"
    if kind == "widths":
        model["widths"] = [32, 48, 96]
        return "expected one model's"
    if kind == "channels":
        model["patch_size"] = [1, 4]
        model["input_channels"] = 4
        return "'input_channels': 3"
    if kind == "classes":
        settings["dataset"]["num_classes"] = 7
        return "num_classes"
    if kind == "attention":
        model["self_attns"][0] = {"type": "axial", "d_head": 16}
        return "axial"
    if kind == "patch":
        del model["patch_size"]
        return "no usable 'patch_size'"
    if kind == "scale":
        state["mid_level.0.self_attn.scale"][1] = -1
        return "self_attn.scale is negative"
    if kind == "frequencies":
        state["mid_level.0.self_attn.pos_emb.freqs"][0, 0] *= 1.1
        return "not log-spaced"
    del state["mid_level.0.ff.down_proj.weight"]
    return "no tensor mid_level.0.ff.down_proj.weight"


@pytest.mark.parametrize(
    "kind",
    [
        *("type", "variance", "widths", "channels", "classes", "attention"),
        *("patch", "scale", "frequencies", "missing"),
    ],
)
def test_what_is_no_hdit_of_ours_is_refused_by_name(kind: str, tmp_path: Path, out: Path) -> None:
    state, settings = hdit_files(tmp_path)
    words = damaged(state, settings, kind)
    path = tmp_path / "slim.safetensors"
    save_file(state, path, {"config": json.dumps(settings)})
    with pytest.raises(ArtefactError) as caught:
        convert(out, path, out)
    assert words in str(caught.value) and not out.exists()


def test_files_of_no_family_are_refused(tmp_path: Path, out: Path, command: Command) -> None:
    torch.save({"conv_in.weight": torch.ones(2)}, tmp_path / "unet.pt")
    done = command("reference.published", "unet.pt", "out.safetensors")
    assert done.returncode == 3 and "tensors such as conv_in.weight" in done.stderr
    assert "expected published checkpoints of hdit, r2, s2id, siid" in done.stderr
    assert not out.exists()
