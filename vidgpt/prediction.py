"""Predict the next frames of one video file and write everything that shows what was done."""

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import LongOptions, check_guidance
from vidgpt.decoding.work import Work
from vidgpt.fused import DTYPES
from vidgpt.inputs import Context, read_actions, read_context
from vidgpt.options import PredictOptions
from vidgpt.report import strip_image
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.folders import OutputFolder
from vidtok.tokenizer import check_decoder
from vidtok.video import to_frames, write_png, write_video

RECORD_FILE = "prediction.json"
# What a record may name: it is read from disk, and what it names is deleted.
_OURS = re.compile(r"frames/frame_\d{4,}\.png|prediction(_\d{2,})?\.mp4|strip\.png|tokens\.safetensors|prediction\.json")


def predict_file(options: PredictOptions) -> dict[str, object]:
    """Write prediction.mp4, frames/*.png, tokens.safetensors, prediction.json and strip.png; gives what prediction.json holds.

    Of several samples, prediction.mp4 and frames/ are of the first, prediction_01.mp4 ... of the others. Files of a former
    prediction in that folder are replaced, any other file is left alone. Raises ValueError, before any work where it can.
    """
    folder = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    folder.check(_file_names(options), input=options.input)
    predictor, request = _load(options)
    context = read_context(
        options.input, predictor.card, options.context, options.future, options.start, predictor.history_frames
    )
    print(context.note)
    actions = _actions(options, predictor, context)
    encoded = predictor.encode_after(torch.cat([context.history, context.video], dim=2), context.history.shape[2])
    steps, work, started = predictor.latent_frames(options.future), Work(), time.monotonic()
    stream = predictor.stream(encoded[1], steps, options.seed, actions=actions, samples=options.samples, work=work, **request)
    future = torch.stack(list(track(stream, description="predicting frames", total=steps, transient=True)), dim=1)
    seconds = time.monotonic() - started
    past, tokens = (predictor.samples(part, options.samples) for part in encoded)
    video = predictor.show(torch.cat([past, tokens], dim=1), future, options.future).cpu()
    record = folder.replace(_file_names(options), _record(options, predictor, context, seconds, work))
    output = folder.path
    _write(output, options, predictor.card.fps, context, video)
    # A part of no tokens is no history, but the start of a video.
    parts = {"history": past, "context": tokens, "future": future}
    save_file({name: part.cpu().contiguous() for name, part in parts.items() if part.numel()}, output / "tokens.safetensors")
    print(
        f"{options.future} frames x {options.samples} in {seconds:.1f} s; see {output / 'strip.png'} and {output / 'prediction.mp4'}"
    )
    return record


class _Request(TypedDict):
    """How to decode; see Predictor.stream."""

    options: SamplingOptions
    decoding: DecodingOptions
    long: LongOptions
    guidance: float


def _load(options: PredictOptions) -> tuple[Predictor, _Request]:
    """Load the checkpoint, and check what can be without the input. Raises ValueError."""
    request = _Request(
        options=SamplingOptions(**asdict(options.sampling)),
        decoding=DecodingOptions.from_keys(options.decoding, options.diagonal, options.speculative),
        long=LongOptions(**asdict(options.long)),
        guidance=options.guidance,
    )
    predictor = Predictor.from_pretrained(
        options.checkpoint,
        allow_torchscript=options.allow_torchscript,
        decoder=options.decoder,
        dtype=DTYPES[options.precision],
        use_compile=options.compile,
    )
    check_decoder(predictor.tokenizer)
    predictor.check_window(options.context, options.future, request["decoding"], request["long"])
    check_guidance(predictor.layout, options.guidance, request["decoding"])
    return predictor, request


def _file_names(options: PredictOptions) -> list[str]:
    """Name every file of a prediction but its record, relative to its folder."""
    videos = [_video_name(sample) for sample in range(options.samples)]
    return [*videos, *map(_frame_name, range(options.future)), "strip.png", "tokens.safetensors"]


def _video_name(sample: int) -> str:
    return "prediction.mp4" if sample == 0 else f"prediction_{sample:02d}.mp4"


def _frame_name(index: int) -> str:
    return f"frames/frame_{index:04d}.png"


def _actions(options: PredictOptions, predictor: Predictor, context: Context) -> Tensor | None:
    if not predictor.layout.num_actions:
        if options.actions is not None:
            raise ValueError("actions= was given, but this model was trained without actions: leave it away")
        return None
    if options.actions is None:
        raise ValueError(
            "this model was trained with actions: give actions=FILE, one whole number a latent frame, context and future"
        )
    actions = read_actions(options.actions, predictor.layout.num_actions)
    needed = predictor.card.latent_frames_in(context.video.shape[2]) + predictor.latent_frames(options.future)
    if actions.shape[1] != needed:
        raise ValueError(
            f"actions {options.actions} has {actions.shape[1]} entries, context and future need {needed}: give one a latent frame"
        )
    return actions


def _write(output: Path, options: PredictOptions, fps: float, context: Context, video: Tensor) -> None:
    given = context.video.shape[2]
    real = to_frames(context.video[0])
    rows = {}
    for sample in range(options.samples):
        predicted = to_frames(video[sample])
        write_video(output / _video_name(sample), np.concatenate([real, predicted]), fps)
        rows["predicted" if options.samples == 1 else f"sample {sample}"] = np.concatenate([real, predicted])
    for index, frame in enumerate(to_frames(video[0])):
        write_png(output / _frame_name(index), frame)
    if context.truth is not None:
        rows = {"real": np.concatenate([real, to_frames(context.truth[0])]), **rows}
    write_png(output / "strip.png", strip_image(rows, given))


def _record(options: PredictOptions, predictor: Predictor, context: Context, seconds: float, work: Work) -> dict[str, object]:
    return {
        **asdict(options),
        "context_frames_used": context.video.shape[2],
        "context_first_frame": context.first_frame,
        "history_frames": context.history.shape[2],
        "input_note": context.note,
        "fps": predictor.card.fps,
        "tokenizer_fingerprint": predictor.card.tokenizer_fingerprint,
        "decoding_seconds": round(seconds, 3),
        "frames_per_second": round(options.future * options.samples / max(seconds, 1e-9), 3),
        "forward_passes_per_frame": (work.forward_passes - work.prefills) / options.future,
        "prefills": work.prefills,
        "drafts_accepted_fraction": work.accepted / work.drafted if work.drafted else None,
        "torch_version": torch.__version__,
    }
