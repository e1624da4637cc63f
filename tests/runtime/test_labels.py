"""Labels by name, several parts in one condition, mixtures; wrong types are usage errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import open_bundle
from runtime.errors import UsageError
from runtime.images.pixels import read_metadata
from runtime.pipeline.bundle import Bundle
from runtime.sampling.labels import Labels
from tests.conftest import Command

COLOURS = ("red", "blue", "on-red", "on-blue")
PAINTED = Labels([*"0123456789", *COLOURS], [10, 2, 2])
SHAPES = Labels(["circle", "square", "3", "half-moon", "a+b"])


@pytest.fixture
def painted(own_bundle: Path) -> Path:
    """The tiny bundle whose ten labels are of three parts."""
    path = own_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["interface"] |= {"labels": [*"012345", *COLOURS], "parts": [6, 2, 2]}
    path.write_text(json.dumps(manifest))
    return own_bundle


def test_a_series_goes_through_the_labels_of_every_part() -> None:
    assert [SHAPES.turn(number) for number in range(6)] == [0, 1, 2, 3, 4, 0]
    assert Labels([]).turn(3) is None
    series = [PAINTED.turn(number) for number in range(20)]
    assert series[:3] == [(0, 11, 12), (1, 10, 13), (2, 11, 12)]
    for label in series:
        ((_, stroke, ground),) = PAINTED.read(label)
        assert stroke - 10 != ground - 12


@pytest.mark.parametrize(
    ("labels", "text", "found"),
    [
        (PAINTED, "7", [{(7,): 1}]),
        (PAINTED, "red", [{(10,): 1}]),
        (PAINTED, "7:red:on-blue", [{(7, 10, 13): 1}]),
        (PAINTED, "on-blue:7", [{(7, 13): 1}]),
        (PAINTED, "7:red+8:blue", [{(7, 10): 0.5, (8, 11): 0.5}]),
        (PAINTED, "3*0.7+8*0.3,none", [{(3,): 0.7, (8,): 0.3}, {}]),
        (PAINTED, "8-9,red-blue", [{(n,): 1} for n in (8, 9, 10, 11)]),
        (PAINTED, "3+3", [{(3,): 1}]),
        (PAINTED, "10", [{(10,): 1}]),  # by number, where no label has that name
        (SHAPES, "3", [{(2,): 1}]),  # the name wins over the number
        (SHAPES, "half-moon", [{(3,): 1}]),
        (SHAPES, "a+b", [{(4,): 1}]),
        (SHAPES, "circle-3", [{(0,): 1}, {(1,): 1}, {(2,): 1}]),
        (SHAPES, "0", [{(0,): 1}]),
    ],
)
def test_a_text_names_labels_parts_and_mixtures(
    labels: Labels, text: str, found: list[dict[tuple[int, ...], float]]
) -> None:
    listed = labels.listed(text)
    assert [labels.read(label) for label in listed] == found
    if "," not in text and len(found) == 1:
        assert labels.read(text) == found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("squares", "label squares is not in this bundle; the nearest is square. Expected one of"),
        ("99", "or a number from 0 to 4"),
        ("square:circle", "labels circle and square are of the same part of a condition"),
        ("3-circle", "no list of labels"),
        ("circle*1000+3", "from -100 to 100"),
        ("", "an empty label; expected one before and after each , + and :"),
        ("3,", "an empty label; expected"),
        ("3+", "an empty label; expected"),
        ("3::3", "an empty label; expected"),
        ("3*x+0", "label 3 has the weight 'x'; expected digits, with a point or without"),
        ("3*-1", "label 3 has the weight '-1'; expected digits"),
        ("square*", "label square has the weight ''; expected digits"),
        ("3*0", "has no weight but 0; expected one that is not, or none for no condition"),
        ("33", "label 33 is not in this bundle. Expected one of circle"),
        ("0-99999", "label 99999 is not in this bundle"),
    ],
)
def test_a_wrong_label_is_told_with_what_there_is(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        SHAPES.listed(text)
    assert words in str(error.value)


def test_labels_of_one_part_are_no_combination_and_their_mixture_is_told() -> None:
    with pytest.raises(UsageError, match=r"red and blue .* A mixture of both is red\+blue"):
        PAINTED.read(("7", "red", "blue"))


def test_a_combination_is_one_condition_and_a_mixture_several(painted: Path) -> None:
    bundle = open_bundle(painted)
    made = bundle.generate(["3:red", ("red", 3), (3, 6)], steps=2, seed=1, first_index=4)
    alone = bundle.generate([(3, "red")], steps=2, seed=1, first_index=4).latents
    assert np.allclose(made.latents[:1], alone, atol=1e-5)
    mixed: list[Any] = [{"3": 0.5, "red": 0.5}]
    mixture = bundle.generate(mixed, steps=2, seed=1, first_index=4)
    assert not np.allclose(alone, mixture.latents, atol=1e-3)
    conditions = np.zeros((2, 1, 10), np.float32)
    conditions[1, 0, [3, 6]] = 1
    latent = np.ones((1, 4, 4, 4), np.float32)
    null, both = bundle.denoise(latent, 0.5, conditions)
    assert np.abs(null - both).max() > 1e-4


def test_a_sheet_of_several_parts_by_default_and_again(
    painted: Path, tmp_path: Path, command: Command
) -> None:
    run = ("runtime.generate", "--engine", painted, "--steps", 2)
    assert command(*run, "--out", "all.png").returncode == 0
    assert read_metadata(tmp_path / "all.png")["request"]["label"] == [0, 1, 2, 3, 4, 5]
    text = "4:red,red:5+2:on-blue,none"
    assert command(*run, "--label", text, "--out", "a.png").returncode == 0
    found = read_metadata(tmp_path / "a.png")["request"]["label"]
    assert found == [[4, 6], {"5:6": 0.5, "2:9": 0.5}, None]
    assert command(*run, "--from-png", "a.png", "--out", "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    done = command(*run, "--label", "4:redd", "--out", "c.png")
    assert done.returncode == 2 and "the nearest is red" in done.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: b.generate(7), "labels is 7; expected one label per image, as in [7]"),
        (lambda b: b.generate("7"), "as in ['7']"),
        (lambda b: b.generate([1.5]), "label 1.5 is a float"),
        (lambda b: b.generate([True]), "label True is a bool"),
        (lambda b: b.generate([{1: "much"}]), "has the weight 'much'"),
        (lambda b: b.generate([{1: 0, 2: 0.0}]), "has no weight but 0"),
        (lambda b: b.generate([1], latent=8), "latent is 8; expected (height, width)"),
        (lambda b: b.generate([1], latent=(8, 0)), "latent 8x0: expected sides of"),
        (lambda b: b.generate([1], image="64x64"), "image is '64x64'; expected (height, width)"),
        (lambda b: b.generate([1], steps=2.5), "steps is 2.5; expected a whole number"),
        (lambda b: b.generate([1], seed="1"), "seed is '1'; expected a whole number"),
        (lambda b: b.generate([1], guidance_scale="2"), "guidance_scale is '2'; expected a number"),
        (lambda b: b.generate([1], solver=["ddim"]), "solver is ['ddim']; expected a name"),
        (lambda b: b.generate([1], guidance_interval=0.5), "guidance_interval is 0.5"),
        (lambda b: b.encode([[1.0]], (4, 4)), "pixels is a list; expected float32 [batch, 1,"),
        (lambda b: b.encode(np.zeros((1, 1, 8, 8)), (4, 4)), "pixels is float64 (1, 1, 8, 8)"),
        (lambda b: b.encode(np.full((1, 1, 8, 8), 200, np.float32), (4, 4)), "pixels / 127.5 - 1"),
        (lambda b: b.resample(np.full((1, 1, 8, 8), 200, np.float32), (9, 9)), "reach 200"),
        (lambda b: b.decode(np.zeros((1, 3, 4, 4), np.float32), (9, 9)), "float32 [batch, 4,"),
        (lambda b: b.decode(np.zeros((1, 4, 4, 4), np.float32), 9), "size is 9"),
        (lambda b: open_bundle(7), "engine is 7"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_type_is_a_usage_error(tiny_bundle: Path, call: Any, words: str) -> None:
    bundle: Bundle = open_bundle(tiny_bundle)
    with pytest.raises(UsageError) as error:
        call(bundle)
    assert words in str(error.value)
