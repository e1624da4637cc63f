"""Checkpoints and published state dicts: faults are listed, nothing runs on loading."""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reference import checkpoint, published
from reference.families.parts.embeddings import frequencies
from reference.families.parts.published import Published, Shapes
from reference.families.r2.model import R2Models
from reference.train import build_models, read_config
from runtime.errors import ArtefactError
from runtime.memory import peak_resident
from tests.conftest import Command
from tests.runtime.test_reading import damaged


@pytest.fixture(scope="module")
def models() -> R2Models:
    return build_models(read_config("tiny"), "tiny")


@pytest.fixture
def saved(models: R2Models, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(path, models, {"made": "here"}, torch.float32)
    return path


def test_a_checkpoint_comes_back_as_it_was(models: R2Models, saved: Path) -> None:
    loaded = checkpoint.load(saved)
    assert loaded.models.config == models.config
    assert loaded.provenance == {"made": "here"}
    wanted = models.state_dict()
    for name, tensor in loaded.models.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert {name.split(".")[0] for name in wanted} == {"r2ir", "r2id", "condition"}


def test_half_precision_is_half_the_file(models: R2Models, saved: Path) -> None:
    half = saved.with_name("half.safetensors")
    checkpoint.save(half, models, {}, torch.float16)
    assert half.stat().st_size < 0.7 * saved.stat().st_size
    assert checkpoint.load(half).models.r2ir.color_in.weight.dtype == torch.float32


def damage(path: Path, kind: str) -> str:
    """Damage a checkpoint; returns words that its error must hold."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if kind == "truncated":
        path.write_bytes(data[:-1])
        return "no whole safetensors file"
    if kind == "header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
        return "header of 1099511627776 bytes"
    if kind == "empty":
        path.write_bytes(b"")
        return "header"
    if kind == "json":
        path.write_bytes(data[:8] + b"\xff" * length + data[8 + length :])
        return "no JSON in its metadata"
    if kind == "overlap":
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        return "no whole safetensors file"
    if kind == "metadata":
        save_file(load_file(path), path)
        return "metadata without"
    tensors = load_file(path)
    metadata = checkpoint.read_metadata(data, path)
    name = "r2id.encoder.0.ffn.up.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["r2id.surplus"] = torch.zeros(1)
    elif kind == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif kind == "dtype":
        tensors[name] = tensors[name].int()
    elif kind == "nan":
        tensors[name][3, 4] = torch.nan
    elif kind == "config":
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"surplus": 1})
    save_file(tensors, path, metadata)
    return {"extra": "unexpected r2id.surplus", "config": "unknown field `surplus`"}.get(kind, name)


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated", "header", "empty", "json", "overlap", "metadata"),
        *("missing", "extra", "shape", "dtype", "nan", "config"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(saved: Path, kind: str) -> None:
    words = damage(saved, kind)
    with pytest.raises(ArtefactError, match=words):
        checkpoint.load(saved)


def test_every_difference_is_counted(saved: Path) -> None:
    metadata = checkpoint.read_metadata(saved.read_bytes(), saved)
    save_file({"other": torch.zeros(2)}, saved, metadata)
    with pytest.raises(ArtefactError, match=r"missing .*; missing .* and \d+ more"):
        checkpoint.load(saved)


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_more_is_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "harm")))
    torch.save({"weight": Malicious(tmp_path / "harm")}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        done = command("reference.published", name, name, name, "out.safetensors")
        assert done.returncode == 3, done.stderr
        assert "pickle asks for more than tensors" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out.safetensors").exists()


def test_state_dicts_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r2ir.pt"
    path.write_bytes(b"no archive")
    with pytest.raises(ArtefactError):
        published.read_file(path)
    torch.save([1, 2], path)
    with pytest.raises(ArtefactError, match="holds list"):
        published.read_file(path)
    torch.save({"step": 3}, path)
    with pytest.raises(ArtefactError, match="holds step"):
        published.read_file(path)
    shapes = Shapes(Published(path, {"pos_embed.frequencies": torch.ones(4)}))
    with pytest.raises(ArtefactError, match="no tensor color_to_embed"):
        shapes.at("color_to_embed_proj.weight", 0)
    with pytest.raises(ArtefactError, match="expected octaves of π"):
        shapes.split("pos_embed.frequencies")


def test_the_split_of_frequencies_is_read_off_the_stored_ones(tmp_path: Path) -> None:
    for high, low in ((10, 6), (9, 7), (3, 0), (0, 2)):
        shapes = Shapes(Published(tmp_path / "r2ir.pt", {"f": frequencies(high, low)}))
        assert shapes.split("f") == (high, low)


def edited(path: Path, **metadata: object) -> None:
    """The checkpoint with other metadata: `config` is merged into its own."""
    with safe_open(path, "pt") as file:
        own = dict(file.metadata())
    config = json.loads(own["config"])
    for section, values in metadata.pop("config", {}).items():  # type: ignore[attr-defined]
        config[section] |= values
    own |= {"config": json.dumps(config)} | {k: json.dumps(v) for k, v in metadata.items()}
    save_file(load_file(path), path, own)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": {"r2id": {"width": 32768}}},
        {"config": {"r2id": {"encoder_blocks": 65536}}},
        {"config": {"r2ir": {"high_frequencies": 65536}}},
        {"config": {"r2id": {"heads": 7}}},
        {"config": {"condition": {"labels": 65536}}},
        {"provenance": []},
        {"provenance": {"labels": [1]}},
        {"provenance": {"labels": "abc"}},
    ],
)
def test_a_configuration_is_compared_before_it_is_built(
    metadata: dict[str, object], saved: Path
) -> None:
    edited(saved, **metadata)
    before, began = peak_resident(), time.process_time()
    with pytest.raises(ArtefactError, match=r"tiny\.safetensors: "):
        checkpoint.load(saved)
    assert peak_resident() - before < 256 << 20 and time.process_time() - began < 20


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_tensors_of_other_types_are_named(dtype: torch.dtype, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    name = "r2id.encoder.0.ffn.up.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, saved, metadata)
    with pytest.raises(ArtefactError, match=rf"{name} is torch\.\w+; expected a floating"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, 3, device="meta"),
        torch.zeros(1).expand(1 << 20, 1 << 20),
    ],
)
def test_tensors_that_are_not_plain_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match=r"a\.pt: 'a' is no plain tensor"):
        published.read_file(tmp_path / "a.pt")
    torch.save({("a", 1): torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match="is no plain tensor"):
        published.read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["checkpoint", "state dict"])
def test_random_damage_ends_in_an_error_of_ours_or_none(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    path, read = saved, checkpoint.load
    if kind == "state dict":
        path, read = tmp_path / "a.pt", published.read_file  # type: ignore[assignment]
        torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole, refused = path.read_bytes(), 0
    for turn in range(60):
        path.write_bytes(damaged(whole[:9000], turn) + whole[9000:])
        try:
            read(path)
        except ArtefactError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 20
