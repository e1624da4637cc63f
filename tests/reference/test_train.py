"""Training: killed and resumed is the same as never killed; sizes and batches are drawn right."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reference import checkpoint
from reference.families import FAMILIES, R2
from reference.families.parts.config import read
from reference.families.parts.layers import LinearAttention
from reference.families.r2.config import ModelConfig
from reference.families.r2.initialisation import cell_centres, initialise_r2ir
from reference.families.r2.r2ir import R2IR, grid_tokens
from reference.families.r2.training import canvas, draw_size, jittered
from reference.train import CONFIGS, build_models, family_in, read_config
from runtime.bundle.folders import owning
from runtime.errors import UsageError
from tests.conftest import ROOT, Command

STEPS = 40


@pytest.fixture(scope="module")
def colour_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small colour images in two classes, and a tiny configuration for it."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{index}.png")
    text = (CONFIGS / "tiny.toml").read_text()
    for old, new in (
        ('dataset = "mnist"', 'dataset = "folder"'),
        ("color_channels = 1", "color_channels = 3"),
        ("steps = 12", f"steps = {STEPS}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "colour.toml").write_text(text)
    return folder


def start(folder: Path, out: Path) -> "subprocess.Popen[bytes]":
    config, data = folder / "colour.toml", folder / "data"
    line = [sys.executable, "-m", "reference.train", "--config", str(config), "--data", str(data)]
    line += ["--out", str(out), "--save-every", "5", "--device", "cpu"]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_killed_training_ends_in_the_same_bits(colour_training: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(colour_training, whole).wait(timeout=300) == 0
    draw, kills = random.Random(0), 0
    for stage in ("r2ir", "r2id"):
        process = start(colour_training, killed)
        while process.poll() is None and not (killed / f"{stage}.state.safetensors").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert not (killed / "checkpoint.safetensors").exists()
    assert start(colour_training, killed).wait(timeout=300) == 0
    wanted, found = (load_file(out / "checkpoint.safetensors") for out in (whole, killed))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    for name in ("r2ir.csv", "r2id.csv"):
        log = (whole / name).read_text()
        assert log == (killed / name).read_text()
        assert len(log.splitlines()) == STEPS + 1
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}
    loaded = checkpoint.load(whole / "checkpoint.safetensors")
    assert loaded.provenance["labels"] == ["blue", "red"]
    assert Image.open(whole / "loss.png").size[0] > 400


def test_a_state_of_another_configuration_is_refused(
    colour_training: Path, tmp_path: Path, command: Command
) -> None:
    text = (colour_training / "colour.toml").read_text().replace(f"steps = {STEPS}", "steps = 1")
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text(text.replace("learning_rate = 1e-3", "learning_rate = 1e-4"))
    args = ("--data", colour_training / "data", "--out", "run", "--device", "cpu")
    assert command("reference.train", "--config", "a.toml", *args).returncode == 0
    state = (tmp_path / "run" / "r2ir.state.safetensors").read_bytes()
    other = command("reference.train", "--config", "b.toml", *args)
    changed = "another configuration or data set: r2ir.learning_rate was 0.001, is 0.0001. Give"
    assert other.returncode == 2 and changed in other.stderr
    assert (tmp_path / "run" / "r2ir.state.safetensors").read_bytes() == state


def test_training_is_interrupted_with_code_130(colour_training: Path, tmp_path: Path) -> None:
    process = start(colour_training, tmp_path / "run")
    while process.poll() is None and not (tmp_path / "run" / "r2ir.state.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_configuration_is_whole(name: str) -> None:
    config = read_config(name)
    model: Any = read(family_in(config, name).config, config["model"], name)
    assert model.channels in (1, 3)


def test_bad_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one of .*'large', 'mnist'"):
        read_config("none")
    path, tiny = tmp_path / "own.toml", (CONFIGS / "tiny.toml").read_text()
    for old, new, words in (
        ("steps = 12\n", "", r"\[r2ir\]: lacks \['steps'\]"),
        ("queries", "querys", r"lacks \['queries'\] and has unknown \['querys'\]"),
        ('dataset = "mnist"', 'dataset = "cats"', "dataset is 'cats'"),
        ("seed = 0", "seed 0", "not TOML"),
    ):
        path.write_text(tiny.replace(old, new))
        with pytest.raises(UsageError, match=words):
            read_config(str(path))


def test_drawn_sizes_fill_their_range() -> None:
    draw = random.Random(0)
    sizes = [draw_size(draw, [4, 16], 2.0, 0.5) for _ in range(4000)]
    assert {side for size in sizes for side in size} == set(range(4, 17))
    assert all(max(size) <= 2 * min(size) for size in sizes)
    assert 0.4 < sum(h == w for h, w in sizes) / len(sizes) < 0.8
    assert any(h > w for h, w in sizes) and any(w > h for h, w in sizes)
    assert canvas((9, 16), 32) == (32, 57)


def test_jitter_is_half_a_pixel() -> None:
    torch.manual_seed(0)
    plain = grid_tokens(8, 16, torch.device("cpu"))
    spread = (jittered(8, 16, 400, 1.0, torch.device("cpu")) - plain).std((0, 1))
    expected = torch.tensor([1 / 32, 1 / 32, 1 / 32, 1 / 16])
    torch.testing.assert_close(spread, expected, rtol=0.05, atol=0)


def test_attention_starts_local() -> None:
    """At the start a query reads near places more than far ones, which default weights do not."""
    torch.manual_seed(0)
    model = R2IR(read(ModelConfig, read_config("mnist")["model"], "").r2ir)
    at = grid_tokens(16, 16, torch.device("cpu"))

    def far_share() -> float:
        query = model.query_in(model.position(at))
        attention: LinearAttention = model.decoder[0].attention  # type: ignore[assignment]
        phi = attention.split(torch.nn.functional.elu(attention.key_norm(attention.key(query))) + 1)
        weights = (phi @ phi.transpose(-2, -1)).mean(1)[0]
        distance = torch.cdist(at[0, :, :2], at[0, :, :2])
        return float((weights * (distance > 0.4)).sum() / weights.sum())

    with torch.inference_mode():
        default = far_share()
        initialise_r2ir(model)
        assert far_share() < 0.5 * default
    assert cell_centres(3, 32).shape == (96, 2)


def test_building_is_deterministic() -> None:
    one, other = (build_models(read_config("tiny"), "").state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_an_interrupt_saves_where_it_stands_and_says_so(
    colour_training: Path, tmp_path: Path
) -> None:
    config = colour_training / "long.toml"
    text = (colour_training / "colour.toml").read_text()
    config.write_text(text.replace(f"steps = {STEPS}", "steps = 100000", 1))
    line = [sys.executable, "-m", "reference.train", "--config", str(config)]
    line += ["--data", str(colour_training / "data"), "--out", str(tmp_path), "--device", "cpu"]
    line += ["--save-every", "3"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r2ir.state.safetensors").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "the same command goes on from there" in rest
    assert "Traceback" not in rest and "fills 2 of 10 labels" in rest
    step = int(rest.split("r2ir: step ")[1].split(" of")[0])
    rows = (tmp_path / "r2ir.csv").read_text().splitlines()
    assert step == len(rows) - 1 >= 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("width = 16\n", "", "width"),
        ("heads = 2", "heads = 3", "heads"),
        ("jitter = 1.0\n", "", "jitter"),
        ("[model.condition]\nlabels = 10\n", "[model.condition]\n", "labels"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line_that_names_the_key(
    tmp_path: Path, command: Command, old: str, new: str, words: str
) -> None:
    text = (CONFIGS / "tiny.toml").read_text()
    assert old in text
    (tmp_path / "own.toml").write_text(text.replace(old, new, 1))
    args = ("--config", "own.toml", "--data", "nowhere", "--out", "runs")
    done = command("reference.train", *args)
    assert done.returncode in (2, 3) and words in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_where_mnist_comes_from_is_said_with_its_hash(tmp_path: Path, command: Command) -> None:
    args = ("--config", "tiny", "--data", ".", "--out", "runs")
    done = command("reference.train", *args)
    assert done.returncode == 3 and "https://" in done.stderr and "ba891046e650" in done.stderr


def test_the_configuration_for_folders_starts_from_the_shipped_weights() -> None:
    models = build_models(read_config("folder"), "folder")
    shipped = checkpoint.load(checkpoint.SHIPPED).models
    fresh = FAMILIES[R2].training.start_from(models, shipped)
    assert not fresh
    assert models.config.r2ir.color_channels == 3


def test_a_device_or_folder_that_cannot_be_used_is_told_first(
    colour_training: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--config", colour_training / "colour.toml", "--data", colour_training / "data")
    for device in ("cuda:77", "abacus"):
        done = command("reference.train", *args, "--out", tmp_path / "a", "--device", device)
        assert done.returncode == 2 and f"--device {device}" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()
    (tmp_path / "file").write_bytes(b"")
    for out in ("file", "file/a", "a" * 300):
        done = command("reference.train", *args, "--out", tmp_path / out)
        assert done.returncode == 5 and done.stderr.count("\n") == 1, done.stderr


def test_two_trainings_do_not_share_a_folder(
    colour_training: Path, tmp_path: Path, command: Command
) -> None:
    args = ("--config", colour_training / "colour.toml", "--data", colour_training / "data")
    with owning(tmp_path / "a"):
        done = command("reference.train", *args, "--out", tmp_path / "a")
    assert done.returncode == 5 and "in use by process" in done.stderr
