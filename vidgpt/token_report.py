"""What an evaluation found, as metrics.json and tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vidgpt.clip_sums import Bootstrap, ClipPlace, describe_episodes
from vidgpt.metrics import HIGH, LOW, Figures, RolloutMeter, TokenMeter, gap
from vidgpt.monitor import Monitor, watch
from vidgpt.scores import TokenScores

TRUE_LAW = "true_law"


@dataclass(frozen=True)
class Setting:
    """What an evaluation knows beside the model and the clips.

    pixels_per_frame: that a latent frame after the first stands for. law: scores frames 1 .. t - 1 of clips (B, t, h, w) under the law
    that made them, where it is known. entropy_nats_per_token: of that law, where nothing but this is known.
    """

    pixels_per_frame: int | None = None
    law: Callable[[Tensor], TokenScores] | None = None
    entropy_nats_per_token: float | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)


@dataclass(frozen=True)
class TokenReport:
    """What was measured, by regime and forecaster: the model, each baseline and, where it is known, the true law."""

    clips: int
    context: int  # given frames of a free-running clip
    teacher_forced: dict[str, TokenMeter]
    free_running: dict[str, RolloutMeter] = field(default_factory=dict)  # empty where nothing was generated
    temporally_teacher_forced: dict[str, TokenMeter] = field(default_factory=dict)  # likewise
    setting: Setting = field(default_factory=Setting)
    challenge: dict[str, Any] | None = None  # of the 1X world model challenge, where the model predicts what it scores

    @property
    def monitor(self) -> Monitor | None:
        """Tell whether the model's rollouts move as the world does; None without that regime."""
        return watch(self.free_running["model"]) if self.free_running else None

    def interval_note(self) -> str:
        """Warn of intervals over few episodes, in one line; nothing where there are enough."""
        first, *others = [meters["model"].sums for meters in (self.teacher_forced, self.free_running) if meters]
        fewer = [describe_episodes(sums.num_episodes, sums.clips) for sums in others if sums.num_episodes < first.num_episodes]
        rolled = [f"free-running, {note}" for note in fewer if note]
        return "; ".join(filter(None, [describe_episodes(first.num_episodes, first.clips), *rolled]))

    def gaps(self) -> dict[str, Figures]:
        """Give by how many nats a token each teacher-forced forecaster lies above a perfect one; empty where that is not known."""
        meters, bootstrap, entropy = self.teacher_forced, self.setting.bootstrap, self.setting.entropy_nats_per_token
        if TRUE_LAW in meters:
            return {name: gap(meter, meters[TRUE_LAW], bootstrap) for name, meter in meters.items() if name != TRUE_LAW}
        if entropy is None:
            return {}
        ends = ("", LOW, HIGH)
        found: dict[str, Figures] = {}
        for name, meter in meters.items():
            row = meter.summary(bootstrap)
            nats = {end: row.get(f"cross_entropy_nats_per_token{end}") for end in ends}
            found[name] = {f"gap_nats_per_token{end}": value - entropy for end, value in nats.items() if value is not None}
        return found

    def metrics(self) -> dict[str, Any]:
        """Give the contents of metrics.json: regime, then who predicts, then figures named with their units."""
        bootstrap, gaps = self.setting.bootstrap, self.gaps()
        forced = {name: meter.summary(bootstrap) | gaps.get(name, {}) for name, meter in self.teacher_forced.items()}
        counts = {"clips_count": self.clips, "episodes_count": self.teacher_forced["model"].sums.num_episodes}
        figures: dict[str, Any] = {**counts, "bootstrap": bootstrap.describe(), "teacher_forced": forced}
        if self.temporally_teacher_forced:
            temporally = {name: meter.summary(bootstrap) for name, meter in self.temporally_teacher_forced.items()}
            figures["temporally_teacher_forced"] = temporally
        if self.challenge is not None:
            figures["world_model_challenge_1x"] = self.challenge
        if self.monitor is not None:
            rolled = self.free_running["model"].sums
            counts = {"clips_count": rolled.clips, "episodes_count": rolled.num_episodes}
            given = {"context_frames_count": self.context, **counts}
            rollouts = {name: meter.summary(bootstrap) for name, meter in self.free_running.items()}
            figures["free_running"] = given | rollouts | {"monitor": self.monitor.figures()}
        return figures

    def by_frame(self) -> list[dict[str, Any]]:
        """Give one row for each regime, forecaster and frame; free-running rows have a horizon beside the frame index."""
        bootstrap = self.setting.bootstrap
        rows = []
        for regime, meters in self._forced().items():
            rows += _tagged({name: meter.by_frame(bootstrap) for name, meter in meters.items()}, regime)
        states = self.monitor.states if self.monitor is not None else []
        for name, rollout in self.free_running.items():
            for row in rollout.by_frame(bootstrap):
                horizon = int(row["horizon_frames"] or 0)
                frame: dict[str, Any] = {"frame_index": self.context - 1 + horizon}
                state = {"motion_state": states[horizon - 1]} if name == "model" else {}
                rows.append({"regime": "free_running", "forecaster": name} | frame | row | state)
        return rows

    def by_position(self) -> list[dict[str, Any]]:
        """Give one row for each regime, forecaster and place of the grid."""
        bootstrap = self.setting.bootstrap
        rows = []
        for regime, meters in self._forced().items():
            rows += _tagged({name: meter.by_position(bootstrap) for name, meter in meters.items()}, regime)
        rollouts = {name: meter.by_position(bootstrap) for name, meter in self.free_running.items()}
        return rows + _tagged(rollouts, "free_running")

    def by_clip(self, forced: Sequence[ClipPlace], rolled: Sequence[ClipPlace]) -> list[dict[str, Any]]:
        """Give one row for each regime, forecaster and clip, for paired comparison of evaluations.

        forced, rolled: where the clips of the forced regimes and of the free-running one lie.
        """
        meters: dict[str, Mapping[str, TokenMeter | RolloutMeter]] = {**self._forced(), "free_running": self.free_running}
        rows = []
        for regime, forecasters in meters.items():
            places = [place.columns() for place in (rolled if regime == "free_running" else forced)]
            for name, meter in forecasters.items():
                pairs = zip(places, meter.by_clip(), strict=True)
                rows += [{"regime": regime, "forecaster": name} | place | row for place, row in pairs]
        return rows

    def write(self, folder: str | Path, more: Mapping[str, Any] | None = None) -> None:
        """Write metrics.json, with `more` in it, by_frame.csv and by_position.csv into a folder, which is made where missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        figures = self.metrics() | dict(more or {})
        (folder / "metrics.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_csv(folder / "by_frame.csv", self.by_frame())
        write_csv(folder / "by_position.csv", self.by_position())

    def _forced(self) -> dict[str, dict[str, TokenMeter]]:
        return {"teacher_forced": self.teacher_forced, "temporally_teacher_forced": self.temporally_teacher_forced}


def _tagged(tables: Mapping[str, list[Figures]], regime: str) -> list[dict[str, Any]]:
    """Put regime and forecaster in front of every row."""
    return [{"regime": regime, "forecaster": name} | row for name, rows in tables.items() for row in rows]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; columns are the union of their keys, a missing or undefined figure is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
