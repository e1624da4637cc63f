"""Whatever is done to a file or a request, the toolkit reads it or refuses it in its own words.

For every reader as many inputs as $FUZZ_INPUTS says, the same ones each time: no crash, no more
than so many seconds and bytes, no error but the toolkit's, of one line.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import TINY
from tests.fuzz.child import MEMORY, SECONDS, Child
from tests.fuzz.damage import damaged
from tests.fuzz.readers import READERS

INPUTS = int(os.environ.get("FUZZ_INPUTS", "300"))
# Which may be told where the machine's memory ends.
PROGRAMS = ("graphs", "graphs_on_openvino")
NEEDED = {"graphs_on_openvino": "openvino", "plans": "tensorrt_rtx"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as on Linux")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    own = Child()
    yield own
    own.close()


@pytest.mark.parametrize("name", READERS)
def test_damage_is_read_or_refused(name: str, child: Child) -> None:
    if not (TINY / "manifest.json").exists():
        pytest.skip("no build/tiny: run `make test`, or python -m tests.tiny build/tiny")
    if (library := NEEDED.get(name)) and not find_spec(library):
        pytest.skip(f"no {library}")
    samples = child.open(name)
    each = st.sampled_from(range(len(samples)))
    found: Counter[str] = Counter()

    @settings(
        max_examples=INPUTS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(each.flatmap(lambda index: st.tuples(st.just(index), damaged(samples[index]))))
    def check(case: tuple[int, bytes]) -> None:
        verdict = child.read(*case)
        assert not verdict.fault, verdict.fault
        assert verdict.seconds < SECONDS
        assert verdict.memory < MEMORY
        assert "\n" not in verdict.said
        assert name in PROGRAMS or verdict.refusal != "ResourceError", verdict.said
        found[verdict.refusal or "read"] += 1

    check()
    print(f"{name}: {sum(found.values())} inputs, {dict(found)}")
    assert found["ArtefactError"] + found["IncompatibleError"] > INPUTS // 20
