"""When a run stops and at which rate it learns: steps, minutes, and the plan that ties them together."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

from vidtok.run.checkpoints import TrainState
from vidtok.run.schedule import Plan, is_plan_due, learning_rate, plan_horizon, typical_step_seconds
from vidtok.run_options import RunOptions

RUNNING, ALL_STEPS, TIME_IS_UP = 0, 1, 2
SIGNALLED = 128  # plus the number of the signal, which makes it the exit status of the command


class RunClock:
    """Measure one start of a run whose earlier starts are summed up in `state`."""

    def __init__(self, options: RunOptions, state: TrainState) -> None:
        self._options = options
        self._state = state
        self._before = state.elapsed_seconds
        self._started = self._step_started = time.monotonic()
        self._durations: deque[float] = deque(maxlen=50)

    @property
    def plan(self) -> Plan | None:
        """Give the plan of a run limited by minutes, once it is measured."""
        return Plan(**self._state.plan) if self._state.plan and self._options.max_minutes is not None else None

    @property
    def horizon(self) -> int | None:
        """Give the last step of the schedule; None while a run limited by minutes is still being measured."""
        plan, steps = self.plan, self._options.max_steps
        if plan is None:
            return steps if self._options.max_minutes is None else None
        # The schedule ends where the run does: steps that do not fit into the minutes would leave the rate high at the end.
        return plan.horizon if steps is None else min(plan.horizon, steps)

    @property
    def is_finished(self) -> bool:
        """Tell whether an earlier start has done all steps, or used up these minutes."""
        minutes = self._options.max_minutes
        return self._is_at_horizon() or (minutes is not None and minutes <= self._state.minutes_used_up)

    @property
    def elapsed_seconds(self) -> float:
        """Give the training time over all starts."""
        return self._before + time.monotonic() - self._started

    @property
    def step_seconds(self) -> float:
        """Give the mean duration of the last ten steps; evaluating and saving are not counted."""
        recent = list(self._durations)[-10:]
        return sum(recent) / max(1, len(recent))

    def start(self) -> None:
        """Begin to count; what came before, such as decoding videos, is not training time."""
        self._started = self._step_started = time.monotonic()

    def start_step(self) -> None:
        """Begin to time a step anew, after something that is no part of one; else it begins where the last one ended."""
        self._step_started = time.monotonic()

    def end_step(self) -> int:
        """Time the step; gives the reason to stop after it: RUNNING (0), ALL_STEPS or TIME_IS_UP."""
        now = time.monotonic()
        self._durations.append(now - self._step_started)
        self._step_started = now
        if self._is_at_horizon():
            return ALL_STEPS
        minutes, closing = self._options.max_minutes, self._state.evaluation_seconds + self._state.saving_seconds
        return TIME_IS_UP if minutes is not None and self.elapsed_seconds + closing >= minutes * 60 else RUNNING

    def is_plan_due(self) -> bool:
        """Tell whether the steps so far can be turned into a plan that is still missing."""
        minutes = self._options.max_minutes
        return self.horizon is None and minutes is not None and is_plan_due(len(self._durations), self.elapsed_seconds, minutes)

    def make_plan(self) -> None:
        """Fix the horizon from what steps, evaluating and saving took."""
        minutes, state = self._options.max_minutes, self._state
        assert minutes is not None
        state.elapsed_seconds = self.elapsed_seconds
        seconds = typical_step_seconds(list(self._durations))
        plan = Plan(0, state.step, minutes, seconds, state.evaluation_seconds, state.saving_seconds)
        state.plan = _with_horizon(plan, self._options, state)

    def learning_rate(self, step: int) -> float:
        """Give the rate of one optimizer step (the first is 1)."""
        options, plan = self._options, self.plan
        return learning_rate(
            step,
            lr=options.lr,
            warmup_steps=options.warmup_steps,
            min_lr_ratio=options.min_lr_ratio,
            horizon=self.horizon,
            planned_at=plan.planned_at if plan else 0,
        )

    def describe_rates(self) -> str:
        """Say, inside a sentence, what the first steps' rates are."""
        steps = [step for step in (1, 10, 100) if self.horizon is None or step <= self.horizon]
        return ", ".join(f"{self.learning_rate(step):.2e} at step {step}" for step in steps)

    def farewell(self, status: int, best_key: str) -> str:
        """Say why the run stops (`status` as above) and what the best evaluation was."""
        state, folder = self._state, self._options.run_dir
        if status > SIGNALLED:
            return f"Stopped after step {state.step}; saved in {folder}. The same command continues from there."
        minutes, plan = self._options.max_minutes, self.plan
        reason = f"the {minutes} minutes are used up" if status == TIME_IS_UP else "all steps are done"
        if status == ALL_STEPS and plan is not None and plan.horizon == state.step:
            reason = f"all steps that fit into {minutes} minutes are done"
        best = "" if state.best is None else f", best {best_key} {state.best:.4g} at step {state.best_step}"
        # An evaluation that was never finite saves none.
        model = f"the model is in {folder}/model" if (Path(folder) / "model").is_dir() else "no model was good enough to be saved"
        return f"Finished at step {state.step}: {reason}{best}; {model}."

    def _is_at_horizon(self) -> bool:
        ends = [steps for steps in (self.horizon, self._options.max_steps) if steps is not None]
        return bool(ends) and self._state.step >= min(ends)


def renew_plan(options: RunOptions, state: TrainState) -> bool:
    """Plan again, from the old measurements, when a run is continued with other max_minutes; tells whether it did."""
    plan = Plan(**state.plan) if state.plan else None
    if plan is None or options.max_minutes is None or plan.max_minutes == options.max_minutes:
        return False
    state.plan = _with_horizon(replace(plan, max_minutes=options.max_minutes), options, state)
    return True


def _with_horizon(plan: Plan, options: RunOptions, state: TrainState) -> dict[str, float]:
    horizon = plan_horizon(
        plan,
        step=state.step,
        elapsed_seconds=state.elapsed_seconds,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
    )
    return asdict(replace(plan, horizon=horizon))
