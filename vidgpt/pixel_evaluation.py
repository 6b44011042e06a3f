"""Free-running rollouts as pixels: decode them, and compare with what did happen, beside the rows that need no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from vidgpt.clip_frames import RECONSTRUCTION, ClipFrames
from vidgpt.clip_sums import Bootstrap, ClipPlace
from vidgpt.options import EvaluateOptions
from vidgpt.pixel_report import CEILING, MODEL, PixelReport, join_samples
from vidgpt.rollout import Predictor
from vidtok.perceptual import Lpips, load_lpips
from vidtok.tokens import TokenDataset
from vidtok.video_metrics.detectors import Detector, FrechetMeter, RandomConvDetector, TorchScriptDetector, try_detector
from vidtok.video_metrics.predictors import baseline_rows
from vidtok.video_metrics.table import FLOOR, PixelTable
from vidtok.video_metrics.vmaf import MODEL as VMAF_MODEL
from vidtok.video_metrics.vmaf import check_vmaf

CLIPS_AT_ONCE = 8


class PixelTools:
    """What pixels are measured with, loaded before the long work begins. Raises ValueError or FileNotFoundError for a wrong file."""

    def __init__(self, options: EvaluateOptions, height: int, width: int) -> None:
        self.lpips: Lpips | None = None
        if options.lpips_weights is not None:
            self.lpips = load_lpips(options.lpips_weights, options.lpips_heads, options.lpips_sha256)
            least = self.lpips.backbone.least_side
            if min(height, width) < least:
                raise ValueError(
                    f"LPIPS of {self.lpips.name} needs frames of {least}x{least} pixels or more, these are {height}x{width}: leave "
                    "lpips_weights away"
                )
            _try_lpips(self.lpips, height, width)
        self.fvd: TorchScriptDetector | None = None
        if options.fvd_detector is not None:
            self.fvd = TorchScriptDetector(options.fvd_detector, options.fvd_sha256 or "")
        self.is_vmaf, self.is_flow = options.vmaf, options.optical_flow
        if self.is_vmaf:
            check_vmaf(height, width)

    def distances(self, frames: int, fps: float) -> list[FrechetMeter]:
        """Give the meters of futures of so many frames. Raises ValueError where the detector that was asked for needs longer ones."""
        if self.fvd is not None and frames < self.fvd.least_frames:
            raise ValueError(
                f"futures have {frames} frames, {self.fvd.name} needs {self.fvd.least_frames}: lower context, or leave fvd_detector away"
            )
        proxy = RandomConvDetector()
        detectors: list[Detector] = [
            *([proxy] if frames >= proxy.least_frames else []),
            *([self.fvd] if self.fvd is not None else []),
        ]
        return [FrechetMeter(detector, fps, is_context_included=False) for detector in detectors]

    def check(self, frames: int, clips: int) -> None:
        """Run the detectors on two clips of so many frames, and say where there are no more clips than features.

        Raises ValueError where one fails, and where there are too few clips for any distance.
        """
        meters = self.distances(frames, 0.0)
        if self.fvd is not None and clips < 2:
            raise ValueError(
                f"fvd_detector compares 2 clips or more, and there is {clips}: give rollout_clips=2 or more, which the split must have, or "
                "leave fvd_detector away"
            )
        features = {meter.detector.figure: try_detector(meter.detector, frames) for meter in meters}
        few = [f"{figure} ({count} features)" for figure, count in features.items() if clips <= count]
        if few and clips > 1:
            print(
                f"{' and '.join(few)} of {clips} clips: a covariance of no more clips than features is singular, so the figure is biased "
                "upwards and comparable only at the same numbers of clips, which its protocol card names",
                flush=True,
            )


def _try_lpips(lpips: Lpips, height: int, width: int) -> None:
    """Raise ValueError unless two images of noise have a distance."""
    noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = float(lpips(noise[:1], noise[1:]))
    if not 0 < found < math.inf:
        raise ValueError(
            f"LPIPS of lpips_weights finds {found} between two images of noise: its files are damaged, get them again or leave them away"
        )


def evaluate_futures(
    frames: ClipFrames,
    places: Sequence[int],
    futures: Tensor,
    options: EvaluateOptions,
    tools: PixelTools,
    progress: Callable[[int], None] | None = None,
) -> PixelReport:
    """Decode the futures (N, clips, t, h, w) of the windows `places` and compare them. progress: called with the clips done so far."""
    future = futures.shape[2] * frames.card.stride_t
    table, distances = PixelTable(tools.lpips, tools.is_vmaf, tools.is_flow), tools.distances(future, frames.card.fps)
    for first in range(0, len(places), CLIPS_AT_ONCE):
        chosen = range(first, min(first + CLIPS_AT_ONCE, len(places)))
        parts = [_forecasts(frames, places[clip], futures[:, clip], options.context) for clip in chosen]
        # Of the given frames only the last two count, and how many there are depends on where a row begins.
        given, real = (torch.stack([part[name] for part in parts]) for name in ("given", "real"))
        rows = {
            MODEL: torch.stack([part[MODEL] for part in parts], dim=1),
            **baseline_rows(given, future),
            CEILING: torch.stack([part[CEILING] for part in parts]),
        }
        if len(rows[MODEL]) == 1:
            rows[MODEL] = rows[MODEL][0]
        table.update(rows, real, given[:, :, -1])
        for meter in distances:
            meter.add_real(real)
            for name, video in rows.items():
                meter.add_generated(join_samples(video) if video.ndim == 6 else video, name)
        if progress is not None:
            progress(chosen.stop)
    protocol = _protocol(frames, len(places), futures, options, tools)
    cut_from = [ClipPlace.of(frames.clips, at) for at in places]
    return PixelReport(table, distances, protocol, Bootstrap(options.resamples, options.seed), cut_from)


def show_futures(
    frames: ClipFrames, places: Sequence[int], futures: Tensor, context: int, clips: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Decode some clips once more, for their pictures; gives videos (C, T, H, W): real, predicted (of the first sample), ceiling.

    The given frames stand before the predicted ones, as many as every one of the clips has.
    """
    found = [_decoded(frames, places[clip], futures[:1, clip], context) for clip in clips]
    shortest = min((clip["real"].shape[1] for clip in found), default=0)
    for clip in found:
        yield {name: (video[0] if video.ndim == 5 else video)[:, -shortest:] for name, video in clip.items()}


def _decoded(frames: ClipFrames, place: int, futures: Tensor, context: int) -> dict[str, Tensor]:
    """Give the whole clip: real and ceiling (C, T, H, W), predicted (N, C, T, H, W) with the real frames that were given."""
    ids = frames.clips[place]["indices"][None]
    ceiling = frames.decode(place, ids)[0]
    source = frames.real(place)
    real = ceiling if source is None else source
    future = futures.shape[1] * frames.card.stride_t
    drawn = torch.cat([frames.decode(place, torch.cat([ids[:, :context], future_ids[None]], dim=1)) for future_ids in futures])
    given = real[None, :, :-future].expand(len(futures), -1, -1, -1, -1)
    return {"real": real, "predicted": torch.cat([given, drawn[:, :, -future:]], dim=2), CEILING: ceiling}


def _forecasts(frames: ClipFrames, place: int, futures: Tensor, context: int) -> dict[str, Tensor]:
    """Give what is compared of one clip: the future frames, and the last given ones, at most two."""
    clip, future = _decoded(frames, place, futures, context), futures.shape[1] * frames.card.stride_t
    given = clip["real"][:, :-future]
    least = 2 if context > 1 or frames.card.first_frames > 1 else 1
    return {
        "given": given[:, -least:],
        "real": clip["real"][:, -future:],
        MODEL: clip["predicted"][:, :, -future:],
        CEILING: clip[CEILING][:, -future:],
    }


def _protocol(frames: ClipFrames, clips: int, futures: Tensor, options: EvaluateOptions, tools: PixelTools) -> dict[str, Any]:
    """Say how the figures were taken, so that nobody compares them with others by accident."""
    card = frames.card
    return {
        "reference": frames.reference,
        "reference_means": (
            "future frames are compared with what the tokenizer makes of the real tokens, so its ceiling is perfect"
            if frames.reference == RECONSTRUCTION
            else "future frames are compared with those of the source videos; the ceiling is the tokenizer's reconstruction of them"
        ),
        "averaged_over": "each future frame, then the frames of a clip, then clips; given frames never count",
        "samples_are": "mean_of_N and best_of_N apart, the best chosen by each figure's mean over a clip",
        "clips_count": clips,
        "samples_count": len(futures),
        "context_latent_frames_count": options.context,
        "future_frames_count": futures.shape[2] * card.stride_t,
        "frames_per_second": card.fps,
        "frame_height_pixels": card.frame_height,
        "frame_width_pixels": card.frame_width,
        "past_latent_frames_before_decoded_clips_count": frames.past,
        "colours": "RGB in [0, 1], not rounded, decoded from tokens and never from a video file",
        "motion_estimator": "lucas_kanade, of all clips" if tools.is_flow else None,
        "clips_ranked_by": "psnr_db of the model, mean over future frames",
        "sampling": asdict(options.sampling),
        "seed": options.seed,
        # Only there does the decoder, which may be sharpened apart from its tokens, decide what is compared with.
        "reference_tokenizer_fingerprint": frames.predictor.tokenizer.fingerprint()
        if frames.reference == RECONSTRUCTION
        else None,
        "lpips": None if tools.lpips is None else _lpips_card(tools.lpips),
        "vmaf": VMAF_MODEL if tools.is_vmaf else None,
    }


def _lpips_card(lpips: Lpips) -> dict[str, str]:
    return {"network": lpips.name, "weights_sha256": lpips.checksum, "heads_sha256": lpips.heads_checksum}


@dataclass(frozen=True)
class ShownFuture:
    """A clip for the report: videos (C, T, H, W) and ids (t, h, w), of which the first `context` are given."""

    title: str
    videos: Mapping[str, Tensor]  # real, predicted, tokenizer_ceiling
    real: Tensor
    predicted: Tensor
    context: int
    future_frames: int


class PixelStage:
    """The part of an evaluation that looks at frames. Made before any work, so that wrong data or a wrong file is refused at once."""

    def __init__(self, options: EvaluateOptions, clips: TokenDataset, places: Sequence[int]) -> None:
        predictor = Predictor.from_pretrained(options.checkpoint, allow_torchscript=options.allow_torchscript)
        card = clips.card
        self.options, self.places = options, places
        self.tools = PixelTools(options, card.frame_height, card.frame_width)
        self.tools.check((clips.window - options.context) * card.stride_t, len(places))
        self.frames = ClipFrames(clips, predictor, options.data)

    def measure(self, futures: Tensor) -> PixelReport:
        """Compare the futures (N, clips, t, h, w)."""
        with Progress(transient=True) as progress:
            task = progress.add_task("comparing frames", total=len(self.places))
            return evaluate_futures(
                self.frames, self.places, futures, self.options, self.tools, lambda done: progress.update(task, completed=done)
            )

    def shown(self, report: PixelReport, futures: Tensor) -> list[ShownFuture]:
        """Give the worst clips and the best, of each as many, or one more of the worst."""
        order, count = report.worst_first(), min(self.options.shown_clips, len(self.places))
        worst = order[: count - count // 2]
        best = order[::-1][: count // 2]
        named = [
            (f"{kind} {place}", clip) for kind, clips in (("worst", worst), ("best", best)) for place, clip in enumerate(clips, 1)
        ]
        context, future = self.options.context, futures.shape[2] * self.frames.card.stride_t
        videos = show_futures(self.frames, self.places, futures, context, [clip for _, clip in named])
        found = []
        for (name, clip), video in zip(named, videos, strict=True):
            real = self.frames.clips[self.places[clip]]["indices"]
            means = [report.clip_mean(row, clip) for row in (MODEL, FLOOR)]
            title = (
                f"{name} of {len(order)} clips: {self.frames.describe(self.places[clip])}, PSNR {means[0]:.1f} dB "
                f"(copying the last frame {means[1]:.1f})"
            )
            predicted = torch.cat([real[:context], futures[0, clip]])
            found.append(ShownFuture(title, video, real, predicted, context, future))
        return found
