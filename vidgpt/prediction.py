"""Predict the next frames of one video file and write everything that shows what was done.

prediction.mp4 is the given frames as they came, then the predicted ones, of which frames/ has one file each; of several samples, it and
frames/ are of the first, prediction_01.mp4 ... of the others. strip.png is, above, what came and, as far as the input has it, what
followed; below, the given frames as the tokenizer gives them back, which is all that the model knows of them, and what it predicts.

Frames are written as they are drawn, into a folder unfinished-* of the output's, and have their names once all are there: what ends
earlier leaves a former prediction as it was, and nothing of its own, or no more than that folder where it was killed. Memory grows by
a future's tokens alone, where the tokenizer decodes in pieces.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import LongOptions, RolloutKeys, check_guidance, unlike_training
from vidgpt.decoding.work import Work
from vidgpt.inputs import Context, read_actions, read_context
from vidgpt.options import PredictOptions, changed_keys
from vidgpt.report import strip_image
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.folders import OutputFolder
from vidtok.run.processes import DTYPES
from vidtok.tokenizer import check_decoder
from vidtok.video import open_video, to_frames, write_png

RECORD_FILE = "prediction.json"
# What a record may name: it is read from disk, and what it names is deleted.
_OURS = re.compile(r"frames/frame_\d{4,}\.png|prediction(_\d{2,})?\.mp4|strip\.png|tokens\.safetensors|prediction\.json")
SHOWN_FRAMES = 120  # of a future, in strip.png
PROGRESS_SECONDS = 30  # between the lines that tell how far it is, where there is no terminal


def predict_file(options: PredictOptions) -> dict[str, object]:
    """Write prediction.mp4, frames/*.png, tokens.safetensors, prediction.json and strip.png; gives what prediction.json holds.

    Files of a former prediction in that folder are replaced, any other file is left alone. Raises ValueError, before any work where
    it can.
    """
    names = _file_names(options)
    folder = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    folder.check(names, input=options.input)
    predictor, request = _load(options)
    future = min(options.future, SHOWN_FRAMES)
    context = read_context(options.input, predictor.card, options.context, future, options.start, predictor.history_frames)
    print(context.note)
    actions = _actions(options, predictor, context)
    encoded = predictor.encode_after(torch.cat([context.history, context.video], dim=2), context.history.shape[2])
    if options.compile:
        print("compiling the transformer: about a minute on two cores, once a process", flush=True)
    rollout = _Rollout(predictor.latent_frames(options.future))
    request |= {"actions": actions, "work": rollout.work}
    stream = predictor.stream(encoded[1], rollout.total, **request)
    past, tokens = (predictor.samples(part, options.samples) for part in encoded)
    given, latents = torch.cat([past, tokens], dim=1), rollout.tell(rollout.keep(stream))
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix="unfinished-", dir=folder.path) as unfinished:
            place = Path(unfinished)
            frames = predictor.show_stream(given, latents, options.future, context.video.shape[2])
            _write(place, options, predictor.card.fps, context, frames)
            # A part of no tokens is no history, but the start of a video.
            parts = {"history": past, "context": tokens, "future": torch.stack(rollout.frames, dim=1)}
            save_file({name: part.cpu().contiguous() for name, part in parts.items() if part.numel()}, place / names[-1])
            record = folder.replace(names, _record(options, predictor, context, rollout))
            _move(names, place, folder.path)
    except KeyboardInterrupt:
        if len(rollout.frames) < rollout.total:
            print(f"stopped after {len(rollout.frames)} of {rollout.total} latent frames: none of them is kept", flush=True)
        raise
    _say(options, record)
    return record


@dataclass
class _Rollout:
    """What was drawn of `total` latent frames (B, h, w), on the CPU, and what that took; the seconds are of drawing alone."""

    total: int
    work: Work = field(default_factory=Work)
    frames: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def keep(self, stream: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass frames on."""
        while True:
            started = time.perf_counter()
            frame = next(stream, None)
            if frame is None:
                return
            self.frames.append(frame.cpu())  # which also waits for a GPU
            self.seconds += time.perf_counter() - started
            yield frame

    def tell(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass frames on, and tell how far it is: a bar on a terminal, elsewhere a line every now and then."""
        if Console().is_terminal:
            yield from track(latents, description="predicting frames", total=self.total, transient=True)
            return
        started = told = time.monotonic()
        for number, latent in enumerate(latents, start=1):
            yield latent
            now = time.monotonic()
            if now - told >= PROGRESS_SECONDS and number < self.total:
                told, left = now, (now - started) / number * (self.total - number)
                print(f"{number} of {self.total} latent frames, about {left / 60:.1f} minutes to go", flush=True)


def _load(options: PredictOptions) -> tuple[Predictor, RolloutKeys]:
    """Load the checkpoint, and check what can be without the input. Raises ValueError."""
    plan = DecodingOptions.from_keys(options.decoding, options.diagonal, options.speculative)
    long = LongOptions(**asdict(options.long))
    sampling = SamplingOptions(**asdict(options.sampling))
    predictor = Predictor.from_pretrained(
        options.checkpoint,
        allow_torchscript=options.allow_torchscript,
        decoder=options.decoder,
        dtype=DTYPES[options.precision],
        use_compile=options.compile,
    )
    check_decoder(predictor.tokenizer)
    predictor.check_window(options.context, options.future, plan, long)
    check_guidance(predictor.model.config, options.guidance, plan)
    if warning := unlike_training(predictor.model.config, plan):
        print(warning)
    keys = RolloutKeys(options=sampling, decoding=plan, long=long)
    return predictor, keys | {"seed": options.seed, "samples": options.samples, "guidance": options.guidance}


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


def _write(place: Path, options: PredictOptions, fps: float, context: Context, frames: Iterator[Tensor]) -> None:
    """Write films, pictures and the strip of clips (B, 3, n, H, W), the given frames decoded and then the predicted ones, as they come."""
    real, given = to_frames(context.video[0]), context.video.shape[2]
    shown: list[list[np.ndarray]] = [[] for _ in range(options.samples)]
    with ExitStack() as stack:
        films = [
            stack.enter_context(open_video(place / _video_name(sample), (real.shape[1], real.shape[2]), fps))
            for sample in range(options.samples)
        ]
        for film in films:
            film(real)
        # One at a time, whatever the parts that the tokenizer gives.
        each = chain.from_iterable(part.cpu().split(1, dim=2) for part in frames)
        for index, frame in enumerate(each, start=-given):
            pictures = [to_frames(clip) for clip in frame]
            if index < SHOWN_FRAMES:
                for row, picture in zip(shown, pictures, strict=True):
                    row.append(picture)
            if index >= 0:
                for film, picture in zip(films, pictures, strict=True):
                    film(picture)
                write_png(place / _frame_name(index), pictures[0][0])
    truth = [] if context.truth is None else [to_frames(context.truth[0])]
    names = ["predicted"] if options.samples == 1 else [f"sample {sample}" for sample in range(options.samples)]
    rows = dict(zip(names, map(np.concatenate, shown), strict=True))
    write_png(place / "strip.png", strip_image({"real": np.concatenate([real, *truth]), **rows}, given))


def _move(names: Sequence[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        (source / name).replace(target / name)


def _record(options: PredictOptions, predictor: Predictor, context: Context, rollout: _Rollout) -> dict[str, object]:
    """Give prediction.json.

    decoding_seconds: of drawing tokens, what compiling takes included. frames_per_second: frames of video of all samples, by that time.
    forward_passes_per_frame: as in bench.json, a latent frame of all samples together, the prefills left out.
    """
    work, seconds = rollout.work, rollout.seconds
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
        "latent_frames": work.frames,
        "forward_passes_per_frame": (work.forward_passes - work.prefills) / work.frames,
        "prefills": work.prefills,
        "drafts_accepted_fraction": work.accepted / work.drafted if work.drafted else None,
        "torch_version": torch.__version__,
    }


def _say(options: PredictOptions, record: dict[str, object]) -> None:
    """Print how it was decoded, in the figures of the record, and where it is."""
    sampling, groups = options.sampling, {name: getattr(options, name) for name in ("diagonal", "speculative", "sampling")}
    others = [key for name, keys in groups.items() for key in changed_keys(name, keys) if ".temperature=" not in key]
    drawn = f"temperature {sampling.temperature:g}, seed {options.seed}"
    how = ", ".join([f"decoding={options.decoding}", *others, "greedy" if sampling.temperature == 0 else drawn])
    speed = f"{record['forward_passes_per_frame']:.1f} forward passes a latent frame, {record['frames_per_second']:.1f} frames/s"
    print(f"{how}: {speed}" + (", compiling included" if options.compile else ""))
    output, cut = Path(options.output), f" (its first {SHOWN_FRAMES} frames)" if options.future > SHOWN_FRAMES else ""
    print(
        f"{options.future} frames x {options.samples} in {record['decoding_seconds']:.1f} s; see {output / 'strip.png'}{cut} and "
        f"{output / 'prediction.mp4'}"
    )
