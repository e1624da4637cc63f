"""Fixtures of the reference: a reader of digits."""

from pathlib import Path

import pytest

from reference.classifier import Classifier, fitted, store, trained_classifier
from reference.data import load_mnist
from tests.reference.test_data import MNIST


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a classifier of a few seconds' training, as `--classifier` takes them."""
    train, path = load_mnist(MNIST), tmp_path_factory.mktemp("reader") / "classifier.safetensors"
    store(fitted(train, steps=100), train, path)
    return path


@pytest.fixture(scope="session")
def classifier(classifier_file: Path) -> Classifier:
    """Its network."""
    return trained_classifier(load_mnist(MNIST), classifier_file)
