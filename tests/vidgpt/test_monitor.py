"""Frozen and boiling rollouts are called so, others are not."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgpt.metrics import RolloutMeter, TokenMeter
from vidgpt.monitor import BOILING, FROZEN, STEADY, Monitor, watch
from vidgpt.token_report import TokenReport

GRID = (6, 6)


def walk(shares: list[float], seed: int, clips: int = 8) -> Tensor:
    """Make frames (B, 1 + t, h, w) of which a share of tokens changes from each to the next, always to another id."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randint(50, (clips, *GRID), generator=torch.Generator().manual_seed(0))]
    for share in shares:
        moves = torch.rand(clips, *GRID, generator=generator) < share
        frames.append((frames[-1] + moves * torch.randint(1, 50, (clips, *GRID), generator=generator)) % 50)
    return torch.stack(frames, dim=1)


def meter_of(generated: list[float], real: list[float], clips: int = 8) -> RolloutMeter:
    meter, truth = RolloutMeter(GRID), walk(real, 1, clips)
    meter.update(walk(generated, 2, clips)[:, 1:], truth[:, 1:], truth[:, 0])
    return meter


def watched(generated: list[float], real: list[float], clips: int = 8) -> Monitor:
    return watch(meter_of(generated, real, clips))


def test_a_rollout_that_stands_still_is_frozen_from_the_horizon_on_where_it_stops() -> None:
    seen = watched([0.2, 0.2, 0, 0, 0, 0, 0, 0], [0.2] * 8)
    assert (seen.state, seen.first_horizon) == (FROZEN, 3)
    assert seen.states == [STEADY] * 2 + [FROZEN] * 6
    assert "frozen from horizon 3 on: they change far less than real ones, 0.0% of" in str(seen.warning())


# A frozen share among a real one of a fifth, a boiling one among a real one of a fiftieth.
@pytest.mark.parametrize(
    ("generated", "real", "seen"),
    [
        # One or two horizons that move again end nothing, wherever they are.
        ([0.2, 0.2, 0, 0, 0.1, 0, 0, 0], 0.2, (FROZEN, 3, None)),
        ([0.2, 0.2, 0, 0.1, 0.1, 0, 0, 0], 0.2, (FROZEN, 3, None)),
        ([0.02] * 4 + [0.9] * 3 + [0.02], 0.02, (BOILING, 5, None)),
        ([0.02] * 4 + [0.9] * 2 + [0.02] * 2, 0.02, (BOILING, 5, None)),
        # Three do: what was wrong before them and went away is not where this began.
        ([0, 0, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0], 0.2, (FROZEN, 6, None)),
        ([0.02] * 5 + [0.9] * 2 + [0.02] * 3, 0.02, (BOILING, 6, 7)),
        ([0.02, 0.9, 0.02, 0.02, 0.02, 0.9, 0.02, 0.02, 0.02, 0.02], 0.02, (BOILING, 6, 6)),
    ],
)
def test_the_horizons_named_are_the_last_stretch_and_three_better_ones_end_a_stretch(
    generated: list[float], real: float, seen: tuple[str, int, int | None]
) -> None:
    monitor = watched(generated, [real] * len(generated), clips=30)
    assert (monitor.state, monitor.first_horizon, monitor.last_horizon) == seen
    until = "on" if seen[2] is None else f"to {seen[2]}"
    where = "at horizon 6" if seen[1:] == (6, 6) else f"from horizon {seen[1]} {until}"
    assert f"are {seen[0]} {where}: " in str(monitor.warning())
    # The shares beside these horizons are theirs.
    rows = meter_of(generated, [real] * len(generated), clips=30).by_frame()[seen[1] - 1 : seen[2]]
    shares = [np.mean([row[f"changed_tokens_{name}_fraction"] for row in rows]) for name in ("generated", "real")]
    assert f"{shares[0]:.1%} of the tokens a frame beside {shares[1]:.1%} (" in str(monitor.warning())
    bits = [np.mean([row[f"frame_entropy_{name}_bits"] for row in rows]) for name in ("generated", "real")]
    assert f"ids {bits[0]:.2f} bits beside {bits[1]:.2f})" in str(monitor.warning())
    assert monitor.states[seen[1] - 1] == seen[0]


def test_where_only_all_horizons_together_tell_the_second_half_is_named() -> None:
    meter = RolloutMeter((1, 4))
    real = (torch.arange(33) % 2).view(1, -1, 1, 1).expand(1, -1, 1, 4)
    meter.update(real[:, :1].expand(-1, 32, -1, -1), real[:, 1:], real[:, 0])
    seen = watch(meter)
    assert set(seen.states) == {STEADY} and (seen.state, seen.first_horizon, seen.last_horizon) == (FROZEN, 17, None)


def test_a_rollout_of_noise_boils_and_its_frames_have_more_entropy_than_calm_ones() -> None:
    truth = torch.zeros(8, 7, *GRID, dtype=torch.long)
    truth[:, 1::2, :1] = 3
    meter = RolloutMeter(GRID)
    meter.update(torch.randint(50, (8, 6, *GRID), generator=torch.Generator().manual_seed(0)), truth[:, 1:], truth[:, 0])
    seen = watch(meter)
    assert (seen.state, seen.first_horizon) == (BOILING, 1)
    assert seen.second_half.generated_entropy_bits > 4 > 1 > seen.second_half.real_entropy_bits
    assert "boiling from horizon 1 on" in str(seen.warning())


@pytest.mark.parametrize(("generated", "state"), [(0.02, FROZEN), (0.07, STEADY), (0.2, STEADY), (0.45, STEADY), (0.55, BOILING)])
def test_beside_a_fifth_below_a_twentieth_is_frozen_and_above_a_half_boils(generated: float, state: str) -> None:
    seen = watched([generated] * 6, [0.2] * 6, clips=60)
    assert seen.state == state
    assert (seen.warning() is None) == (state == STEADY)
    odds = [share / (1 - share) for share in (seen.second_half.generated_fraction, seen.second_half.real_fraction)]
    assert seen.odds_ratio == pytest.approx(odds[0] / odds[1], rel=0.02)


@pytest.mark.parametrize(("generated", "state"), [(0.1, FROZEN), (0.3, STEADY), (0.95, STEADY), (0.99, BOILING)])
def test_where_nearly_everything_changes_only_a_share_near_one_boils(generated: float, state: str) -> None:
    assert watched([generated] * 6, [0.9] * 6, clips=60).state == state


def test_few_tokens_warn_of_nothing_that_chance_may_do() -> None:
    meter = RolloutMeter((1, 2))
    real = torch.tensor([[0, 0], [1, 0], [1, 0]]).view(1, 3, 1, 2)
    meter.update(real[:, :1].expand(-1, 2, -1, -1), real[:, 1:], real[:, 0])
    assert watch(meter).state == STEADY


def test_a_start_that_goes_wrong_and_recovers_is_no_warning_but_shows_by_horizon() -> None:
    seen = watched([0, 0, 0.2, 0.2, 0.2, 0.2], [0.2] * 6)
    assert (seen.state, seen.states[:2]) == (STEADY, [FROZEN] * 2)


def test_the_warning_reaches_metrics_table_and_reader() -> None:
    forced = TokenMeter(GRID)
    report = TokenReport(8, 1, {"model": forced, "copy_last_frame_smoothed": forced}, {"model": meter_of([0] * 6, [0.3] * 6)})
    monitor = report.metrics()["free_running"]["monitor"]
    assert (monitor["state"], monitor["first_horizon_frames"], monitor["factor_threshold"]) == (FROZEN, 1, 4.0)
    assert [row["motion_state"] for row in report.by_frame()] == [FROZEN] * 6
    assert "frozen" in str(report.monitor and report.monitor.warning())
    with pytest.raises(ValueError, match="no rollouts to watch"):
        watch(RolloutMeter(GRID))


def test_the_figures_beside_the_state_are_of_the_second_half_where_it_is_judged() -> None:
    generated = [0.02] * 5 + [0.9] * 2 + [0.02] * 3
    meter = meter_of(generated, [0.02] * 10, clips=30)
    figures, half = watch(meter).figures(), meter.by_frame()[5:]
    for name in ("changed_tokens_real_fraction", "changed_tokens_generated_fraction", "frame_entropy_generated_bits"):
        assert figures[name] == pytest.approx(np.mean([row[name] for row in half])), name


def test_the_entropy_of_a_frame_is_that_of_the_histogram_of_its_ids() -> None:
    meter, real = RolloutMeter((2, 2)), torch.tensor([[0, 0], [1, 2]]).view(1, 1, 2, 2)
    meter.update(torch.full_like(real, 3), real, real[:, 0])
    figures = meter.summary()
    assert figures["frame_entropy_real_bits"] == pytest.approx(1.5)
    assert figures["frame_entropy_generated_bits"] == 0
    assert not [name for name in meter.by_position()[0] if "entropy" in name]
