"""What benchmarks share."""

import pytest

from benchmarks.contenders import Prepared, prepare
from tests.reference.conftest import classifier_file

__all__ = ["classifier_file", "prepared"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The tiny model's graphs in every form, and inputs at two sizes."""
    forms = ("r2id.int8", "r2id.fp16", "r2id.bf16")
    return prepare(tmp_path_factory.mktemp("prepared"), "tiny", [(4, 5), (8, 6)], forms)
