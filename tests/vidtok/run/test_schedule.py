"""The learning rate and the plan against arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from vidtok.run.schedule import Plan, is_plan_due, learning_rate, plan_horizon, typical_step_seconds

PLAN = Plan(horizon=0, planned_at=25, max_minutes=10.0, step_seconds=0.5, evaluation_seconds=20.0, saving_seconds=4.0)


def rate(step: int, horizon: int | None = 1000, warmup_steps: int = 100, planned_at: int = 0) -> float:
    return learning_rate(step, lr=2.0, warmup_steps=warmup_steps, min_lr_ratio=0.1, horizon=horizon, planned_at=planned_at)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.02), (50, 1.0), (100, 2.0), (550, 1.1), (1000, 0.2), (5000, 0.2)])
def test_the_rate_climbs_in_a_line_and_falls_on_a_cosine(step: int, expected: float) -> None:
    assert rate(step) == pytest.approx(expected)


def test_the_rate_between_follows_the_cosine() -> None:
    assert rate(300) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 200 / 900))))


def test_without_warm_up_the_run_begins_at_the_top() -> None:
    assert rate(1, warmup_steps=0) == pytest.approx(2.0, rel=1e-4)


def test_a_short_run_still_reaches_the_full_rate() -> None:
    rates = [rate(step, horizon=20) for step in range(1, 21)]
    assert max(rates) == rates[3] == 2.0
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("horizon", [30, 200, 100_000])
@pytest.mark.parametrize("warmup_steps", [0, 10, 25, 500])
def test_a_measured_run_learns_as_if_the_plan_had_always_been_there(horizon: int, warmup_steps: int) -> None:
    for step in range(1, 26):
        assert rate(step, None, warmup_steps) == rate(step, horizon, warmup_steps, planned_at=25)


@pytest.mark.parametrize("warmup_steps", [10, 25, 40, 500])
def test_a_measured_run_climbs_without_a_jump_and_comes_down(warmup_steps: int) -> None:
    rates = [rate(step, 200, warmup_steps, planned_at=25) for step in range(1, 201)]
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert max(abs(after - before) for before, after in pairwise(rates)) < 0.21


@pytest.mark.parametrize("planned_at", [0, 25])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 25, 40, 100, 500])
def test_for_every_horizon_the_rate_climbs_once_without_a_jump_and_falls_to_the_end(planned_at: int, warmup_steps: int) -> None:
    for horizon in [*range(planned_at + 2, 300), 1000, 5000]:
        rates = [rate(step, horizon, warmup_steps, planned_at) for step in range(1, horizon + 1)]
        top = rates.index(max(rates))
        assert all(before <= after for before, after in pairwise(rates[: top + 1]))
        assert all(before >= after for before, after in pairwise(rates[top:]))
        climb = 2.0 / max(1, min(warmup_steps, max(1, horizon // 5)))
        assert max((after - before for before, after in pairwise(rates)), default=0) <= climb + 1e-9
        assert rates[-1] <= 0.2 + 1e-9


def test_the_plan_fills_the_minutes() -> None:
    horizon = plan_horizon(PLAN, step=25, elapsed_seconds=40.0, evaluate_every=100, checkpoint_every=200)
    steps = horizon - 25
    spent = 40 + steps * 0.5 + steps / 100 * 20 + steps / 200 * 4 + 20 + 4
    assert 0.95 * 600 < spent <= 600


def test_a_plan_without_time_left_ends_at_once() -> None:
    assert plan_horizon(PLAN, step=25, elapsed_seconds=599.0, evaluate_every=100, checkpoint_every=200) == 25


def test_more_minutes_mean_more_steps() -> None:
    longer = replace(PLAN, max_minutes=20.0)
    state = {"step": 25, "elapsed_seconds": 40.0, "evaluate_every": 100, "checkpoint_every": 200}
    horizons = [plan_horizon(plan, **state) for plan in (PLAN, longer)]
    assert horizons[0] < horizons[1] < 2.5 * horizons[0]


@pytest.mark.parametrize(
    ("measured", "elapsed", "is_due"),
    [(24, 10.0, False), (25, 10.0, True), (3, 119.0, False), (3, 120.0, True), (2, 500.0, False)],
)
def test_the_plan_is_due_after_25_steps_or_a_fifth_of_the_time(measured: int, elapsed: float, is_due: bool) -> None:
    assert is_plan_due(measured, elapsed, max_minutes=10.0) is is_due


def test_slow_first_steps_do_not_count() -> None:
    assert typical_step_seconds([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0]) == 2.0
    assert typical_step_seconds([9.0, 1.5]) == 1.5
