"""Predict the next frames of one video file and write everything that shows what was done."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from vidgpt.inputs import Context, read_actions, read_context
from vidgpt.options import PredictOptions
from vidgpt.report import strip_image
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.video import to_frames, write_png, write_video


def predict_file(options: PredictOptions) -> dict[str, object]:
    """Write prediction.mp4, frames/*.png, tokens.safetensors, prediction.json and strip.png; gives what prediction.json holds.

    Of several samples, prediction.mp4 and frames/ are of the first, prediction_01.mp4 ... of the others. Raises ValueError.
    """
    if options.samples < 1:
        raise ValueError(f"samples={options.samples}: give 1 or more")
    sampling = SamplingOptions(**asdict(options.sampling))
    predictor = Predictor.from_pretrained(options.checkpoint)
    context = read_context(options.input, predictor.card, options.context, options.future, options.start)
    print(context.note)
    actions = _actions(options, predictor, context)
    tokens = predictor.samples(predictor.encode(context.video), options.samples)
    started = time.monotonic()
    stream = predictor.stream(tokens, predictor.latent_frames(options.future), options.seed, sampling, options.decoding, actions)
    steps = predictor.latent_frames(options.future)
    future = torch.stack(list(track(stream, description="predicting frames", total=steps, transient=True)), dim=1)
    seconds = time.monotonic() - started
    given = context.video.shape[2]
    video = predictor.decode(torch.cat([tokens, future], dim=1)).cpu()[:, :, : given + options.future]
    output = Path(options.output)
    _write(output, options, predictor, context, video, tokens, future)
    record = _record(options, predictor, context, seconds)
    (output / "prediction.json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{options.future} frames x {options.samples} in {seconds:.1f} s; see {output / 'strip.png'} and {output / 'prediction.mp4'}"
    )
    return record


def _actions(options: PredictOptions, predictor: Predictor, context: Context) -> Tensor | None:
    if not predictor.layout.num_actions:
        if options.actions is not None:
            raise ValueError("actions= was given, but this model was trained without actions: leave it away")
        return None
    if options.actions is None:
        raise ValueError("this model was trained with actions: give actions=FILE, one whole number a frame, context and future")
    actions = read_actions(options.actions, predictor.layout.num_actions)
    needed = predictor.latent_frames(context.video.shape[2] - 1) + 1 + predictor.latent_frames(options.future)
    if actions.shape[1] != needed:
        raise ValueError(f"actions {options.actions} has {actions.shape[1]} entries, context and future need {needed}")
    return actions.expand(options.samples, -1)


def _write(
    output: Path, options: PredictOptions, predictor: Predictor, context: Context, video: Tensor, tokens: Tensor, future: Tensor
) -> None:
    given, fps = context.video.shape[2], predictor.card.fps
    frames_folder = output / "frames"
    frames_folder.mkdir(parents=True, exist_ok=True)
    for old in [*frames_folder.glob("*.png"), *output.glob("prediction*.mp4")]:
        # A shorter prediction into the same folder must not leave frames of a longer one.
        old.unlink()
    real = to_frames(context.video[0])
    rows = {}
    for sample in range(options.samples):
        predicted = to_frames(video[sample, :, given:])
        name = "prediction.mp4" if sample == 0 else f"prediction_{sample:02d}.mp4"
        write_video(output / name, np.concatenate([real, predicted]), fps)
        rows["predicted" if options.samples == 1 else f"sample {sample}"] = np.concatenate([real, predicted])
    for index, frame in enumerate(to_frames(video[0, :, given:])):
        write_png(frames_folder / f"frame_{index:04d}.png", frame)
    if context.truth is not None:
        rows = {"real": np.concatenate([real, to_frames(context.truth[0])]), **rows}
    write_png(output / "strip.png", strip_image(rows, given))
    save_file({"context": tokens.cpu().contiguous(), "future": future.cpu().contiguous()}, output / "tokens.safetensors")


def _record(options: PredictOptions, predictor: Predictor, context: Context, seconds: float) -> dict[str, object]:
    future = predictor.latent_frames(options.future)
    return {
        **asdict(options),
        "context_frames_used": context.video.shape[2],
        "context_first_frame": context.first_frame,
        "input_note": context.note,
        "fps": predictor.card.fps,
        "tokenizer_fingerprint": predictor.card.tokenizer_fingerprint,
        "decoding_seconds": round(seconds, 3),
        "frames_per_second": round(options.future * options.samples / max(seconds, 1e-9), 3),
        "forward_passes_per_frame": future * predictor.layout.cells / options.future,
        "torch_version": torch.__version__,
    }
