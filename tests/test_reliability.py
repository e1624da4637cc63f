"""docs/reliability.md names tests that there are, for every fault of its list."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
FAULTS = 19


def test_every_fault_has_tests_that_exist() -> None:
    text = (TESTS.parent / "docs" / "reliability.md").read_text().partition("## Faults")[2]
    rows = re.findall(r"^\| (\d+) \| (.*)$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, FAULTS + 1)]
    for _, row in rows:
        named = re.findall(r"`(\S+\.py)::(\w+)`", row)
        assert named
        for file, test in named:
            assert f"\ndef {test}(" in (TESTS / file).read_text(), (file, test)
