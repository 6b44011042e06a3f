"""Frames without end: a decoding plan, driven over the borders of the window."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgpt.config import VidGPTConfig
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.masks import causal, diagonal_passes
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions

MODES = ("stop", "reprefill", "window")


@dataclass(frozen=True)
class LongOptions:
    """What to do when a future exceeds the model's window.

    mode: stop refuses; reprefill drops the oldest `drop` frames of a full window and reads the others anew, as the start of a clip,
    which is what training shows; window lets a model with attention_frames go on with the frames it sees. drop: 0 is half the window.
    """

    mode: str = "stop"
    drop: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError on another mode."""
        if self.mode not in MODES:
            raise ValueError(f"long.mode={self.mode!r} is not one of {', '.join(MODES)}: choose one of these")
        if self.drop < 0:
            raise ValueError(f"long.drop={self.drop} frames: give 1 or more, or 0 for half the window")


class RolloutKeys(TypedDict, total=False):
    """The keywords of stream_tokens, for those who pass them on."""

    seed: int
    options: SamplingOptions | None
    decoding: str | DecodingOptions
    actions: Tensor | Sequence[Tensor] | None
    first_sequence: int
    samples: int
    long: LongOptions | None
    guidance: float
    work: Work | None


def stream_tokens(
    model: VidGPTForCausalLM | FusedModel,
    context: Tensor | Sequence[Tensor],
    future: int,
    *,
    seed: int = 0,
    options: SamplingOptions | None = None,
    decoding: str | DecodingOptions = "raster",
    actions: Tensor | Sequence[Tensor] | None = None,
    first_sequence: int = 0,
    samples: int = 1,
    long: LongOptions | None = None,
    guidance: float = 1.0,
    work: Work | None = None,
) -> Iterator[Tensor]:
    """Yield `future` latent frames (B * samples, h, w) after the indices `context`, each as it is ready; greedy by default.

    context: (B, t, h, w), or B clips (t, h, w) of different lengths; each row is what it would be alone. samples: futures of each row,
    row-major; row i of all draws with the noise of (seed, first_sequence + i). actions: (B, t + future), or one (t + future,) a clip,
    exactly where the model was trained with actions. guidance: with actions, how far to go from the logits of a model that does not
    know them to those of one that does (arXiv:2207.12598); 1 is off. Raises ValueError before any work: past the window (see
    LongOptions), for an unknown plan, wrong actions, guidance without actions.
    """
    plan = DecodingOptions.of(decoding)
    fused = model if isinstance(model, FusedModel) else FusedModel(model)
    long = long or LongOptions()
    clips = list(context)
    lengths = [len(clip) for clip in clips]
    check_future(fused.config, lengths, future, plan, long)
    check_guidance(fused.config, guidance, plan)
    if plan.plan == "transformers" and (fused.is_compiled or fused.dtype != fused.source.dtype):
        raise ValueError(
            "decoding=transformers runs the model as the library does, and knows no compile=true and no other precision: leave them "
            "away, or use decoding=raster"
        )
    if samples < 1:
        raise ValueError(f"samples={samples}: give 1 or more")
    prompt, starts, leads = _prompt(fused, clips, future, None if actions is None else list(actions))
    used = work or Work()

    def sampler(copies: int) -> Sampler:
        keys = sequence_keys(seed, len(clips) * copies, fused.device, first=first_sequence)
        first_frames = torch.tensor(lengths, device=fused.device).repeat_interleave(copies)[:, None]
        return Sampler(fused.layout, options or SamplingOptions(temperature=0.0), keys, first_frames=first_frames)

    frames = _capacity(fused, max(lengths), future, plan, long)
    reader = Reader(fused, sampler(1), used, len(clips), frames, guidance, plan.rule(fused.layout))
    return without_gradients(_frames(reader, prompt, starts, leads, samples, sampler(samples), plan, long))


def without_gradients(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pass on what is made without gradients; what the caller does in between keeps its own mode.

    Not torch.no_grad's decorator: a generator of its making needs torch when it is closed, and one that is still alive when the
    interpreter ends finds none.
    """
    while True:
        with torch.no_grad():
            frame = next(frames, None)
        if frame is None:
            return
        yield frame


def _frames(
    reader: Reader,
    prompt: Tensor,
    starts: Tensor | None,
    leads: Tensor,
    samples: int,
    sampler: Sampler,
    plan: DecodingOptions,
    long: LongOptions,
) -> Iterator[Tensor]:
    reader.prefill(prompt, starts)
    if samples > 1:
        reader.repeat(samples, sampler)
        leads = leads.repeat_interleave(samples, dim=0)
    reader.work.cache_bytes = reader.cache.num_bytes
    while leads.shape[1]:
        room = leads.shape[1] if long.mode == "window" else reader.model.config.window - reader.frames
        if not room:
            _reprefill(reader, long.drop or -(-reader.model.config.window // 2))
            continue
        for frame in plan.frames(reader, leads[:, :room]):
            # A copy: what a caller does to a frame must not reach those to come.
            yield reader.layout.frame(frame.clone())
        leads = leads[:, room:]


def _reprefill(reader: Reader, drop: int) -> None:
    """Read the newest frames anew: rows with a full window lose their oldest `drop`, others none."""
    layout, size = reader.layout, reader.layout.tokens_per_frame
    starts = reader.starts if reader.starts is not None else torch.zeros(reader.batch, dtype=torch.long, device=reader.device)
    is_full = reader.length - starts >= reader.model.config.window * size
    starts = starts + is_full * drop * size
    first = int(starts.min())
    tokens, moved = reader.tokens[:, first : reader.length].clone(), starts - first
    # As at the start of any clip, no action and no frame comes before.
    tokens.scatter_(1, moved[:, None], layout.bos_id)
    before = reader.drawn_before + (is_full * drop * size)[:, None]
    reader.prefill(tokens, moved if bool(moved.any()) else None, before)


def _prompt(
    model: FusedModel, clips: list[Tensor], future: int, actions: list[Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Give input_ids (B, L), rows aligned at their ends, where each begins, and the leads (B, future) to come."""
    layout, device = model.layout, model.device
    if actions is not None and len(actions) != len(clips):
        raise ValueError(f"actions of {len(actions)} clips came for {len(clips)} clips: give one row of actions a clip")
    rows = [None] * len(clips) if actions is None else [row[None] for row in actions]
    leads = [layout.leads(len(clip) + future, 1, row) for clip, row in zip(clips, rows, strict=True)]
    flat = [
        layout.flatten(clip[None].to(device), None if row is None else row[:, : len(clip)])
        for clip, row in zip(clips, rows, strict=True)
    ]
    longest = max(len(ids[0]) for ids in flat)
    starts = torch.tensor([longest - len(ids[0]) for ids in flat], device=device)
    prompt = torch.cat([F.pad(ids, (longest - len(ids[0]), 0)) for ids in flat])
    return prompt, starts if bool(starts.any()) else None, torch.cat([row[:, -future:] for row in leads]).to(device)


def _capacity(model: FusedModel, context: int, future: int, plan: DecodingOptions, long: LongOptions) -> int:
    """Give the frames that the cache must hold."""
    config = model.config
    # Frames that are under way at once, and the slots of stand-ins behind them.
    begun = 2 + -(-model.layout.slots_per_frame // plan.delay) if plan.delay else 2
    needed = context + future + 1
    if long.mode == "window":
        return max(context + 1, min(needed, config.sink_frames + config.attention_frames + begun + 1))
    return min(needed, config.window + 1)


def check_future(
    config: VidGPTConfig, lengths: Sequence[int], future: int, plan: DecodingOptions, long: LongOptions, window: int | None = None
) -> None:
    """Raise ValueError when contexts of `lengths` and a future are not what the model can do.

    In latent frames, or all three in the unit of `window`.
    """
    longest, window = max(lengths, default=0), window or config.window
    if min(lengths, default=0) < 1 or future < 1:
        raise ValueError(f"context of {min(lengths, default=0)} and future of {future} frames: both must be 1 or more")
    if plan.plan == "transformers" and TokenLayout.from_config(config).is_parallel:
        raise ValueError("decoding=transformers draws one id a place, this model predicts several digits at once: use raster")
    if plan.plan == "speculative" and plan.draft == "head" and not config.draft_head:
        raise ValueError(
            "speculative.draft=head needs a model with a draft head: train one with init_from=DIR train_only=draft_head, or use "
            "speculative.draft=own"
        )
    if config.sink_frames and len(set(lengths)) > 1:
        raise ValueError("clips of different lengths and sink_frames exclude each other: give clips of one length")
    if long.mode == "window":
        if not config.attention_frames:
            raise ValueError(
                "long.mode=window needs a model that sees the newest frames alone: train with model.attention_frames=N, or use "
                "long.mode=reprefill"
            )
        return
    if longest + future > window and long.mode == "stop":
        raise ValueError(
            f"context of {longest} and future of {future} frames exceed the window of {window} frames this model was trained "
            f"with: use context + future <= {window}, long.mode=reprefill, or train with a larger model.window"
        )
    if longest > window:
        raise ValueError(f"a context of {longest} frames exceeds the window of {window} frames: give a shorter one")
    if long.drop >= config.window:
        raise ValueError(
            f"long.drop={long.drop} leaves nothing of a window of {config.window} latent frames: give {config.window - 1} or less"
        )


def check_guidance(config: VidGPTConfig, guidance: float, plan: DecodingOptions) -> None:
    """Raise ValueError for guidance where there is nothing to be guided by or away from, or a plan that knows none."""
    if not guidance >= 0:
        raise ValueError(f"guidance={guidance} is no number of 0 or more: 1 is off, 1.5 to 3 are usual")
    if guidance != 1 and plan.plan == "transformers":
        raise ValueError(f"decoding=transformers knows no guidance={guidance}: use decoding=raster or speculative")
    if guidance != 1 and not config.num_actions:
        raise ValueError(f"guidance={guidance} needs a model that was trained with actions: leave it at 1")
    if guidance != 1 and not config.action_dropout:
        raise ValueError(
            f"guidance={guidance} needs a model that was trained without its actions too, at times: leave it at 1, or train on with "
            "action_dropout=0.1"
        )


def unlike_training(config: VidGPTConfig, plan: DecodingOptions) -> str | None:
    """Say in one line what a model was not trained for, where a plan asks it for tokens drawn from less than all before them."""
    layout = TokenLayout.from_config(config)
    if plan.plan != "diagonal" or plan.rule(layout) is causal:
        return None
    asked = f"diagonal.window={plan.window} diagonal.delay={plan.delay}"
    if not config.diagonal_share:
        return f"this model was not trained for decoding=diagonal, which costs quality: train on with diagonal.share=0.5 {asked}"
    columns = layout.width * layout.slots_per_place
    trained, wanted = (
        (min(window, columns), diagonal_passes(layout, window, delay))
        for window, delay in ((config.diagonal_window, config.diagonal_delay), (plan.window, plan.delay))
    )
    if trained == wanted:
        return None
    known = f"diagonal.window={config.diagonal_window} diagonal.delay={config.diagonal_delay}"
    return f"this model was trained for {known}, and {asked} costs quality: decode as it was trained"
