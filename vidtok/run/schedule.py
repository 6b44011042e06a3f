"""The learning rate as a pure function of the optimizer step, and the plan that turns minutes into steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

PLANNING_STEPS = 25
WARM_STEPS = 4
PLANNING_SHARE = 0.2
SAFETY_SHARE = 0.97


@dataclass(frozen=True)
class Plan:
    """Hold the horizon of a run that is limited by minutes, and the measurements (seconds) it came from."""

    horizon: int
    planned_at: int
    max_minutes: float
    step_seconds: float
    evaluation_seconds: float
    saving_seconds: float


def learning_rate(
    step: int, *, lr: float, warmup_steps: int, min_lr_ratio: float, horizon: int | None, planned_at: int = 0
) -> float:
    """Give the rate of optimizer step `step` (the first is 1): linear warm-up, then half a cosine down to lr * min_lr_ratio.

    horizon: the last step; None while the plan is still being measured, and up to planned_at the rate does not depend on it.
    The warm-up is cut to a fifth of a short run, which would otherwise never reach lr. Where a plan leaves too few steps for that
    too, the rate turns below lr, where the climb meets the cosine.
    """
    ramp = min(1.0, step / max(1, warmup_steps))
    if horizon is None or step <= planned_at:
        return lr * ramp
    reached, climb = min(1.0, planned_at / max(1, warmup_steps)), min(warmup_steps, max(1, horizon // 5))
    ramp = min(1.0, reached + (step - planned_at) / max(1, climb))
    peak_at = min(planned_at + round((1 - reached) * climb), max(1, (planned_at + horizon) // 2))
    progress = min(1.0, max(0, step - peak_at) / max(1, horizon - peak_at))
    return lr * min(ramp, min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def is_plan_due(num_measured: int, elapsed_seconds: float, max_minutes: float) -> bool:
    """Tell whether enough steps were timed: 25, or fewer where 25 would eat more than a fifth of the time."""
    return num_measured >= PLANNING_STEPS or (num_measured >= 3 and elapsed_seconds >= PLANNING_SHARE * max_minutes * 60)


def typical_step_seconds(durations: Sequence[float]) -> float:
    """Give the median duration without the first steps, which pay for warm caches and lazy initialisation."""
    return median(durations[WARM_STEPS:] or durations[-1:])


def plan_horizon(plan: Plan, *, step: int, elapsed_seconds: float, evaluate_every: int, checkpoint_every: int) -> int:
    """Give the last step that fits into the plan's minutes, when `step` steps took elapsed_seconds; never less than `step`.

    Every later step carries its share of evaluating and saving; the last evaluation and saving are set aside first.
    """
    left = SAFETY_SHARE * (plan.max_minutes * 60 - elapsed_seconds) - plan.evaluation_seconds - plan.saving_seconds
    cost = plan.step_seconds + plan.evaluation_seconds / evaluate_every + plan.saving_seconds / checkpoint_every
    return step + max(0, math.floor(left / max(cost, 1e-9)))
