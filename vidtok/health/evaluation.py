"""The health report of a trained tokenizer: choose clips, measure, judge, write."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vidtok.data import Episode, EpisodeSet, build_episodes
from vidtok.data.episodes import describe_short, write_rejects
from vidtok.data.options import how_to_lengthen
from vidtok.folders import OutputFolder
from vidtok.health.measures import ClipFigures, HealthMeter
from vidtok.health.page import PAPERS, PLOTS, Health, ShownClip, write_health_page
from vidtok.health.seams import Coder, SeamMeter, check_tile, chunk_steps, compare_chunks, compare_tiles
from vidtok.health.speed import measure_speed
from vidtok.health.verdicts import judge_all, overall
from vidtok.model import VidTokModel
from vidtok.options import EvaluateTokenizerOptions
from vidtok.page_parts import difference_frames
from vidtok.tokenizer import check_decoder, choose_tokenizer
from vidtok.video import to_frames, to_video

RECORD_FILE = "evaluation.json"
FILES = (
    "metrics.json",
    "clips.csv",
    "rejects.csv",
    "report.html",
    *(f"figures/{name}{suffix}.png" for name in PLOTS for _, suffix in PAPERS),
)
_OURS = re.compile("|".join(map(re.escape, (*FILES, RECORD_FILE))))
USUAL_FRAMES = 17
SEAM_CLIPS = 8
TYPICAL_CLIPS = 2
DIFFERENCE_GAIN = 4
FASTEST_SHOWN = 8.0  # frames a second
WAYS = {True: "chunk after chunk of one clip", False: "every chunk a clip of its own"}
STATUS_STYLES = {"good": "green", "look at this": "yellow", "broken": "bold red", "not measured": "dim"}


@dataclass(frozen=True)
class ClipPlace:
    """Frames [first, first + frames) of an episode."""

    episode: Episode
    first: int
    frames: int

    @property
    def seconds(self) -> float:
        """Say where the clip starts in its source."""
        return self.episode.start + self.first / self.episode.fps

    def read(self) -> Tensor:
        """Give the clip (3, T, H, W) in [-1, 1]."""
        return to_video(self.episode.frames[self.first : self.first + self.frames])


def evaluate_checkpoint(options: EvaluateTokenizerOptions, data: Mapping[str, Any]) -> Health:
    """Write metrics.json, clips.csv and report.html into options.output, and print the verdicts; gives what was measured.

    evaluation.json there names them, so that a later evaluation replaces them, and no other file. Raises ValueError when data, tokenizer
    and options do not fit together.
    """
    folder = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    folder.check(FILES, **{f"data.{key}": data.get(key) for key in ("root", "file")})
    tokenizer = choose_tokenizer(options.checkpoint, options.tokenizer)
    check_decoder(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coder = Coder(tokenizer.to(device))
    name = options.checkpoint or options.tokenizer["path"]
    episodes = build_episodes(data)
    split, chosen = _choose_split(episodes, options.split)
    frames = clip_length(coder, chosen, options.clip_frames)
    steps = chunk_steps(coder, frames, options.chunk_frames)
    check_tile(coder, options.tile, episodes.height, episodes.width)
    places = choose_clips(chosen, frames, options.clips, options.seed)
    about = f"{len(places)} clips of {frames} frames, {episodes.height}x{episodes.width} at {episodes.fps:g} a second, {split}"
    left_out = describe_short(chosen, frames)
    if left_out:
        print(f"{left_out}: {_advise_short(coder, chosen, frames, episodes.name)}")
        about += f", of which {left_out}"
    print(f"evaluating {name}: {about}", flush=True)
    meter, measured = _measure(coder, places, steps, options, episodes.fps, device)
    figures = {
        "clips": len(places),
        "clip_frames": frames,
        "frames_per_second_of_clips": episodes.fps,
        "split": split,
        "split_episodes": len(chosen),
        "split_episodes_left_out": sum(len(episode.frames) < frames for episode in chosen),
        "frame_height_pixels": episodes.height,
        "frame_width_pixels": episodes.width,
        **measured,
    }
    usage = [] if meter.codes is None else [counts.sort(descending=True).values for counts in meter.codes.digit_counts]
    verdicts = judge_all(figures, tokenizer.config if isinstance(tokenizer, VidTokModel) else None)
    health = Health(f"Health of {name}", about, figures, verdicts, usage, meter.clips)
    shown = [*_shown(coder, health, places, options.worst, device)]
    config = asdict(options) | {"data": dict(data)}
    folder.replace(FILES, config)
    _write(folder.path, health, places, episodes)
    write_health_page(health, shown, min(FASTEST_SHOWN, episodes.fps), config, folder.path)
    _print(health, folder.path)
    return health


def clip_length(coder: Coder, episodes: Sequence[Episode], wanted: int | None) -> int:
    """Give the frames of a clip: as wanted, or the usual count, or what tokenizer and data allow.

    Raises ValueError when the tokenizer would have to pad, or no episode is long enough.
    """
    longest = max((len(episode.frames) for episode in episodes), default=0)
    if wanted is None:
        wanted = coder.tokenizer.valid_frames(max(1, min(USUAL_FRAMES, longest)))[0]
    below, above = coder.tokenizer.valid_frames(wanted)
    if wanted != above:
        raise ValueError(f"clip_frames={wanted} does not fit stride_t={coder.tokenizer.stride_t}: use {below} or {above}")
    if wanted > longest:
        raise ValueError(
            f"a clip needs {wanted} frames and the longest of {len(episodes)} episodes has {longest}: give a smaller clip_frames, "
            "split=all, a higher data.fps or longer videos"
        )
    return wanted


def choose_clips(episodes: Sequence[Episode], frames: int, count: int, seed: int) -> list[ClipPlace]:
    """Draw at most `count` clips, one from each of as many equal stretches of all windows, so that they cover the data evenly."""
    long = [episode for episode in episodes if len(episode.frames) >= frames]
    ends = list(accumulate(len(episode.frames) - frames + 1 for episode in long))
    edges = np.linspace(0, ends[-1], min(count, ends[-1]) + 1).astype(int)
    windows = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
    which = np.searchsorted(ends, windows, side="right")
    return [
        ClipPlace(long[index], int(window - (ends[index - 1] if index else 0)), frames)
        for index, window in zip(which.tolist(), windows.tolist(), strict=True)
    ]


def _advise_short(coder: Coder, episodes: Sequence[Episode], frames: int, source: str) -> str:
    """Name the keys with which the episodes that are too short for a clip would be measured too."""
    short = [episode for episode in episodes if len(episode.frames) < frames]
    shortest = min(len(episode.frames) for episode in short)
    fitting = coder.tokenizer.valid_frames(shortest)[0]
    longer = how_to_lengthen(source, any(episode.split == "validation" and episode.start > 0 for episode in short))
    return f"clip_frames={fitting} takes all, or give {longer}" if fitting <= shortest else f"give {longer}"


def _choose_split(episodes: EpisodeSet, wanted: str | None) -> tuple[str, list[Episode]]:
    held_out = episodes.split("validation")
    if wanted is None:
        return ("validation split", held_out) if held_out else ("all data, without a validation split", episodes.episodes)
    chosen = episodes.episodes if wanted == "all" else episodes.split(wanted)
    if not chosen:
        raise ValueError(f"split={wanted} holds no episode: give split=all, or a larger data.validation")
    return f"{wanted} split" if wanted != "all" else "all splits", chosen


def _measure(
    coder: Coder,
    places: Sequence[ClipPlace],
    steps: int | None,
    options: EvaluateTokenizerOptions,
    fps: float,
    device: torch.device,
) -> tuple[HealthMeter, dict[str, Any]]:
    """Time the tokenizer, pass once over all clips and cut some of them; gives every figure."""
    meter = HealthMeter(coder)
    with Progress(transient=True) as progress:
        (batch,) = _batches(places[: options.batch_size], options.batch_size, device, progress, "timing")
        speed = measure_speed(coder, batch)
        for video in _batches(places, options.batch_size, device, progress, "reconstructing"):
            meter.update(video)
        seams = _measure_seams(coder, places[:SEAM_CLIPS], steps, options, device, progress)
    return meter, meter.figures(fps) | seams | speed


def _batches(places: Sequence[ClipPlace], size: int, device: torch.device, progress: Progress, name: str) -> Iterator[Tensor]:
    task = progress.add_task(name, total=len(places))
    for at in range(0, len(places), size):
        batch = places[at : at + size]
        yield torch.stack([place.read() for place in batch]).to(device)
        progress.advance(task, len(batch))


def _measure_seams(
    coder: Coder,
    places: Sequence[ClipPlace],
    steps: int | None,
    options: EvaluateTokenizerOptions,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Give the figures of chunk borders, and of tile borders where tiles were asked for."""
    chunks, tiles = SeamMeter("chunk"), SeamMeter("tile")
    for video in _batches(places, options.batch_size, device, progress, "cutting into chunks"):
        if steps is not None:
            compare_chunks(coder, video, steps, chunks)
        if options.tile is not None:
            compare_tiles(coder, video, options.tile, options.overlap, tiles)
    cut = {"seam_clips": len(places), "chunk_way": WAYS[coder.goes_on], "chunk_latent_frames": steps}
    return cut | chunks.figures() | (tiles.figures() if options.tile is not None else {})


def _shown(coder: Coder, health: Health, places: Sequence[ClipPlace], worst: int, device: torch.device) -> Iterator[ShownClip]:
    """Code the worst clips and a few of the middle once more, for their pictures: none were kept."""
    order = sorted(range(len(places)), key=lambda index: health.clips[index].psnr_db)
    lowest = _apart(order, places, worst)
    # Nearest to the median first.
    middle = sorted(set(order) - set(lowest), key=lambda index: abs(order.index(index) - len(order) // 2))
    kinds = [*(("worst", index) for index in lowest), *(("typical", index) for index in _apart(middle, places, TYPICAL_CLIPS))]
    for kind, index in kinds:
        place, figures = places[index], health.clips[index]
        video = place.read()[None].to(device)
        source, decoded = to_frames(video[0].cpu()), to_frames(coder.decode(coder.encode(video), video)[0].cpu())
        rows = {
            "source": source,
            "reconstruction": decoded,
            f"difference x {DIFFERENCE_GAIN}": difference_frames(decoded, source, DIFFERENCE_GAIN),
        }
        where = f"{place.episode.source} at {place.seconds:.1f} s"
        yield ShownClip(kind, f"{where}: {figures.psnr_db:.1f} dB, frame {figures.worst_frame} worst", rows)


def _apart(order: Sequence[int], places: Sequence[ClipPlace], count: int) -> list[int]:
    """Take the first `count` of the clips in `order` that share no frame with one taken before."""
    taken: list[int] = []
    for index in order:
        place = places[index]
        others = [places[other] for other in taken]
        if len(taken) < count and not any(
            other.episode is place.episode and abs(other.first - place.first) < place.frames for other in others
        ):
            taken.append(index)
    return taken


def _write(output: Path, health: Health, places: Sequence[ClipPlace], episodes: EpisodeSet) -> None:
    verdicts = {verdict.rule.key: verdict.status for verdict in health.verdicts}
    (output / "metrics.json").write_text(json.dumps({**health.figures, "verdicts": verdicts}, indent=1) + "\n")
    write_rejects(output / "rejects.csv", episodes.rejects)
    with (output / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["source", "start_seconds", *(option.name for option in fields(ClipFigures))])
        for place, figures in zip(places, health.clips, strict=True):
            table.writerow([place.episode.source, round(place.seconds, 6), *asdict(figures).values()])


def _print(health: Health, output: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("", "left"), ("value", "right"), ("verdict", "left"), ("rule", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for verdict in health.verdicts:
        status = f"[{STATUS_STYLES[verdict.status]}]{verdict.status}[/]"
        table.add_row(verdict.rule.title, verdict.rule.show(verdict.value), status, verdict.rule.words())
    console = Console()
    console.print(table)
    for verdict in health.verdicts:
        if verdict.status in ("look at this", "broken"):
            console.print(f"{verdict.rule.title}: {verdict.advice}", markup=False, highlight=False, soft_wrap=True)
    print(f"{overall(health.verdicts)}; figures in {output / 'metrics.json'}, pictures in {output / 'report.html'}")
