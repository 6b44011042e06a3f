"""What vidgpt-evaluate left in a folder, read back for a comparison; and whether two of them may be compared."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgpt.clip_sums import number_values
from vidtok.page_parts import leaves

CLIP_FILE = "by_clip.csv"
PIXEL_CLIP_FILE, PIXELS = "pixels_by_clip.csv", "pixels"  # its rows name no regime
EPISODE = "episode"
KEYS = ("regime", "forecaster", "data_row", "first_latent_frame", EPISODE)
# Parts of a protocol that one of two evaluations may lack: figures that only one of them has are not compared.
PARTS = ("motion_estimator", "lpips", "vmaf", "distances.fvd")
_PROTOCOL = "protocol"

Clip = tuple[int, int]  # row of the data set, first latent frame
Figures = dict[str, float]


@dataclass(frozen=True)
class EvaluatedRun:
    """An evaluation: its folder, metrics.json, evaluation.json and the figures of every clip, by regime and forecaster.

    A figure that is not known of a clip is not there. episodes: of every row of the data set; without those that were not written down.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]
    clips: Mapping[str, Mapping[str, Mapping[Clip, Figures]]]
    episodes: Mapping[int, str]

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Give every protocol that metrics.json holds, by its place there; "" is that of the whole evaluation."""
        return dict(_protocols(self.metrics))

    def describe(self) -> dict[str, Any]:
        """Give what tells this run from another."""
        return {"name": self.name, "folder": str(self.folder), "checkpoint": self.record.get("checkpoint")}


def load_run(name: str, folder: str | Path) -> EvaluatedRun:
    """Read an output folder of vidgpt-evaluate. Raises FileNotFoundError or ValueError, in one sentence, for any other folder."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give output folders of vidgpt-evaluate, as runs=[runs/a,runs/b]")
    metrics = _read_json(folder / "metrics.json")
    if not isinstance(metrics.get(_PROTOCOL), dict) or not (folder / CLIP_FILE).is_file():
        missing = CLIP_FILE if isinstance(metrics.get(_PROTOCOL), dict) else "metrics.json with a protocol"
        raise ValueError(f"{folder} has no {missing}, which vidgpt-evaluate writes: run it again, and give its output folder")
    record = _read_json(folder / "evaluation.json")
    episodes: dict[int, str] = {}
    clips = _read_clips(folder / CLIP_FILE, episodes)
    if (folder / PIXEL_CLIP_FILE).is_file():
        clips |= _read_clips(folder / PIXEL_CLIP_FILE, episodes, PIXELS)
    return EvaluatedRun(name, folder, metrics, record, clips, episodes)


def check_comparable(run: EvaluatedRun, other: EvaluatedRun) -> None:
    """Raise ValueError, in one sentence that names every field that differs with both its values, unless the protocols are the same.

    A protocol that only one of them has is of a part that only one of them measured, which is not compared; likewise one of PARTS.
    """
    first, second = run.protocols(), other.protocols()
    differing = []
    for place in (place for place in first if place in second):
        ours, theirs = first[place], second[place]
        lacking = tuple(part for part in PARTS for side in (ours, theirs) if not _has(side, part))
        names = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
        names = [name for name in names if not any(_is_of(name, part) for part in lacking)]
        prefix = f"{place}." if place else ""
        differing += [f"{prefix}{name} ({_shown(ours, name)} and {_shown(theirs, name)})" for name in names]
    if differing:
        raise ValueError(
            f"{run.folder} and {other.folder} cannot be compared, their protocols differ in {', '.join(differing)}: "
            "evaluate both in one way"
        )


def shared_clips(run: EvaluatedRun, other: EvaluatedRun, regime: str, forecaster: str) -> list[Clip]:
    """Give the clips of a forecaster, in order. Raises ValueError where the two runs have others."""
    ours, theirs = run.clips[regime][forecaster], other.clips[regime][forecaster]
    both = [clip for clip in ours if clip in theirs]
    if len(both) < max(len(ours), len(theirs)):
        raise ValueError(
            f"{run.folder} has {len(ours)} clips and {other.folder} {len(theirs)} of the regime {regime}, {len(both)} of them the same: "
            "evaluate both with the same clips and rollout_clips"
        )
    return both


def episode_numbers(runs: Sequence[EvaluatedRun]) -> dict[int, int]:
    """Give the number of the episode that each row of the data set is of; a row of which no run says it is one by itself.

    Raises ValueError where two runs say different things.
    """
    known: dict[int, tuple[str, Path]] = {}  # the episode of a row, and who says so first
    for run in runs:
        for row, episode in run.episodes.items():
            named, folder = known.setdefault(row, (episode, run.folder))
            if named != episode:
                raise ValueError(
                    f"{folder} has row {row} of the data set from {named} and {run.folder} from {episode}: evaluate both on the same tokens"
                )
    rows = sorted({row for run in runs for forecasts in run.clips.values() for clips in forecasts.values() for row, _ in clips})
    names: list[str | int] = [known[row][0] if row in known else row for row in rows]
    return dict(zip(rows, number_values(names), strict=True))


def _has(protocol: Mapping[str, Any], part: str) -> bool:
    return any(_is_of(name, part) and value is not None for name, value in protocol.items())


def _is_of(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _shown(protocol: Mapping[str, Any], name: str) -> str:
    return repr(protocol[name]) if name in protocol else "not there"


def _protocols(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Find every mapping called protocol, or ending so, and flatten it."""
    for key, value in values.items():
        if not isinstance(value, Mapping):
            continue
        if key == _PROTOCOL or key.endswith((f"_{_PROTOCOL}", f"{_PROTOCOL}_card")):
            yield place if key == _PROTOCOL else f"{place}.{key}".strip("."), dict(leaves(value))
        else:
            yield from _protocols(value, f"{place}.{key}".strip("."))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: give output folders of vidgpt-evaluate") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate again") from None
    return values if isinstance(values, dict) else {}


def _read_clips(path: Path, episodes: dict[int, str], regime: str | None = None) -> dict[str, dict[str, dict[Clip, Figures]]]:
    """Read a table of clips, and into `episodes` what the rows of the data set are of; regime: of all its rows, where they name none."""
    found: dict[str, dict[str, dict[Clip, Figures]]] = {}
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of clips ({error}): evaluate again") from None
    for number, row in enumerate(rows, 2):
        try:
            clip = (int(row["data_row"]), int(row["first_latent_frame"]))
            clips = found.setdefault(regime or row["regime"], {}).setdefault(row["forecaster"], {})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, names no clip ({error!r}): evaluate again") from None
        if clip in clips:
            raise ValueError(f"{path}, line {number}, tells of a clip a second time: evaluate again")
        clips[clip] = dict(_numbers(row))
        if row.get(EPISODE):
            episodes[clip[0]] = row[EPISODE]
    return found


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Give the figures of a row; a cell that is empty, or a text, is none."""
    for name, cell in row.items():
        if name in KEYS:
            continue
        try:
            value = float(cell)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            yield name, value


def figure_names(clips: Sequence[Mapping[Clip, Figures]]) -> list[str]:
    """Give the figures that every one of several forecasts has of at least one clip."""
    names = [{name for figures in forecast.values() for name in figures} for forecast in clips]
    order = dict.fromkeys(name for forecast in clips for figures in forecast.values() for name in figures)
    return [name for name in order if all(name in known for known in names)]
