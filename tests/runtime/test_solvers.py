"""Schedules, solvers, guidance and the loop, against an ODE whose solution is known."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.interface import CosineData, KarrasData, ShiftedCosineData
from runtime.errors import NumericalError, UsageError
from runtime.sampling import choices, schedule, solvers
from runtime.sampling.guidance import Guidance, guidance, guide, guided
from runtime.sampling.loop import sample
from runtime.sampling.schedule import COSINE, Schedule
from runtime.sampling.solvers import Table

SOLVERS = st.sampled_from([*choices.SOLVERS])
SPACINGS = st.sampled_from([*choices.SPACINGS])
# x0 ~ N(MEAN, SPREAD²), for which eps is known, and x along the probability flow.
MEAN, SPREAD = 0.7, 0.4
KARRAS = KarrasData(0.01, 80)
SCHEDULES = st.sampled_from(
    [
        COSINE,
        schedule.read(KARRAS, (8, 8)),
        schedule.read(ShiftedCosineData(16, 32, -10, 10), (24, 64)),
    ]
)


def deviation(alpha_bar: Any) -> Any:
    """Standard deviation of x = sqrt(a) · x0 + sqrt(1 - a) · eps."""
    return np.sqrt(alpha_bar * SPREAD**2 + 1 - alpha_bar)


def gaussian(table: Table) -> Callable[[np.ndarray, int], np.ndarray]:
    """The exact eps of x at the nodes of a table."""

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        a = float(table.alpha_bar[step])
        return (x - math.sqrt(a) * MEAN) * math.sqrt(1 - a) / float(deviation(a)) ** 2

    return predict


def flow(x: np.ndarray, start: float, end: float) -> np.ndarray:
    """x of alpha_bar `end` on the probability flow through `x` at `start`."""
    unit = (x - math.sqrt(start) * MEAN) / deviation(start)
    moved: np.ndarray = math.sqrt(end) * MEAN + deviation(end) * unit
    return moved


@given(SCHEDULES, st.integers(1, 500), SOLVERS, st.none() | SPACINGS)
def test_nodes_rise_towards_the_image(
    own: Schedule, steps: int, solver: str, spacing: str | None
) -> None:
    table = solvers.table(solver, own, steps, spacing)
    assert table.alpha_bar.shape == (steps + 1,) and table.rows.shape == (steps, 7)
    assert (np.diff(table.alpha_bar) > 0).all()
    assert table.alpha_bar[0] >= COSINE.floor and table.alpha_bar[-1] > 0.999
    assert np.isfinite(table.rows).all()


@given(SCHEDULES, st.floats(1e-3, 1))
def test_a_schedule_finds_the_time_of_its_log_snr(own: Schedule, t: float) -> None:
    there = own.alpha_bar(np.array([t]))
    if there > COSINE.floor:
        assert own.time(schedule.log_snr(there)) == pytest.approx(t, abs=1e-9)


def test_karras_sigmas_are_those_of_the_paper() -> None:
    """Four from 80 to 0.01, by its equation 5."""
    own = schedule.read(KARRAS, (8, 8))
    sigma = np.sqrt(1 / own.alpha_bar(np.array([1, 2 / 3, 1 / 3, 0])) - 1)
    root = [80 ** (1 / 7) + i / 3 * (0.01 ** (1 / 7) - 80 ** (1 / 7)) for i in range(4)]
    assert sigma == pytest.approx([r**7 for r in root])
    assert solvers.spacing_of("ddim", own) == solvers.spacing_of("dpm++3m", own) == "karras"


def test_a_shifted_schedule_gives_larger_pictures_more_noise() -> None:
    """By ln 4 where a side is twice as long; a run begins as much deeper in the noise."""
    data = ShiftedCosineData(32, 32, -10, 10)
    small, large = (schedule.read(data, (side, side)) for side in (32, 64))
    t = np.linspace(0.05, 0.95, 7)
    moved = schedule.log_snr(small.alpha_bar(t)) - schedule.log_snr(large.alpha_bar(t))
    assert moved == pytest.approx(math.log(4))
    starts = [solvers.ends(own, 8)[0] for own in (small, large)]
    assert starts[0] - starts[1] == pytest.approx(math.log(4))
    wide = schedule.read(ShiftedCosineData(32, 512, -10, 10), (256, 1024))
    found = schedule.log_snr(wide.alpha_bar(np.array([0.25, 0.5, 0.75])))
    assert found == pytest.approx([0.3575, -2.7726, -5.9026], abs=1e-4)


def test_a_schedule_is_what_a_manifest_says() -> None:
    own = schedule.read(CosineData(0.01, 1e-5), (4, 6))
    assert own == schedule.Cosine(0.01, 1e-5)
    assert msgspec.to_builtins(own) == {"name": "cosine", "offset": 0.01, "floor": 1e-5}


@given(
    st.integers(1, 60),
    SOLVERS,
    SPACINGS,
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_a_perfect_denoiser_recovers_x0(
    steps: int, solver: str, spacing: str, eta: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x0, start = rng.uniform(-1, 1, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    table = solvers.table(solver, COSINE, steps, spacing, eta)

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        a = table.alpha_bar[step]
        return np.asarray((x - math.sqrt(a) * x0) / math.sqrt(1 - a))

    found = sample(predict, start, table, lambda step: rng.standard_normal(x0.shape))
    # DDIM's last node is alpha_bar(0) < 1: x keeps that little noise.
    left = math.sqrt(1 - table.alpha_bar[-1])
    assert left < 0.013 and np.abs(found - x0).max() < max(8 * left, 1e-4)


@pytest.mark.parametrize(("order", "expected"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(order: int, expected: int) -> None:
    errors = []
    start = np.array([-1.3, 0.2, 2.0])
    for steps in (40, 80, 160):
        nodes = solvers.expit(np.linspace(-7, 2, steps + 1))
        table = Table(nodes, np.array(solvers.rows(nodes, order, eta=0.0)))
        found = sample(gaussian(table), start, table)
        errors.append(np.abs(found - flow(start, nodes[0], nodes[-1])).max())
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(measured, expected, atol=0.2)


def test_order_one_is_ddim_without_its_guards() -> None:
    nodes = solvers.expit(np.linspace(-6, 6, 9))
    for eta in (0.0, 1.0):  # between them the two say different things by eta
        rows = np.array(solvers.rows(nodes, 1, eta))
        np.testing.assert_allclose(rows, solvers.rows(nodes, 0, eta), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "dpm++3m"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_leaves_the_distribution_as_it_is(solver: str, eta: float) -> None:
    """x0 has its mean and variance however much of the noise is new."""
    rng = np.random.default_rng(0)
    steps = 400 if solver == "ddim" else 100  # of order 1
    table = solvers.table(solver, COSINE, steps, "logsnr", eta)
    start = rng.standard_normal(200_000)
    x0 = sample(gaussian(table), start, table, lambda step: rng.standard_normal(start.shape))
    assert x0.mean() == pytest.approx(MEAN, abs=0.01)
    assert x0.std() == pytest.approx(SPREAD, rel=0.03)
    assert np.corrcoef(x0, start)[0, 1] < 0.9


def test_eta_adds_noise_only_when_asked() -> None:
    assert solvers.sigma(0.2, 0.5, 0.0) == 0
    assert solvers.sigma(0.2, 0.5, 2.0) == pytest.approx(2 * solvers.sigma(0.2, 0.5, 1.0))
    expected = math.sqrt((1 - 0.5) / (1 - 0.2) * (1 - 0.2 / 0.5))
    assert solvers.sigma(0.2, 0.5, 1.0) == pytest.approx(expected, rel=1e-5)
    for solver in choices.SOLVERS:
        assert not solvers.table(solver, COSINE, 5).rows[:, 6].any()


def test_a_part_begins_without_history() -> None:
    """Two parts are the whole: x0 of before `restart` counts in no row from there on."""
    start = np.array([-1.3, 0.2, 2.0])
    table = solvers.table("dpm++3m", COSINE, 9, restart=4)
    whole = sample(gaussian(table), start, table)
    half = sample(gaussian(table), start, table, last=4)
    np.testing.assert_array_equal(sample(gaussian(table), half, table, first=4), whole)
    history = table.rows[:, 4:6] != 0
    assert history[[0, 4]].sum() == 0 and history[[1, 5], 1].sum() == 0
    assert history[[2, 3, 6, 7]].all()


def test_numpy_and_torch_draw_alike() -> None:
    torch = pytest.importorskip("torch", reason="no torch here")
    table = solvers.table("dpm++3m", COSINE, 9, eta=0.5)
    start = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)

    def own(step: int) -> np.ndarray:
        return np.full_like(start, step / 9)

    found = sample(
        gaussian(table), torch.from_numpy(start), table, lambda step: torch.from_numpy(own(step))
    )
    wanted = sample(gaussian(table), start, table, own)
    assert wanted.dtype == np.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_guidance_weighs_branches() -> None:
    eps = np.array([[1.0], [3.0]])
    assert guide(eps, (1 - 4, 4)) == pytest.approx(1 + 4 * (3 - 1))
    assert guided(lambda x, step: eps * step, (0, 1))(None, 2) == pytest.approx(6)
    with pytest.raises(UsageError, match="3 weights for 2 branches"):
        guide(eps, (1, 2, 3))


def test_outside_the_interval_the_condition_is_alone() -> None:
    times = np.array([0.9, 0.6, 0.3, 0.1])
    made = guidance([{(3,): 1.0}, {}, {(1,): 0.5, (2,): 0.5}], 10, 3.0, times, (0.2, 0.6))
    assert made.conditions.shape == (3, 3, 10)
    # The image without a condition is the null branch's at any time.
    assert [made.branches(step) for step in range(4)] == [(0, 1, 2)] * 4
    assert [w.ravel().tolist() for w in made.at(0)] == [[0, 1, 0], [1, 0, 0.5], [0, 0, 0.5]]
    assert [w.ravel().tolist() for w in made.at(2)] == [[-2, 1, -2], [3, 0, 1.5], [0, 0, 1.5]]
    made = guidance([{(3,): 1.0}, {(4,): 1.0}], 10, 3.0, times, (0.2, 0.6))
    assert [len(made.at(step)) for step in range(4)] == [1, 2, 2, 1]
    assert isinstance(made, Guidance) and made.branches(3) == (1,)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's own word on infinity
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_stops_the_loop_and_names_the_step(bad: float) -> None:
    def predict(x: np.ndarray, step: int) -> np.ndarray:
        return np.full_like(x, bad) if step == 3 else np.zeros_like(x)

    with pytest.raises(NumericalError, match="step 4 of 9"):
        sample(predict, np.ones((1, 2)), solvers.table("ddim", COSINE, 9))


@given(SCHEDULES, st.integers(1, 60), SOLVERS, st.none() | SPACINGS, st.floats(1e-3, 0.999))
def test_a_run_begins_at_the_noise_of_its_strength(
    own: Schedule, steps: int, solver: str, spacing: str | None, strength: float
) -> None:
    """Or where the whole run begins, if that is less; with the evaluations that are left there."""
    whole = solvers.table(solver, own, steps, spacing)
    table = solvers.table(solver, own, steps, spacing, strength=strength)
    there = float(own.alpha_bar(np.array(strength)))
    assert table.alpha_bar[0] == pytest.approx(max(there, whole.alpha_bar[0]), rel=1e-9)
    left = int((whole.alpha_bar[:-1] >= there).sum())
    assert 1 <= len(table) <= steps and abs(len(table) - left) <= 1
    assert (np.diff(table.alpha_bar) > 0).all() and table.alpha_bar[-1] == whole.alpha_bar[-1]
    assert not table.rows[0, 4:6].any()  # of order 1: there is no x0 before it
    assert table.rows.shape == (len(table), 7) and np.isfinite(table.rows).all()


@pytest.mark.parametrize("solver", [*choices.SOLVERS])
def test_strength_has_ends(solver: str) -> None:
    whole = solvers.table(solver, COSINE, 12, eta=0.3)
    same = solvers.table(solver, COSINE, 12, eta=0.3, strength=1)
    np.testing.assert_array_equal(same.rows, whole.rows)
    none = solvers.table(solver, COSINE, 12, strength=0)
    assert len(none) == 0 and none.alpha_bar.tolist() == [whole.alpha_bar[-1]]
    assert not none.has_history
    lengths = [len(solvers.table(solver, COSINE, 12, strength=s)) for s in (0.1, 0.3, 0.6, 0.9)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] < 12


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_solvers_follow_the_flow_from_a_noised_picture(strength: float) -> None:
    """From x at the noise of a strength, more evaluations and higher orders come nearer to it."""
    start = np.linspace(-1.5, 2.5, 9)

    def error(solver: str, steps: int) -> float:
        table = solvers.table(solver, COSINE, steps, strength=strength)
        x = sample(gaussian(table), start, table)
        return float(np.abs(x - flow(start, float(table.alpha_bar[0]), 1.0)).max())

    for solver in ("ddim", "dpm++2m", "dpm++3m"):
        assert error(solver, 60) < error(solver, 12) < 0.2
    assert error("dpm++3m", 24) < error("ddim", 24) / 2
