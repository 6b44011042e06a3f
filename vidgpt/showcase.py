"""The demo: every stage of the main job in turn, each resumable by itself, and one report over all."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidgpt.benchmark_protocol import check_protocol
from vidgpt.checkpoint_evaluation import evaluate_checkpoint
from vidgpt.config import DEFAULT_WINDOW
from vidgpt.evaluation import TokenReport
from vidgpt.options import DemoOptions
from vidgpt.pages import headline, write_demo_report
from vidgpt.pixels import HeldOutReport, evaluate_pixels
from vidgpt.report import strip_image
from vidgpt.rollout import Predictor
from vidgpt.training import train_gpt
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.data import Episode, build_episodes
from vidtok.encoding import encode_dataset
from vidtok.padding import valid_frames
from vidtok.training import train_tokenizer
from vidtok.video import to_frames, to_video, write_png, write_video


def run_demo(options: DemoOptions, config: Mapping[str, Any]) -> Path:
    """Collect, train the tokenizer, encode, train the transformer, predict, evaluate; gives the path of report.html.

    A run that was interrupted goes on where it stopped when it is given again.
    """
    check_protocol(config)
    run_dir, started = Path(options.run_dir), time.monotonic()
    seconds: dict[str, float] = {}

    def stage(title: str, command: str, keys: str = "") -> None:
        seconds[title] = time.monotonic()
        print(
            f"\n[{len(seconds)}/5] {title}: what {command} does" + (f", with the keys kept in {keys}" if keys else ""), flush=True
        )

    stage("train the tokenizer", "vidtok-train", f"{options.tokenizer_training.run_dir}/config.yaml")
    _check_lengths(options)
    train_tokenizer(options.tokenizer_training, options.data, options.tokenizer, config["tokenizer_training"])
    stage("encode the videos", "vidtok-encode")
    encode_dataset(options.encoding, options.data)
    stage("train the transformer", "vidgpt-train", f"{options.gpt_training.run_dir}/config.yaml")
    train_gpt(options.gpt_training, options.model, config["gpt_training"])
    stage("evaluate on held-out tokens", "vidgpt-evaluate")
    tokens = evaluate_checkpoint(options.evaluation)
    stage("predict held-out frames", "vidgpt-predict")
    pixels = predict_held_out(options)
    _write_example(run_dir, options, pixels)
    (run_dir / "pixels.json").write_text(json.dumps({"psnr_db_mean_by_horizon": pixels.psnr_db}, indent=1) + "\n")
    report = write_demo_report(run_dir, options, tokens, pixels, _durations(seconds), config)
    for line in summary_lines(tokens, pixels):
        print(line)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in all. Open {report} in a browser.")
    print(f"Try: vidgpt-predict checkpoint={run_dir}/gpt input={run_dir}/held_out.mp4 start=0 output={run_dir}/prediction")
    return report


def _check_lengths(options: DemoOptions) -> None:
    """Raise ValueError, before the work of hours, for a context and future that cannot be predicted at its end."""
    stride_t, window = VidTokConfig(**options.tokenizer).stride_t, options.model["window"] or DEFAULT_WINDOW
    whole = sorted({*valid_frames(options.context, stride_t)})
    if options.context not in whole:
        raise ValueError(
            f"context={options.context} ends inside a latent frame of tokenizer.stride_t={stride_t}: use {' or '.join(map(str, whole))}"
        )
    longest = 1 + (window - 1) * stride_t
    if options.context + options.future > longest:
        raise ValueError(
            f"context={options.context} and future={options.future} exceed the {longest} frames of model.window={window}: "
            "lower one of them, or give a larger model.window"
        )
    _held_out_episodes(options)


def _held_out_episodes(options: DemoOptions) -> list[Episode]:
    """Give the validation episodes that are long enough to show. Raises ValueError where there is none."""
    length = options.context + options.future
    episodes = [episode for episode in build_episodes(options.data).split("validation") if len(episode.frames) >= length]
    if not episodes:
        raise ValueError(
            f"no held-out episode has the {length} frames of context={options.context} and future={options.future}: "
            "hold more or longer ones out, or lower these"
        )
    return episodes


def predict_held_out(options: DemoOptions) -> HeldOutReport:
    """Predict clips of the validation episodes, spread evenly, greedily."""
    predictor = Predictor.from_pretrained(options.gpt_training.run_dir)
    length = options.context + options.future
    video, actions = held_out_clips(options, predictor.history_frames, predictor.card.stride_t)
    history = video.shape[2] - length
    return evaluate_pixels(predictor, video, options.context, actions if predictor.layout.num_actions else None, history=history)


def held_out_clips(options: DemoOptions, history: int, stride_t: int) -> tuple[Tensor, Tensor]:
    """Give clips (B, 3, history + context + future, H, W) and the actions (B, context + future).

    history: as many frames as asked for, in whole steps of time, or as the shortest episode has.
    """
    episodes = _held_out_episodes(options)
    length = options.context + options.future
    room = min(len(episode.frames) for episode in episodes) - length
    history = min(history, room // stride_t * stride_t)
    per_episode = -(-options.pixel_clips // len(episodes))
    videos, actions = [], []
    for episode in episodes:
        for start in np.linspace(history, len(episode.frames) - length, per_episode).round().astype(int):
            videos.append(to_video(episode.frames[start - history : start + length]))
            taken = np.zeros(length, np.int64) if episode.actions is None else episode.actions[start : start + length]
            actions.append(torch.as_tensor(np.array(taken)))
    return torch.stack(videos[: options.pixel_clips]), torch.stack(actions[: options.pixel_clips])


def _write_example(run_dir: Path, options: DemoOptions, pixels: HeldOutReport) -> None:
    """Write one clip as a film strip, and as a video to try vidgpt-predict on."""
    middle = len(pixels.real) // 2
    real, predicted = to_frames(pixels.real[middle]), to_frames(pixels.predicted[middle])
    write_png(run_dir / "prediction.png", strip_image({"real": real, "predicted": predicted}, options.context))
    # Lossless: compression moves the ids of small pictures, and a model that never saw such ids predicts them badly.
    write_video(run_dir / "held_out.mp4", real, Card.load(options.encoding.output).fps, is_lossless=True)


def summary_lines(tokens: TokenReport, pixels: HeldOutReport) -> list[str]:
    """Give the figures a person wants to see first."""
    future = len(pixels.psnr_db["prediction"])
    first = min(4, future)
    lines = [
        "",
        "held out, free-running greedy prediction, PSNR in dB by horizon:",
        "  horizon            " + "".join(f"{horizon:7d}" for horizon in range(1, future + 1)),
    ]
    for name, curve in pixels.psnr_db.items():
        lines.append(f"  {name.replace('_', ' '):18s} " + "".join(f"{value:7.2f}" for value in curve))
    lines.append(f"  gain over copy-last-frame, mean of horizons {first} to {future}: {pixels.gain_db(first, future):+.2f} dB")
    lines += headline(tokens)
    return lines


def _durations(starts: Mapping[str, float]) -> dict[str, float]:
    marks = [*starts.values(), time.monotonic()]
    return {title: after - before for title, before, after in zip(starts, marks, marks[1:], strict=False)}
