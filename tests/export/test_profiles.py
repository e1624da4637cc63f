"""Profiles: no legal size is left out, and the runtime takes the cheapest."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.profiles import Ranges, SizeRange, _splits, expected_slowdown, plan_profiles
from runtime.bundle.manifest import read_manifest
from runtime.bundle.profiles import Cost, Profile, choose, covers, tokens
from runtime.errors import UsageError
from tests.conftest import TINY

SPANS = st.tuples(st.integers(1, 80), st.integers(0, 120)).map(lambda s: (s[0], s[0] + s[1]))
BATCHES = st.tuples(st.integers(1, 4), st.integers(0, 8)).map(lambda s: (s[0], s[0] + s[1]))
ASPECTS = st.none() | st.sampled_from([Fraction(1), Fraction(16, 9), Fraction(3)])
COSTS = st.builds(Cost, st.floats(0, 1e5), st.floats(0, 2), st.floats(0, 2))


@st.composite
def size_ranges(draw: st.DrawFn) -> SizeRange:
    """Any range that holds a size, often not square."""
    height, aspect = draw(SPANS), draw(ASPECTS)
    width = draw(SPANS)
    if aspect is not None and height[0] * aspect < width[0]:
        width = (height[0], width[1])
    elif aspect is not None and width[1] * aspect < height[0]:
        width = (width[0], height[0])
    return SizeRange(height, width, aspect)


def legal(sizes: SizeRange) -> list[tuple[int, int]]:
    """Every legal size, by the definition."""
    return [
        (height, width)
        for height in range(sizes.height[0], sizes.height[1] + 1)
        for width in range(sizes.width[0], sizes.width[1] + 1)
        if sizes.aspect is None or max(height, width) <= sizes.aspect * min(height, width)
    ]


def optimum(profile: Profile) -> tuple[int, int]:
    return profile["height"][1], profile["width"][1]


@settings(max_examples=20, deadline=None)
@given(size_ranges(), BATCHES, st.integers(1, 5), COSTS)
def test_every_legal_size_has_a_profile(
    sizes: SizeRange, batch: tuple[int, int], count: int, cost: Cost
) -> None:
    profiles = plan_profiles(sizes, batch, count, cost)
    assert 1 <= len(profiles) <= count
    every = legal(sizes)
    for height, width in every:
        for number in batch:
            request = {"batch": number, "height": height, "width": width}
            assert any(covers(profile, request) for profile in profiles)
    for axis, values in (("height", {h for h, _ in every}), ("width", {w for _, w in every})):
        assert min(profile[axis][0] for profile in profiles) == min(values)
        assert max(profile[axis][2] for profile in profiles) == max(values)


@settings(max_examples=20, deadline=None)
@given(size_ranges(), BATCHES, st.integers(2, 5), COSTS)
def test_optima_are_legal_inside_and_ordered(
    sizes: SizeRange, batch: tuple[int, int], count: int, cost: Cost
) -> None:
    profiles = plan_profiles(sizes, batch, count, cost)
    for profile in profiles:
        assert all(low <= best <= high for low, best, high in profile.values())
        assert optimum(profile) in set(legal(sizes))
    counts = [height * width for height, width in map(optimum, profiles)]
    assert counts == sorted(set(counts))


@settings(max_examples=12, deadline=None)
@given(size_ranges(), BATCHES, COSTS)
def test_more_profiles_are_never_worse(
    sizes: SizeRange, batch: tuple[int, int], cost: Cost
) -> None:
    slow = [
        expected_slowdown(sizes, batch, plan_profiles(sizes, batch, count, cost), cost)
        for count in (1, 2, 3, 5)
    ]
    assert slow == sorted(slow, reverse=True) and slow[-1] >= 1


def test_profiles_help_and_the_split_is_the_best_of_all() -> None:
    """Against every split of a small range: the dynamic programme finds the cheapest."""
    sizes, cost = SizeRange((4, 9), (4, 9)), Cost(20, 0.5, 0.5)
    path = sizes.path
    counts, samples = [h * w for h, w in path], sizes.samples.prod(1).tolist()

    def price(first: int, end: int) -> float:
        top = counts[end] if end < len(path) else 1 << 30
        own = [n for n in samples if counts[first] <= n < top]
        return min(sum(cost.slowdown(n, counts[o]) for n in own) for o in range(first, end))

    ends = len(path)
    found = _splits(sizes, (1, 1), 3, cost)
    best = min(
        price(0, a) + price(a, b) + price(b, ends)
        for a in range(1, ends - 1)
        for b in range(a + 1, ends)
    )
    assert sum(price(first, end) for first, _, end in found[2]) == pytest.approx(best)
    one, three = (
        expected_slowdown(sizes, (1, 1), plan_profiles(sizes, (1, 1), n, cost), cost)
        for n in (1, 3)
    )
    assert three < one


def test_a_single_size_needs_one_profile() -> None:
    only = plan_profiles(SizeRange((8, 8), (5, 5)), (1, 1), 4)
    assert only == [{"batch": (1, 1, 1), "height": (8, 8, 8), "width": (5, 5, 5)}]


def test_an_aspect_without_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sides within 2:1; expected a wider --aspect"):
        plan_profiles(SizeRange((4, 8), (100, 200), Fraction(2)), (1, 1), 2)


def test_a_request_takes_the_profile_whose_optimum_is_cheapest() -> None:
    small = {"height": (1, 4, 64), "width": (1, 4, 64)}
    large = {"height": (1, 40, 64), "width": (1, 40, 64)}
    assert choose("p", [small, large], {"height": 5, "width": 5}) == 0
    assert choose("p", [small, large], {"height": 50, "width": 50}) == 1
    assert choose("p", [large, small], {"height": 5, "width": 5}) == 1
    # A range that does not cover the request is not taken, however near its optimum.
    tight = {"height": (5, 5, 5), "width": (5, 5, 5)}
    assert choose("p", [tight, large], {"height": 5, "width": 6}) == 1


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_size_outside_is_refused_with_the_nearest(height: int, width: int) -> None:
    profiles: list[Profile] = [
        {"height": (4, 8, 16), "width": (4, 8, 16)},
        {"height": (16, 32, 64), "width": (4, 8, 16)},
    ]
    asked = {"height": height, "width": width}
    if any(covers(profile, asked) for profile in profiles):
        assert covers(profiles[choose("p", profiles, asked)], asked)
        return
    with pytest.raises(UsageError) as refused:
        choose("p", profiles, asked)
    low, high = min(max(height, 4), 64), min(max(width, 4), 16)
    assert f"nearest legal size is height {low}, width {high}" in str(refused.value)
    assert "height 4..8..16, width 4..8..16; height 16..32..64" in str(refused.value)


def test_cost_is_affine_and_one_at_the_optimum() -> None:
    cost = Cost(100, 0.5, 0.25)
    assert cost.time(50, 50) == 150 and cost.slowdown(50, 50) == 1
    assert cost.time(40, 50) == 100 + 40 + 5 and cost.time(70, 50) == 100 + 70 + 5
    assert tokens({"batch": 2, "height": 3, "width": 5}) == 30


@pytest.mark.skipif(not TINY.exists(), reason="no build/tiny: run `make test`")
def test_every_graph_has_its_own_axes() -> None:
    manifest = read_manifest(TINY)
    ranges = Ranges(
        latent=SizeRange((4, 16), (4, 16)),
        image=SizeRange((16, 64), (16, 64)),
        batch=(1, 8),
        conditions=(1, 4),
        steps=(1, 50),
        profiles=2,
        cost=Cost(),
    )
    found = {name: ranges.of_graph(spec, 10) for name, spec in manifest.graphs.items()}
    for name, spec in manifest.graphs.items():
        assert all(profile.keys() == spec.ranges.keys() for profile in found[name])
    assert found["r2id_condition"] == [{"conditions": (1, 2, 11)}]
    assert found["r2id_film"] == [{"steps": (2, 51, 51)}]
    assert found["r2id"][-1]["height"][2] == 16 and found["r2ir_decode"][-1]["height"][2] == 64
    wide = Ranges(ranges.latent, ranges.image, (1, 5000), (1, 4), (1, 50), 2, Cost())
    with pytest.raises(UsageError, match=r"r2id\.onnx: batch 1\.\.5000 .* takes 1 to 4096"):
        wide.of_graph(manifest.graphs["r2id"], 10)
