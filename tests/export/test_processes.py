"""Work shared by processes: every result with its item, and no process left behind."""

import math
import multiprocessing
import os
import time

import pytest

from export.processes import PROCESSES, in_processes
from runtime.errors import ResourceError


def test_each_item_comes_with_its_result() -> None:
    busy: list[list[float]] = []
    found = dict(in_processes(math.sqrt, [4.0, 9.0, 0.0], lambda items: busy.append([*items])))
    assert found == {4.0: 2.0, 9.0: 3.0, 0.0: 0.0}
    count = min(PROCESSES, os.cpu_count() or 1)
    assert busy[0] == [4.0, 9.0, 0.0][:count] and busy[-1] == []
    assert [len(items) for items in busy] == [min(count, left) for left in (3, 2, 1, 0)]


def test_a_process_that_is_ended_from_outside_is_an_error_of_ours() -> None:
    with pytest.raises(ResourceError, match="ended from outside"):
        list(in_processes(os._exit, [9, 9]))
    assert not multiprocessing.active_children()


def test_an_error_in_one_process_is_raised_and_ends_the_other(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without a word of the pool, though more waits than it has begun."""
    with pytest.raises(ValueError, match="non-negative"):
        list(in_processes(time.sleep, [600, -1, *[600] * 9]))
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""
