"""The sizes and the parts of labels that a checkpoint's training had reach the bundle."""

from dataclasses import replace

import pytest

from export.__main__ import interface_of
from reference import checkpoint
from reference.provenance import label_parts, trained_range
from runtime.bundle.interface import Interface, Trained


@pytest.fixture(scope="module")
def shipped() -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.SHIPPED)


def test_the_shipped_bundle_knows_what_it_was_trained_on(shipped: checkpoint.Checkpoint) -> None:
    interface = interface_of(shipped)
    assert interface.trained == trained_range(shipped.provenance) is not None
    assert interface.warning((8, 8)) is None and interface.warning((16, 9)) is None
    assert interface.warning((18, 18)) is None  # outside, but not far
    assert "of 4 to 16 and aspects up to 2.5; 64x64 is far" in str(interface.warning((64, 64)))
    assert "aspects up to 2.5; 4x16 is far" in str(interface.warning((4, 16)))


def test_stages_and_parts_are_read_of_the_configuration(shipped: checkpoint.Checkpoint) -> None:
    section = {"latent": [[0.6, 4, 8], [1.0, 6, 16]], "aspect": 2.5}
    made = {"config": {"r2ir": {"latent": [2, 99]}, "r2id": section}, "parts": [4, 3, 3]}
    assert trained_range(made) == Trained(4, 16, 2.5)
    assert trained_range({}) is trained_range({"config": {"hdit": {}}}) is None
    model = {"model": {"default_size": [28, 28]}}
    assert trained_range({"config": model}) == Trained(28, 28, 1)
    small_first = {"s2id": {"size": [[0.9, 14, 14], [1.0, 28, 42]]}}
    assert trained_range({"config": model | small_first}) == Trained(14, 42, 1.5)
    assert label_parts({}) == label_parts({"parts": [10]}) == ()
    interface = interface_of(replace(shipped, provenance=shipped.provenance | made))
    assert interface.parts == (4, 3, 3) and [*interface.first_part] == [0, 1, 2, 3]


def test_labels_without_a_folder_keep_their_numbers(shipped: checkpoint.Checkpoint) -> None:
    some = replace(shipped, provenance={"labels": ["circle", "square"]})
    assert interface_of(some).labels == ("circle", "square", *"23456789")


def test_parts_that_do_not_add_up_are_refused(shipped: checkpoint.Checkpoint) -> None:
    found = interface_of(shipped)
    fields = {name: getattr(found, name) for name in Interface.__struct_fields__}
    with pytest.raises(ValueError, match="add up to the 10 labels"):
        Interface(**fields | {"parts": (10, 2)})
