"""Compare evaluations of the same clips: paired differences with bootstrap intervals over episodes, figure by figure."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table as PrintedTable
from torch import Tensor

from vidgpt.clip_sums import LEVEL, Bootstrap, describe_episodes
from vidgpt.evaluated_run import EvaluatedRun, check_comparable, episode_numbers, figure_names, load_run, shared_clips
from vidgpt.evaluation_options import CompareOptions
from vidgpt.metrics import divided
from vidgpt.report import Report, write_report
from vidgpt.token_report import write_csv
from vidtok.folders import OutputFolder
from vidtok.page_parts import Cell, Table, format_cell, make_receipt
from vidtok.run.checkpoints import write_text

Better = Literal["higher", "lower"]
RECORD_FILE = "compare.json"
FILES = ("compare.csv", "report.html")
# Names of figures, or beginnings of them, in which one direction is better; of any other figure no verdict is given.
BETTER: tuple[tuple[re.Pattern[str], Better], ...] = (
    (re.compile(r"(digit_\d+_)?cross_entropy_.*|gap_nats_.*|expected_calibration_error_.*"), "lower"),
    (re.compile(r"((digit_\d+_)?top\d|generated)_accuracy_.*fraction"), "higher"),
    (re.compile(r"mse.*|mae.*|lpips_.*|dtssd_.*"), "lower"),
    (re.compile(r"psnr_.*|(ms_)?ssim.*|vmaf.*"), "higher"),
)
WIDTH = 132


@dataclass(frozen=True)
class Difference:
    """A figure of one forecaster in two runs, over the clips of which both know it; None where there is none."""

    regime: str
    forecaster: str
    figure: str
    better: Better | None  # direction; None where neither is
    reference: str
    other: str
    clips_count: int
    episodes_count: int  # that these are of
    reference_value: float
    other_value: float
    difference: float  # other - reference
    difference_ci95_low: float | None  # of a single episode there is no interval
    difference_ci95_high: float | None

    @property
    def verdict(self) -> str:
        """Say which run is better, where its interval leaves zero out."""
        low, high = self.difference_ci95_low, self.difference_ci95_high
        if low is None or high is None or low <= 0 <= high:
            return "not told apart"
        if self.better is None:
            return "differ"
        return f"{self.other if (low > 0) == (self.better == 'higher') else self.reference} better"


def compare_runs(options: CompareOptions) -> list[Difference]:
    """Print the table, and write compare.json, compare.csv and report.html into options.output; gives what is in them.

    Raises FileNotFoundError or ValueError for what is no evaluation, and for evaluations of other clips or by another protocol.
    """
    runs = [load_run(name, folder) for name, folder in zip(string.ascii_uppercase, options.runs, strict=False)]
    output = OutputFolder(Path(options.output), RECORD_FILE, re.compile("|".join(map(re.escape, (*FILES, RECORD_FILE)))))
    for run in runs:
        output.check(FILES, runs=str(run.folder))
    found, equal = compare(runs, Bootstrap(options.resamples, options.seed))
    rows = [asdict(row) | {"verdict": row.verdict} for row in found]
    notes = _notes(runs, found, equal)
    record = {"runs": [run.describe() for run in runs], "bootstrap": Bootstrap(options.resamples, options.seed).describe()}
    record = output.replace(FILES, {**record, "protocol": runs[0].metrics["protocol"], "notes": notes, "equal": equal})
    write_text(output.path / RECORD_FILE, json.dumps(record | {"differences": rows}, indent=2, allow_nan=False) + "\n")
    write_csv(output.path / "compare.csv", rows)
    page = write_report(_page(runs, found, notes, options), output.path / "report.html")
    _print(runs, found, notes)
    print(f"figures in {output.path / RECORD_FILE} and compare.csv, the same as a page in {page}")
    return found


def compare(runs: Sequence[EvaluatedRun], bootstrap: Bootstrap) -> tuple[list[Difference], dict[str, list[str]]]:
    """Compare every other run with the first; gives the differences, and by regime the forecasters whose figures are all the same.

    Raises ValueError for runs that are not comparable, and where nothing is common to them.
    """
    first = runs[0]
    for other in runs[1:]:
        check_comparable(first, other)
    numbers = episode_numbers(runs)  # one for all pairs, so that the same clips are drawn in the same way in all of the table
    found: list[Difference] = []
    equal: dict[str, list[str]] = {}
    for regime in first.clips:
        for forecaster in first.clips[regime]:
            others = [run for run in runs[1:] if forecaster in run.clips.get(regime, {})]
            compared = [
                row for other in others for row in _compare_forecaster(first, other, regime, forecaster, bootstrap, numbers)
            ]
            if compared:
                found += compared
            elif others:
                equal.setdefault(regime, []).append(forecaster)
    if not found and not equal:
        raise ValueError(f"{' and '.join(str(run.folder) for run in runs)} have no regime in common: evaluate both in one way")
    return found, equal


def _compare_forecaster(
    run: EvaluatedRun, other: EvaluatedRun, regime: str, forecaster: str, bootstrap: Bootstrap, numbers: Mapping[int, int]
) -> Iterator[Difference]:
    """Give the difference of every figure, in the order of the file; nothing of a figure that is the same in every clip.

    numbers: of the episode that each row of the data set is of.
    """
    clips, sides = shared_clips(run, other, regime, forecaster), (run.clips[regime][forecaster], other.clips[regime][forecaster])
    names = figure_names(sides)
    for name in (name for name in names if name.endswith("_count")):
        if any(sides[0][clip].get(name) != sides[1][clip].get(name) for clip in clips):
            raise ValueError(
                f"{run.folder} and {other.folder} have another {name} of the same clip in the regime {regime}: their clips are not the "
                "same, evaluate both on the same tokens"
            )
    for name in (name for name in names if not name.endswith("_count")):
        known = [clip for clip in clips if all(name in side[clip] for side in sides) and _weight(sides[0][clip], name) > 0]
        ours, theirs = (torch.tensor([side[clip][name] for clip in known], dtype=torch.float64) for side in sides)
        if not known or torch.equal(ours, theirs):
            continue
        weights = torch.tensor([_weight(sides[0][clip], name) for clip in known], dtype=torch.float64)
        episodes = [numbers[row] for row, _ in known]
        low, high = paired_interval(ours, theirs, weights, bootstrap, episodes) or (None, None)
        value, changed = (float(divided((weights * side).sum(), weights.sum())) for side in (ours, theirs))
        pair, counts = (run.name, other.name), (len(known), len(set(episodes)))
        yield Difference(regime, forecaster, name, better_of(name), *pair, *counts, value, changed, changed - value, low, high)


def better_of(figure: str) -> Better | None:
    """Tell which direction of a figure is better, by its name; None where neither is, and of a figure that is not known here."""
    return next((better for names, better in BETTER if names.fullmatch(figure)), None)


def paired_interval(
    ours: Tensor, theirs: Tensor, weights: Tensor, bootstrap: Bootstrap, episodes: Sequence[int]
) -> tuple[float, float] | None:
    """Give the bounds of the difference theirs - ours of weighted means over clips (n,), whose episodes are drawn anew together.

    episodes: that of each clip. None where there is but one, or but one of weight.
    """
    parts = torch.stack([weights * (theirs - ours), weights], dim=1)

    def difference(drawn: Tensor) -> Tensor:
        change, total = (drawn @ parts).unbind(1)
        return divided(change, total)

    bounds = bootstrap.interval(episodes, difference, weights > 0)
    return None if bounds is None or bounds[0].isnan() else (float(bounds[0]), float(bounds[1]))


def _weight(figures: Mapping[str, float], name: str) -> float:
    """Give what a clip weighs in the mean of a figure, so that the mean is the figure of all clips as vidgpt-evaluate has it."""
    return figures.get("changed_tokens_count" if "on_changed_tokens" in name else "tokens_count", 1.0)


def _notes(runs: Sequence[EvaluatedRun], found: Sequence[Difference], equal: Mapping[str, Sequence[str]]) -> list[str]:
    """Say what a reader must know of the intervals, and what is not in the table."""
    chance = (
        f"each interval holds for its own figure at {LEVEL:.0%}: of {len(found)} figures of runs that are equally good, about "
        f"{len(found) * (1 - LEVEL):.1f} would be told apart by chance"
    )
    notes = [chance if found else "every figure of every clip is the same in all runs"]
    notes += _episode_notes(found)
    if not any(run.episodes for run in runs):
        notes.append("none of these evaluations says of which episode a clip is, so every row of the data set counts as one")
    if equal:
        notes.append(f"the same in every clip, and left out: {_listed(equal)}")
    parts = [{(regime, name) for regime in run.clips for name in run.clips[regime]} for run in runs]
    if pairs := sorted(parts[0].union(*parts[1:]) - parts[0].intersection(*parts[1:])):
        lacking = {regime: [name for place, name in pairs if place == regime] for regime, _ in pairs}
        notes.append(f"not in every run: {_listed(lacking)}")
    return notes


def _episode_notes(found: Sequence[Difference]) -> Iterator[str]:
    """Warn of intervals over few episodes, regime by regime; of the figures with the fewest where they differ."""
    for regime in dict.fromkeys(row.regime for row in found):
        # Where there is one clip, nobody expects an interval.
        counts = sorted({(row.episodes_count, row.clips_count) for row in found if row.regime == regime and row.clips_count > 1})
        if counts and (note := describe_episodes(*counts[0])):
            some = "" if counts[0][0] == counts[-1][0] else ", in some figures"
            yield f"{regime.replace('_', ' ')}{some}: {note}"


def _listed(forecasters: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(names)} ({regime})".replace("_", " ") for regime, names in forecasters.items())


def _table(runs: Sequence[EvaluatedRun], found: Sequence[Difference]) -> tuple[list[str], list[list[Cell]]]:
    """Give header and rows of the one table."""
    is_pair = len(runs) == 2
    header = ["regime", "figure", "better", *(["A", "B", "B - A"] if is_pair else ["runs", "first", "second", "second - first"])]
    rows: list[list[Cell]] = []
    for row in found:
        who = "" if row.forecaster == "model" else f" ({row.forecaster.replace('_', ' ')})"
        place: list[Cell] = [row.regime.replace("_", " ") + who, row.figure.replace("_", " "), row.better]
        numbers: list[Cell] = [row.reference_value, row.other_value, row.difference]
        names: list[Cell] = [] if is_pair else [f"{row.reference}, {row.other}"]
        rows.append([*place, *names, *numbers, row.difference_ci95_low, row.difference_ci95_high])
        rows[-1] += [row.clips_count, row.episodes_count, row.verdict]
    return [*header, f"{LEVEL:.0%} from", "to", "clips", "episodes", "verdict"], rows


def _page(runs: Sequence[EvaluatedRun], found: Sequence[Difference], notes: Sequence[str], options: CompareOptions) -> Report:
    header, rows = _table(runs, found)
    named = Table("Runs", ["", "folder", "checkpoint"], [list(run.describe().values()) for run in runs])
    compared = Table(
        "Paired differences over the same clips; figures that are the same in every clip are left out",
        header,
        rows,
    )
    receipt = make_receipt(asdict(options)) | {"protocol": runs[0].metrics["protocol"]}
    told = " ".join(f"{note[0].upper()}{note[1:]}." for note in notes)
    return Report("Evaluations compared", told, tables=[named, compared], receipt=receipt)


def _print(runs: Sequence[EvaluatedRun], found: Sequence[Difference], notes: Sequence[str]) -> None:
    for run in runs:
        print(f"{run.name} = {run.folder} ({run.record.get('checkpoint')})")
    header, rows = _table(runs, found)
    table = PrintedTable(box=None, pad_edge=False)
    for name in header:
        is_text = name in ("regime", "figure", "better", "runs", "verdict")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(format_cell, row))
    Console(width=WIDTH, highlight=False).print(table)
    for note in notes:
        print(note)
