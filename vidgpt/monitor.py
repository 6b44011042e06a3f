"""Does a rollout move as the world does? A warning by name where it stands still or boils."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from vidgpt.metrics import Figures, RolloutMeter

STEADY, FROZEN, BOILING = "steady", "frozen", "boiling"
# A rollout is frozen where the share of tokens that change is so many times smaller than in reality: beside 20 %, below 5 %. It boils
# where the odds of a change are so many times larger; odds, because a share ends at 1: beside 5 %, above 17.4 %, beside 60 %, above 86 %.
FACTOR = 4.0
STANDARD_ERRORS = 2.0  # so much more than the factor must it be, or chance would warn of few tokens
RECOVERY = 3  # horizons in a row; one or two that are better may be chance
_MEANING = {FROZEN: "they change far less than real ones", BOILING: "they change far more than real ones"}


@dataclass(frozen=True)
class Changes:
    """How much moves in some horizons together."""

    real_fraction: float  # of tokens that change
    generated_fraction: float
    real_entropy_bits: float  # of the ids of a frame
    generated_entropy_bits: float

    @classmethod
    def of(cls, rows: Sequence[Figures]) -> Self:
        """Add up rows of RolloutMeter.by_frame."""
        tokens, real, generated = _counts(rows)
        bits = [sum(_number(row, f"frame_entropy_{name}_bits") for row in rows) / len(rows) for name in ("real", "generated")]
        return cls(real / tokens, generated / tokens, *bits)


@dataclass(frozen=True)
class Monitor:
    """What was seen of the changes in rollouts, horizon by horizon."""

    states: list[str]  # of each horizon, 1 first
    state: str  # of the second half of the horizons together, which is where rollouts go wrong
    odds_ratio: float  # there: odds that a predicted token changes, over those of a real one
    first_horizon: int | None  # where the last stretch in that state begins, see `watch`; None where it is steady
    last_horizon: int | None  # where it ends; None where it lasts to the end, or there is none
    second_half: Changes
    stretch: Changes | None  # in first_horizon to last_horizon

    def figures(self) -> dict[str, Any]:
        """Give what metrics.json says: state, odds, shares and entropies of the second half of the horizons, where `state` is judged.

        first_horizon_frames to last_horizon_frames (null: the last one) are the last stretch in that state, which may begin in the
        first half; where no horizon of the second half tells it by itself, they are that half. Both are null where it is steady.
        """
        return {
            "state": self.state,
            "first_horizon_frames": self.first_horizon,
            "last_horizon_frames": self.last_horizon,
            "change_odds_ratio": self.odds_ratio,
            "changed_tokens_real_fraction": self.second_half.real_fraction,
            "changed_tokens_generated_fraction": self.second_half.generated_fraction,
            "frame_entropy_real_bits": self.second_half.real_entropy_bits,
            "frame_entropy_generated_bits": self.second_half.generated_entropy_bits,
            "state_by_horizon": self.states,
            "factor_threshold": FACTOR,
            "standard_errors_threshold": STANDARD_ERRORS,
        }

    def warning(self) -> str | None:
        """Say what is wrong with the rollouts, in one sentence with the shares of the horizons that it names; None where nothing is."""
        if self.stretch is None:
            return None
        until = "on" if self.last_horizon is None else f"to {self.last_horizon}"
        is_one = self.first_horizon == self.last_horizon
        where = f"at horizon {self.first_horizon}" if is_one else f"from horizon {self.first_horizon} {until}"
        return (
            f"rollouts are {self.state} {where}: {_MEANING[self.state]}, {self.stretch.generated_fraction:.1%} of the tokens a frame "
            f"beside {self.stretch.real_fraction:.1%} (entropy of a frame's ids {self.stretch.generated_entropy_bits:.2f} bits beside "
            f"{self.stretch.real_entropy_bits:.2f})"
        )


def watch(meter: RolloutMeter) -> Monitor:
    """Judge rollouts by their second half, and name the horizons where they are so. Raises ValueError where none were measured.

    These are the last stretch of horizons in that state: it begins and ends in it, and lasts until RECOVERY horizons in a row are not.
    Where no horizon of the second half has by itself enough tokens to tell, that half is taken for one stretch.
    """
    rows = meter.by_frame()
    if not rows:
        raise ValueError("got no rollouts to watch: give at least one clip")
    states = [_state(*_counts([row])) for row in rows]
    half = rows[len(rows) // 2 :]
    tokens, real, generated = _counts(half)
    state = _state(tokens, real, generated)
    ratio = math.exp(_log_odds_ratio(generated, real, tokens)[0])
    if state == STEADY:
        return Monitor(states, state, ratio, None, None, Changes.of(half), None)
    first, last = _last_stretch(states, state)
    return Monitor(states, state, ratio, first, last, Changes.of(half), Changes.of(rows[first - 1 : last]))


def _last_stretch(states: Sequence[str], state: str) -> tuple[int, int | None]:
    """Give the first and the last horizon of the last stretch in a state, None for the last where it lasts to the end."""
    half, inside = len(states) // 2, [horizon for horizon, name in enumerate(states, 1) if name == state]
    is_told = bool(inside) and inside[-1] > half
    if not is_told:
        inside.append(half + 1)
    first = inside[-1]
    for horizon in reversed(inside):
        if first - horizon > RECOVERY:
            break
        first = horizon
    has_recovered = is_told and len(states) - inside[-1] >= RECOVERY
    return first, inside[-1] if has_recovered else None


def _counts(rows: Sequence[Figures]) -> tuple[float, float, float]:
    """Give tokens, and those of them that change in reality and in the rollouts."""
    tokens = [_number(row, "tokens_count") for row in rows]
    real, generated = (
        sum(_number(row, f"changed_tokens_{name}_fraction") * count for row, count in zip(rows, tokens, strict=True))
        for name in ("real", "generated")
    )
    return sum(tokens), real, generated


def _number(row: Figures, name: str) -> float:
    value = row[name]
    return math.nan if value is None else float(value)


def _state(tokens: float, real: float, generated: float) -> str:
    """Name the state of so many changed tokens, real and generated, each out of `tokens`."""
    ratios = {FROZEN: _log_ratio(real, generated, tokens), BOILING: _log_odds_ratio(generated, real, tokens)}
    for name, (ratio, error) in ratios.items():
        if ratio - STANDARD_ERRORS * error > math.log(FACTOR):
            return name
    return STEADY


def _log_ratio(more: float, less: float, tokens: float) -> tuple[float, float]:
    """Give the logarithm of the ratio of two shares, and its standard error, with half a token more in every cell."""
    ratio = math.log((more + 0.5) / (less + 0.5))
    return ratio, math.sqrt(max(0.0, 1 / (more + 0.5) + 1 / (less + 0.5) - 2 / (tokens + 1)))


def _log_odds_ratio(more: float, less: float, tokens: float) -> tuple[float, float]:
    """Give the logarithm of the ratio of two odds, and its standard error, with half a token more in every cell (Haldane, Anscombe)."""
    cells = [count + 0.5 for count in (more, tokens - more, less, tokens - less)]
    return math.log(cells[0] * cells[3] / (cells[1] * cells[2])), math.sqrt(sum(1 / cell for cell in cells))
