"""Training data: IDX files are checked before they are believed, folders become labels."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference.data import fit, load_folder, load_mnist
from runtime.errors import ArtefactError
from tests.conftest import ROOT

MNIST = Path(os.environ.get("MNIST", ROOT.parent / "shared" / "data" / "mnist"))


def idx(array: np.ndarray) -> bytes:
    sides = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sides + array.tobytes()


def write_mnist(folder: Path, count: int = 5) -> None:
    images = np.arange(count * 28 * 28).astype(np.uint8).reshape(count, 28, 28)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    labels = np.arange(count, dtype=np.uint8)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_raw_and_gzip_files_are_read(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = load_mnist(tmp_path, check_hash=False)
    assert images.pixels.shape == (5, 1, 32, 32) and images.labels.tolist() == [0, 1, 2, 3, 4]
    assert images.pixels[:, :, :2].max() == 0 and images.pixels[1, 0, 2, 2] == 784 % 256


def test_other_files_than_the_standard_ones_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(ArtefactError, match="of the standard file"):
        load_mnist(tmp_path)


def test_folders_are_labels(tmp_path: Path) -> None:
    for name, level in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20), (level, 0, 255)).save(tmp_path / name / "a.png")
    images = load_folder(tmp_path, channels=3, side=8, labels=2)
    assert images.names == ("cat", "dog") and images.labels.tolist() == [0, 1]
    assert images.pixels[1, :, 4, 4].tolist() == [200, 0, 255]
    assert load_folder(tmp_path, channels=1, side=8, labels=2).pixels.shape == (2, 1, 8, 8)
    with pytest.raises(ArtefactError, match="2 label folders; the configuration has 1"):
        load_folder(tmp_path, channels=3, side=8, labels=1)
    (tmp_path / "dog" / "b.png").write_text("no image")
    with pytest.raises(ArtefactError, match=r"b\.png: cannot be read"):
        load_folder(tmp_path, channels=3, side=8, labels=2)
    with pytest.raises(ArtefactError, match="no image of"):
        load_folder(tmp_path / "nothing", channels=3, side=8, labels=2)


def test_fitting_keeps_the_aspect() -> None:
    pixels = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    padded = fit(pixels, 4, 10, pad=True)
    assert padded.shape == (1, 1, 4, 10)
    assert (padded[..., 3:7] == 1).all() and (padded[..., :3] == -1).all()
    cropped = fit(pixels, 4, 10, pad=False)
    assert cropped.shape == (1, 1, 4, 10) and (cropped == 1).all()
    torch.testing.assert_close(fit(pixels, 8, 8, pad=True), torch.ones(1, 1, 8, 8))


@pytest.mark.skipif(not MNIST.exists(), reason=f"no MNIST at {MNIST}; set MNIST to its folder")
def test_the_standard_files_are_accepted() -> None:
    train, test = load_mnist(MNIST), load_mnist(MNIST, "t10k")
    assert len(train) == 60_000 and len(test) == 10_000
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
