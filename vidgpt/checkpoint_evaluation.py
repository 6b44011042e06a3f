"""Evaluate a trained folder on a token dataset and write what was found."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from vidgpt.checkpoint import load_checkpoint
from vidgpt.clip_sums import Bootstrap, ClipPlace, number_episodes
from vidgpt.counts import TokenCounts
from vidgpt.evaluation import add_forced, evaluate_rollouts, evaluate_tokens
from vidgpt.fused import FusedModel
from vidgpt.futures import Futures
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import EvaluateOptions
from vidgpt.pages import headline, write_evaluation_report
from vidgpt.pixel_evaluation import PixelStage
from vidgpt.pixel_pages import PIXEL_PICTURES, pixel_headline, shown_clips
from vidgpt.regimes import ForcedFrames, forced_batch_size, temporally_forced
from vidgpt.sampling import SamplingOptions
from vidgpt.token_report import Setting, TokenReport, write_csv
from vidgpt.worlds import load_world, score_law
from vidtok.card import Card
from vidtok.data.options import how_to_lengthen
from vidtok.folders import OutputFolder
from vidtok.page_parts import describe_device
from vidtok.run.sampler import spread
from vidtok.tokens import TokenDataset, longest_row

RECORD_FILE = "evaluation.json"
FILES = (
    *("metrics.json", "by_frame.csv", "by_position.csv", "by_clip.csv", "report.html"),
    *(f"accuracy_by_{name}.png" for name in ("horizon", "frame", "position")),
    *("changes_by_horizon.png", "changes_by_position.png", "pixels.csv", "pixels_by_clip.csv", *PIXEL_PICTURES),
)
_OURS = re.compile("|".join(map(re.escape, (*FILES, RECORD_FILE))))


class Stopwatch:
    """Seconds of each part of an evaluation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of what runs inside."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def receipt(self) -> dict[str, Any]:
        """Give the seconds so far, on which device."""
        seconds = {f"{name}_seconds": round(value, 1) for name, value in self.seconds.items()}
        return {"device": describe_device(), **seconds}


def evaluate_checkpoint(options: EvaluateOptions) -> TokenReport:
    """Write metrics.json, the tables and the curves into options.output; gives the report.

    evaluation.json there names them, so that a later evaluation replaces them, and no other file.
    Raises ValueError when the tokens come from another tokenizer, or context leaves nothing of the window.
    """
    output = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    output.check(FILES)
    model, _ = load_checkpoint(options.checkpoint, options.tokens)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    layout = TokenLayout.from_config(model.config)
    window = _window(options, model.config.window)
    clips = TokenDataset(options.tokens, options.split, window)
    left_out = _describe_short(clips, options.split)
    if left_out:
        print(f"{left_out}: encode longer ones, with {how_to_lengthen(clips.card.data_name)}")
    print(
        f"evaluating {min(options.clips, len(clips))} clips of {window} frames teacher-forced"
        f"{', temporally teacher-forced too' if options.temporally_forced else ''}, {min(options.rollout_clips, len(clips))} "
        f"free-running from {options.context} frames",
        flush=True,
    )
    stage = PixelStage(options, clips, spread(clips, options.rollout_clips).indices) if options.pixels else None
    watch = Stopwatch()
    report, futures = _measure(model, layout, clips, _counts(options, layout), options, watch)
    pixels, shown = None, []
    if stage is not None:
        with watch.timed("pixels"):
            pixels = stage.measure(futures.indices())
            shown = shown_clips(stage.shown(pixels, futures.indices()), pixels, clips.card)
    output.replace(FILES, asdict(options))
    rows = {"rows_count": len(clips.lengths), "rows_left_out_count": sum(length < window for length in clips.lengths)}
    about = {"protocol": _protocol(clips.card, window, options)} | rows
    report.write(output.path, about | ({} if pixels is None else {"pixels": pixels.metrics()}) | {"compute": watch.receipt()})
    places = [_places(clips, count) for count in (options.clips, options.rollout_clips)]
    write_csv(output.path / "by_clip.csv", report.by_clip(*places))
    if pixels is not None:
        write_csv(output.path / "pixels.csv", pixels.by_horizon)
        write_csv(output.path / "pixels_by_clip.csv", pixels.by_clip())
    receipt = about | {"compute": watch.receipt()} | {"config": asdict(options)}
    title = f"Evaluation of {options.checkpoint}"
    page = write_evaluation_report(report, output.path, title, receipt, left_out, pixels, shown, clips.card.fps)
    print("\n".join([*headline(report), *([] if pixels is None else pixel_headline(pixels))]))
    print(f"figures in {output.path / 'metrics.json'}, curves and tables in {page}")
    return report


def _window(options: EvaluateOptions, limit: int) -> int:
    """Give the latent frames of a clip: the model's window, or those of the longest row. Raises ValueError where context takes all."""
    longest = longest_row(options.tokens, options.split)
    window = min(limit, longest)
    if not 1 <= options.context < window:
        raise ValueError(
            f"context={options.context} leaves nothing to predict: the model's window is {limit} frames, the longest clip of "
            f"split {options.split!r} has {longest}; give a smaller context or longer clips"
        )
    return window


def _protocol(card: Card, window: int, options: EvaluateOptions) -> dict[str, Any]:
    """Give what two evaluations must share before their figures may be compared."""
    return {
        "tokenizer_fingerprint": card.tokenizer_fingerprint,
        "manifest_hash": card.manifest_hash,
        "split": options.split,
        "clip_latent_frames_count": window,
        "context_latent_frames_count": options.context,
        "tokens_per_latent_frame_count": card.grid_height * card.grid_width,
        "pixel_frames_per_latent_frame_count": card.stride_t,
        "pixels_per_frame_count": card.frame_height * card.frame_width,
        "sampling": asdict(options.sampling),
        "seed": options.seed,
    }


def _describe_short(clips: TokenDataset, split: str) -> str:
    """Say how many rows are shorter than a clip, and nothing where none is."""
    short = sum(length < clips.window for length in clips.lengths)
    has, are = ("has", "is") if short == 1 else ("have", "are")
    rows = f"{short} of {len(clips.lengths)} rows of split {split!r}"
    return f"{rows} {has} fewer than {clips.window} latent frames and {are} left out" if short else ""


def _measure(
    model: VidGPTForCausalLM,
    layout: TokenLayout,
    clips: TokenDataset,
    counts: TokenCounts | None,
    options: EvaluateOptions,
    watch: Stopwatch,
) -> tuple[TokenReport, Futures]:
    sampling, size, fused = SamplingOptions(**asdict(options.sampling)), options.batch_size, FusedModel(model)
    scored, rolled = min(options.clips, len(clips)), min(options.rollout_clips, len(clips))
    futures = Futures(fused, sampling, options.seed, options.samples)
    forced = 0  # clips so far: each has its own noise, whatever batch it is in

    def force(indices: Tensor, actions: Tensor | None) -> ForcedFrames:
        nonlocal forced
        first, forced = forced, forced + len(indices)
        return temporally_forced(fused, layout, indices.to(model.device), actions, sampling, options.seed, first)

    names = {"teacher-forced": scored, "temporally teacher-forced": scored * options.temporally_forced, "free-running": rolled}
    with Progress(transient=True) as progress:
        tasks = [progress.add_task(name, total=total, visible=total > 0) for name, total in names.items()]
        shown = [partial(_show, progress, task) for task in tasks]
        with watch.timed("teacher_forced"):
            report = evaluate_tokens(
                model, layout, _batches(clips, scored, layout, size), counts, options.context, None,
                setting=_setting(clips.card, options), batch_size=size, progress=shown[0],
            )  # fmt: skip
        if options.temporally_forced:
            wide = forced_batch_size(fused, clips.window, 2 * size)
            with watch.timed("temporally_teacher_forced"):
                report = add_forced(
                    report, layout, _batches(clips, scored, layout, wide), force, batch_size=wide, progress=shown[1]
                )
        if not rolled:
            return report, futures
        batches = _batches(clips, rolled, layout, 2 * size)
        with watch.timed("free_running"):
            rollouts = evaluate_rollouts(
                layout, batches, options.context, futures, counts, batch_size=2 * size, progress=shown[2]
            )  # fmt: skip
    return replace(report, free_running=rollouts), futures


def _show(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _setting(card: Card, options: EvaluateOptions) -> Setting:
    world, entropy = load_world(options.tokens)
    if world is not None and (world.codebook_size, world.height, world.width) != (
        card.codebook_size,
        card.grid_height,
        card.grid_width,
    ):
        raise ValueError(
            f"world.json in {options.tokens} is of {world.codebook_size} ids on {world.height}x{world.width}, these tokens are "
            f"{card.codebook_size} on {card.grid_height}x{card.grid_width}: write the tokens again, or delete that file"
        )
    pixels = card.stride_t * card.frame_height * card.frame_width
    law = None if world is None else partial(score_law, world)
    return Setting(pixels, law, entropy, Bootstrap(options.resamples, options.seed))


def _counts(options: EvaluateOptions, layout: TokenLayout) -> TokenCounts | None:
    if not longest_row(options.tokens, "train", is_optional=True):
        print(f"{options.tokens} has no training split to count tokens of: the unigram baselines are left out", flush=True)
        return None
    counts = TokenCounts(layout.codebook_size, (layout.height, layout.width), layout.factors)
    for indices in TokenDataset(options.tokens, "train", 1).rows():
        counts.update(indices)
    return counts


def _places(clips: TokenDataset, count: int) -> list[ClipPlace]:
    """Give where the clips of _batches lie."""
    return [ClipPlace.of(clips, index) for index in spread(clips, count).indices]


def _batches(clips: TokenDataset, count: int, layout: TokenLayout, size: int) -> Any:
    chosen, episodes = spread(clips, count), torch.tensor(number_episodes(_places(clips, count)))
    for at in range(0, len(chosen), size):
        items = [chosen[index] for index in range(at, min(at + size, len(chosen)))]
        yield {
            "indices": torch.stack([item["indices"] for item in items]),
            "actions": torch.stack([item["actions"] for item in items]) if layout.num_actions else None,
            "episodes": episodes[at : at + size],
        }
