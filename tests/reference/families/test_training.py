"""Every family learns by its own recipe, and goes on after a stop as if there had been none."""

import argparse
import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reference import checkpoint
from reference.data import load_folder
from reference.families import FAMILIES, family_of
from reference.families.hdit.augmentation import augmented, draw_parameters, resampled
from reference.families.hdit.training import HDiTTask
from reference.families.parts.training import Step
from reference.train import CONFIGS, build_models, family_in, read_config, train
from runtime.errors import ArtefactError, UsageError
from tests.conftest import Command

STEPS = 60
PIXEL_FAMILIES = ("siid", "s2id", "hdit", "sid2")
EACH = pytest.mark.parametrize("name", PIXEL_FAMILIES)
# What the pages say that the networks and label conditions of these configurations count.
PARAMETERS = {
    "siid-published": 24_348_568 + 3_328,
    "s2id-published": 6_118_657 + 3_072,
    "hdit-mnist": 9_187_360,
    "hdit-cifar10": 20_981_809,
    "hdit-flowers": 22_361_274,
    "hdit-ffhq1024": 85_079_300,
    "sid2": 1_530_340,
    "sid2-imagenet512": 317_144_204,
}
LARGEST_SHIPPED = 3_000_000


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of a bright bar on a dark ground, upright in one folder and level in the other."""
    folder = tmp_path_factory.mktemp("bars")
    for name in ("level", "upright"):
        (folder / name).mkdir()
        for index in range(8):
            pixels = np.zeros((28, 28), np.uint8)
            pixels[:, 8 + index : 14 + index] = 255
            image = pixels if name == "upright" else pixels.T
            Image.fromarray(image).save(folder / name / f"{index}.png")
    return folder


def configuration(name: str, folder: Path, **changes: object) -> Path:
    """The family's tiny configuration on a folder of images, some of its values changed."""
    text = (CONFIGS / f"tiny-{name}.toml").read_text().replace('"mnist"', '"folder"')
    for key, value in changes.items():
        lines = text.splitlines()
        found = [i for i, line in enumerate(lines) if line.startswith(f"{key} = ")]
        assert len(found) == 1, key
        lines[found[0]] = f"{key} = {value}"
        text = "\n".join(lines) + "\n"
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def arguments(config: Path, data: Path, out: Path, init: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(
        config=str(config),
        data=data,
        out=out,
        init=init,
        device="cpu",
        compile=False,
        bf16=False,
        dtype="float32",
        save_every=7,
    )


@EACH
def test_a_family_learns_and_resumes_in_the_same_bits(
    name: str, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(name, tmp_path, steps=STEPS)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(arguments(config, bars, whole))
    with (whole / f"{name}.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == STEPS
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])

    task = FAMILIES[name].training.STAGES[0].task
    inputs = task.inputs

    def interrupted(self: object, step: Step) -> object:
        if step.index == 25:
            raise KeyboardInterrupt
        return inputs(self, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(task, "inputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(arguments(config, bars, stopped))
    assert not (stopped / "checkpoint.safetensors").exists()
    train(arguments(config, bars, stopped))
    wanted, found = (load_file(out / "checkpoint.safetensors") for out in (whole, stopped))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    opened = checkpoint.load(whole / "checkpoint.safetensors")
    assert opened.family.name == name and opened.provenance["labels"] == ["level", "upright"]
    denoise = opened.models.denoiser(torch.zeros(2, 1, 10), np.array([0.01, 0.5]))
    size = opened.models.config.default_size
    eps = denoise(torch.randn(1, 1, *size), 1)
    assert eps.shape == (2, 1, 1, *size) and torch.isfinite(eps).all()


@EACH
def test_a_family_trains_in_bfloat16(name: str, bars: Path, tmp_path: Path) -> None:
    args = arguments(configuration(name, tmp_path, steps=2), bars, tmp_path / "run")
    args.bf16 = True
    before = torch.get_float32_matmul_precision()
    train(args)
    assert torch.get_float32_matmul_precision() == before
    state = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_weights_of_another_run_are_taken_over_within_a_family(bars: Path, tmp_path: Path) -> None:
    config = configuration("sid2", tmp_path, steps=1, learning_rate="0.0", final_rate="0.0")
    train(arguments(config, bars, tmp_path / "a"))
    first = tmp_path / "a" / "checkpoint.safetensors"
    config = configuration(
        "sid2", tmp_path, steps=1, learning_rate="0.0", final_rate="0.0", seed=1, weight_decay=0.0
    )
    train(arguments(config, bars, tmp_path / "b", first))
    wanted, found = (load_file(tmp_path / x / "checkpoint.safetensors") for x in "ab")
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    other = configuration("hdit", tmp_path, steps=1)
    with pytest.raises(UsageError, match="of the family sid2; expected hdit"):
        train(arguments(other, bars, tmp_path / "c", first))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_configurations_have_the_parameters_of_their_pages(name: str) -> None:
    config = read_config(name)
    with torch.device("meta"):
        models = family_in(config, name).open(config["model"], name)
    assert sum(p.numel() for p in models.parameters()) == PARAMETERS[name]


@EACH
def test_small_configurations_are_small_enough_to_ship(name: str) -> None:
    config = read_config(name)
    with torch.device("meta"):
        models = family_in(config, name).open(config["model"], name)
    assert 1_000_000 < sum(p.numel() for p in models.parameters()) < LARGEST_SHIPPED
    side = models.config.default_size[0]
    assert side % models.config.multiple == 0 and side // 2 >= models.config.minimum


@EACH
def test_an_untrained_network_predicts_nothing(name: str) -> None:
    """Its last layer is zero, so that learning starts where the loss is that of no estimate."""
    models = build_models(read_config(f"tiny-{name}"), name).eval()
    assert family_of(models).name == name
    network = getattr(models, name)
    last = {"hdit": "patch_out.proj", "sid2": "head"}.get(name, "eps_out")
    assert not network.get_submodule(last).weight.any()


def test_a_checkpoint_names_its_family(tmp_path: Path) -> None:
    models = build_models(read_config("tiny-hdit"), "tiny-hdit")
    path = tmp_path / "hdit.safetensors"
    checkpoint.save(path, models, {}, torch.float16)
    opened = checkpoint.load(path)
    assert opened.family.name == "hdit" and opened.models.config == models.config
    stored = load_file(path)
    assert stored["hdit.time_emb.weight"].dtype == torch.float32  # drawn once, never learnt
    assert stored["hdit.time_in_proj.weight"].dtype == torch.float16
    other = path.read_bytes().replace(b'"family":"hdit"', b'"family":"hdot"')
    path.write_bytes(other)
    with pytest.raises(ArtefactError, match="family 'hdot'; expected one of"):
        checkpoint.load(path)


def test_a_configuration_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text((CONFIGS / "tiny-sid2.toml").read_text().replace('"sid2"', '"sid3"', 1))
    with pytest.raises(UsageError, match="family is 'sid3'; expected one of"):
        read_config(str(path))


def test_pictures_of_siid_and_s2id_are_of_the_size_of_their_stage(bars: Path) -> None:
    images = load_folder(bars, 1, 28, 10)
    config = read_config("tiny-siid")
    models, task = build_models(config, "tiny-siid"), FAMILIES["siid"].training.STAGES[0].task
    section = config["siid"] | {"size": [[0.5, 8, 8], [1.0, 12, 16]], "batch": 2}
    condition, draw = torch.eye(10)[:2], random.Random(0)
    for index, size in ((0, (8, 8)), (9, (8, 8)), (10, (12, 16)), (19, (12, 16))):
        step = Step(index, 20, images.pixels[:2], condition, draw, torch.arange(2))
        noisy, at, *_ = task(section, models, images).inputs(step)
        fold = models.config.multiple
        assert noisy.shape[2:] == size and at.shape[1:3] == (size[0] // fold, size[1] // fold)
    for wrong in ([[1.0, 8, 9]], [[1.0, 8]]):
        with pytest.raises(UsageError, match="both multiples of"):
            task(section | {"size": wrong}, models, images)


def test_hdit_decays_linear_maps_and_slows_its_mapping() -> None:
    models = build_models(read_config("tiny-hdit"), "tiny-hdit")
    task = HDiTTask.__new__(HDiTTask)
    task.model = models.hdit
    kinds = {name: (g.decayed, round(g.share, 3)) for g in task.groups() for name in g.names}
    assert set(kinds) == {name for name, _ in models.hdit.named_parameters()}
    assert kinds["mid_level.0.self_attn.qkv_proj.weight"] == (True, 1.0)
    assert kinds["mid_level.0.ff.norm.linear.weight"] == (True, 0.333)
    assert kinds["mapping.blocks.0.up_proj.weight"] == (True, 0.333)
    assert kinds["mapping.out_norm.scale"] == (False, 0.333)
    for name in ("time_in_proj.weight", "class_emb.weight", "splits.0.fac", "out_norm.scale"):
        assert kinds[name] == (False, 1.0)


def test_augmentation_does_what_it_tells() -> None:
    torch.manual_seed(0)
    image = torch.rand(64, 1, 16, 16) * 2 - 1
    moved, told = augmented(image, 1e-9)  # mirroring alone
    mirrored = told[:, 0].bool()
    assert 16 < int(mirrored.sum()) < 48 and not told[:, 1:].any()
    torch.testing.assert_close(moved[~mirrored], image[~mirrored], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[mirrored], image[mirrored].flip(-1), rtol=0, atol=1e-5)
    told, maps = draw_parameters(4000, 0.12)
    changed = (told[:, 1:] != 0).float().mean(0)
    assert (changed[1:] - 0.12).abs().max() < 0.03 and abs(float(changed[0]) - 0.06) < 0.03
    assert maps.shape == (4000, 2, 3)


def test_maps_lead_from_output_to_input() -> None:
    """A shift by an eighth of the side to the right moves a pixel by two of sixteen."""
    image = torch.full((1, 1, 16, 16), -1.0)
    image[..., 8, 4] = 1.0
    moved = resampled(image, torch.tensor([[[1.0, 0.0, -0.25], [0.0, 1.0, 0.0]]]))
    assert moved[0, 0, 8, 6] > 0.99 and moved[0, 0, 8, 4] < -0.9


def test_the_command_trains(bars: Path, tmp_path: Path, command: Command) -> None:
    config = configuration("hdit", tmp_path, steps=2)
    args = ("--config", config, "--data", bars, "--out", "run", "--device", "cpu")
    done = command("reference.train", *args)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "loss.png").exists()
