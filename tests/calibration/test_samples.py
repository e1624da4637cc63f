"""Calibration data: what they cover, that they come again, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration import samples
from calibration.__main__ import coverage_text
from calibration.samples import Samples, Settings, calibration_set, coverage, fingerprint, load
from runtime.bundle.manifest import read_manifest
from runtime.errors import ArtefactError
from runtime.pipeline.bundle import Bundle
from runtime.sampling.loop import sample
from runtime.sampling.request import Request
from tests.conftest import HEAVY, Command
from tests.runtime.test_reading import damaged

FEW = Settings(
    sizes=((4, 4), (3, 5)), guidance_scales=(0.0, 1.0, 2.0), steps=3, every=1, pictures=2, seed=5
)


# What an array may be instead.
UNFIT = (
    lambda a: a.astype("U3"),
    lambda a: a.astype(complex),
    lambda a: a.astype(np.int64),
    lambda a: a.view([("x", np.float32)]),
    lambda a: a[None],
    lambda a: a.ravel()[:0],
    lambda a: a * np.nan,
)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("calibration-*.npz")
    return path


def rewritten(path: Path, change: Any) -> None:
    """The file with its index and arrays changed."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    index = json.loads(arrays.pop("index").tobytes())
    change(index, arrays)
    np.savez(path, index=np.frombuffer(json.dumps(index).encode(), np.uint8), **arrays)


def test_whole_trajectories_at_every_size_and_scale(own_bundle: Path) -> None:
    found = calibration_set(read_manifest(own_bundle), FEW, own_bundle, own_bundle, None)
    covered = coverage(found)
    assert covered["sizes"]["r2id"] == {"4x4": 6, "3x5": 6}
    assert covered["t"] == dict.fromkeys(("0.667", "0.333"), 6)
    assert covered["guidance_scale"] == {"0": 4, "1": 4, "2": 4}
    assert all(len(covered["sizes"][name]) >= 2 for name in HEAVY)
    branches = {s.guidance_scale: len(s.inputs["text_k"]) for s in found if s.graph == "r2id"}
    assert branches == {0.0: 1, 1.0: 1, 2.0: 2}


def test_conditions_have_a_label_of_every_part(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["interface"]["parts"] = [4, 3, 3]
    path.write_text(json.dumps(content))
    manifest = read_manifest(own_bundle)
    found = calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    own = [s for s in found if s.graph == "r2id" and s.size == (4, 4) and s.guidance_scale == 1]
    bundle = Bundle(manifest)
    request = Request([(2, 4, 8), (3, 5, 9)], (4, 4), steps=3, guidance_scale=1, solver="ddim")
    wanted = bundle.diffuser.prepare(request, (4, 4)).at(1)["text_k"]
    np.testing.assert_array_equal(own[0].inputs["text_k"], wanted)
    sizes = {"height": 4, "width": 4, "batch": 2, "conditions": 3}
    inputs, _ = Samples(manifest).take("r2id", sizes, 1)
    request = Request([(1, 6, 7), (2, 4, 8)], (4, 4), steps=3, guidance_scale=1, solver="ddim")
    wanted = bundle.diffuser.prepare(request, (4, 4)).at(1)["text_k"]
    np.testing.assert_array_equal(inputs["text_k"][1], wanted[0])


def test_a_trajectory_s_samples_are_the_sampler_s_own(own_bundle: Path) -> None:
    """The last step from the latent recorded ends where `Bundle.diffuse` does."""
    manifest = read_manifest(own_bundle)
    found = calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    own = [s for s in found if s.graph == "r2id" and s.size == (4, 4) and s.guidance_scale == 2]
    assert [s.t for s in own] == pytest.approx([2 / 3, 1 / 3])
    bundle = Bundle(manifest)
    request = Request([4, 5], (4, 4), steps=3, seed=5, solver="ddim")
    table = request.table(bundle.diffuser.schedule)
    predict = bundle.diffuser.predictor(
        bundle.diffuser.guidance(request, table), request.latent, table
    )
    last = sample(predict, own[-1].inputs["latent"], table, first=2)
    np.testing.assert_array_equal(last.astype(np.float32), bundle.diffuse(request))


def test_together_trajectories_hold_every_t(own_bundle: Path) -> None:
    some = Settings(((2, 2),), (0.0, 1.0, 2.0, 4.0, 3.0), steps=50, every=5, pictures=1)
    found = calibration_set(read_manifest(own_bundle), some, own_bundle, own_bundle, None)
    assert [*coverage(found)["t"].values()] == [1] * 48  # t = 1 and 0.98 are fp32's


def test_the_cache_is_used_and_knows_its_settings(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(own_bundle)
    first = calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    path = the_file(own_bundle)
    before = path.read_bytes()
    path.unlink()
    calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    with np.load(path) as file:
        again = {name: file[name].tobytes() for name in file.files}
    path.write_bytes(before)
    with np.load(path) as file:
        assert again == {name: file[name].tobytes() for name in file.files}
    monkeypatch.setattr(samples, "drawn", None)  # drawing now fails
    second = calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    assert [s.graph for s in second] == [s.graph for s in first]
    with pytest.raises(TypeError):
        calibration_set(manifest, Settings((), steps=2), own_bundle, own_bundle, None)


def test_real_pictures(own_bundle: Path, tmp_path: Path) -> None:
    digits = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    sides = b"".join(side.to_bytes(4, "big") for side in (3, 28, 28))
    (tmp_path / samples.IDX_FILE).write_bytes(bytes([0, 0, 8, 3]) + sides + digits.tobytes())
    pictures = samples.read_pictures(tmp_path, FEW)
    assert pictures.shape == (2, 1, 32, 32) and pictures.dtype == np.float32
    assert (pictures[:, :, :2] == -1).all() and -1 <= pictures.min() < pictures.max() <= 1
    (tmp_path / samples.IDX_FILE).write_bytes(b"short")
    with pytest.raises(ArtefactError, match="expected IDX magic"):
        samples.read_pictures(tmp_path, FEW)
    with pytest.raises(ArtefactError, match="Pass their folder with --data"):
        samples.read_pictures(own_bundle, FEW)


def test_bad_data_are_refused_and_change_nothing(own_quantized: Path, command: Command) -> None:
    def other(index: Any, arrays: Any) -> None:
        index["key"]["bundle"] = "0" * 64

    def empty(index: Any, arrays: Any) -> None:
        index["samples"] = []

    def not_finite(index: Any, arrays: Any) -> None:
        for array in arrays.values():
            array.flat[0] = np.nan

    before = {path.name: path.read_bytes() for path in own_quantized.glob("*.onnx")}
    manifest = (own_quantized / "manifest.json").read_bytes()
    given = own_quantized.parent / "given.npz"
    whole = the_file(own_quantized).read_bytes()
    for change, words in (
        (other, "of another bundle"),
        (empty, "has no sample of r2id"),
        (not_finite, "NaN or infinity in"),
        (None, "no calibration data"),
    ):
        given.write_bytes(whole)
        if change is None:
            given.write_bytes(b"nothing")
        else:
            rewritten(given, change)
        done = command("calibration", own_quantized, "--samples", given)
        assert done.returncode == 3 and words in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in own_quantized.glob("*.onnx")} == before
    assert (own_quantized / "manifest.json").read_bytes() == manifest


def test_random_damage_ends_in_an_error_of_ours_or_none(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    calibration_set(manifest, FEW, own_bundle, own_bundle, None)
    path = the_file(own_bundle)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    index, refused, draw = arrays.pop("index").tobytes(), 0, random.Random(0)
    for turn in range(400):
        own = dict(arrays)
        if turn % 4 == 0:  # of the file's bytes, which its checksums tell
            path.write_bytes(damaged(whole, turn))
        else:
            if turn % 4 == 1:
                name = draw.choice([*own])
                own[name] = draw.choice(UNFIT)(own[name])
            text = damaged(index, turn) if turn % 4 > 1 else index
            np.savez(path, index=np.frombuffer(text, np.uint8), **own)
        try:
            assert coverage_text(load(path, manifest))
        except ArtefactError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert turn % 4 > 1
    assert refused > 300


def test_the_fingerprint_is_of_the_fp32_graphs(quantized_bundle: Path, tiny_bundle: Path) -> None:
    quantized, plain = read_manifest(quantized_bundle), read_manifest(tiny_bundle)
    assert quantized.sha256 != plain.sha256
    assert fingerprint(quantized) == fingerprint(plain)
