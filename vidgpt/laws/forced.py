"""What a decoding plan computes, laid beside the model's own uncached forward pass: a plan is told what it draws.

Then every logit of a plan has one true value, also where sampled ids would have parted long before.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.stream import LongOptions, stream_tokens
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions

GREEDY = SamplingOptions(temperature=0.0)
RASTER, SPECULATIVE = DecodingOptions("raster"), DecodingOptions("speculative")
# Largest difference of two computations of the same logits in fp32, as a share of their standard deviation.
TOLERANCE = 1e-4
# Times what a lower precision does to the uncached model itself: two computations are each so far from the truth, and another order of
# operations may round worse than the one that was measured.
ROUNDINGS = 4


@dataclass(frozen=True, kw_only=True)
class Recorder(Sampler):
    """A sampler that draws the ids it is told and keeps the newest logits that predict each position."""

    truth: Tensor  # (B, L) input ids, by the row's own position
    logits: Tensor  # (B, L, num_logits), NaN where none came

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Give the true ids at positions (B, n)."""
        self.logits[torch.arange(len(positions), device=positions.device)[:, None], positions] = logits.to(self.logits.dtype)
        return self.truth.gather(1, positions)


@dataclass(frozen=True)
class Subject:
    """A model and the clips on which its laws are checked."""

    model: VidGPTForCausalLM
    fused: FusedModel
    indices: Tensor  # (B, T, h, w)
    actions: Tensor | None  # (B, T)
    context: int  # frames that are given, the others are predicted
    seed: int = 0

    @property
    def layout(self) -> TokenLayout:
        """How frames become a sequence."""
        return self.fused.layout

    @property
    def batch(self) -> int:
        """Clips."""
        return len(self.indices)

    @property
    def frames(self) -> int:
        """Frames a clip."""
        return self.indices.shape[1]

    @cached_property
    def input_ids(self) -> Tensor:
        """Give the sequences (B, L)."""
        return self.layout.flatten(self.indices, self.actions)

    @cached_property
    def logits(self) -> Tensor:
        """Give what the uncached model says: (B, L, num_logits), at p for p + 1."""
        return self.uncached(self.input_ids)

    @cached_property
    def spread(self) -> float:
        """Give the standard deviation of the logits over ids."""
        return float(self.logits.float().std(-1).mean())

    @property
    def is_fp32(self) -> bool:
        """Tell whether decoding computes in fp32, as the uncached model always does."""
        return self.fused.dtype == torch.float32

    @cached_property
    def rounding(self) -> float:
        """Give how far the uncached model in decoding's precision is from itself in fp32, at most, as a share of the spread."""
        return float((self.rounded(self.input_ids) - self.logits).abs().max()) / self.spread

    @cached_property
    def rounded_model(self) -> VidGPTForCausalLM:
        """Give the uncached model in decoding's precision."""
        return copy.deepcopy(self.model).to(self.fused.dtype)

    @cached_property
    def tolerance(self) -> float:
        """Give how far logits may be from the uncached ones, as a share of their spread."""
        return TOLERANCE if self.is_fp32 else ROUNDINGS * self.rounding

    @torch.no_grad()
    def uncached(self, input_ids: Tensor) -> Tensor:
        """Give the logits of whole sequences (B, L), row by row: the same for any batch."""
        return torch.cat([self.model(row[None], use_cache=False).logits for row in input_ids])

    @torch.no_grad()
    def rounded(self, input_ids: Tensor) -> Tensor:
        """Give what `uncached` gives, in fp32, as computed in decoding's precision."""
        return torch.cat([self.rounded_model(row[None], use_cache=False).logits for row in input_ids]).float()

    def sampler(self, options: SamplingOptions, rows: int | None = None, first: int = 0) -> Sampler:
        """Make what draws sequences first, first + 1, ..."""
        return Sampler(self.layout, options, sequence_keys(self.seed, rows or self.batch, self.fused.device, first=first))

    def reader(
        self, plan: DecodingOptions = RASTER, batch: int | None = None, num_frames: int | None = None, guidance: float = 1.0
    ) -> Reader:
        """Make the state of a rollout of greedy draws."""
        batch, frames = batch or self.batch, num_frames or self.frames + 1
        return Reader(self.fused, self.sampler(GREEDY, batch), Work(), batch, frames, guidance, plan.rule(self.layout))

    def rollout(
        self, plan: DecodingOptions, options: SamplingOptions, rows: Sequence[int] | None = None, long: LongOptions | None = None,
        future: int | None = None, first: int = 0, samples: int = 1,
    ) -> Tensor:  # fmt: skip
        """Give the input ids (rows * samples, L) of contexts and what a plan makes of them."""
        chosen = list(range(self.batch)) if rows is None else list(rows)
        future = future or self.frames - self.context
        given, total = self.indices[chosen, : self.context], self.context + future
        actions = None if self.actions is None else repeat_frames(self.actions[chosen], total)
        frames = stream_tokens(
            self.fused,
            given,
            future,
            seed=self.seed,
            options=options,
            decoding=plan,
            actions=actions,
            long=long,
            first_sequence=first,
            samples=samples,
        )
        given = given.repeat_interleave(samples, dim=0)
        actions = None if actions is None else actions.repeat_interleave(samples, dim=0)
        return self.layout.flatten(torch.cat([given, torch.stack(list(frames), dim=1)], dim=1), actions)


def repeat_frames(values: Tensor, frames: int) -> Tensor:
    """Give `frames` entries (B, frames) of (B, T), over again where they are more."""
    return values[:, torch.arange(frames, device=values.device) % values.shape[1]]


def picture_positions(layout: TokenLayout, first_frame: int, frames: int, device: torch.device) -> Tensor:
    """Give the positions (n,) of all picture slots of frames first_frame .. frames - 1."""
    positions = torch.arange(first_frame * layout.tokens_per_frame, frames * layout.tokens_per_frame, device=device)
    return positions[~layout.is_lead(positions)]


def begin(reader: Reader, input_ids: Tensor, context: int, starts: Tensor | None = None) -> Recorder:
    """Prefill a reader with the first `context` frames of input_ids (B, L); rows begin at starts (B,)."""
    truth = input_ids if starts is None else _rolled(input_ids, -starts)
    empty = torch.full((*truth.shape, reader.layout.num_logits), float("nan"), device=truth.device)
    recorder = Recorder(reader.layout, GREEDY, sequence_keys(0, len(truth), truth.device), truth=truth, logits=empty)
    reader.sampler = recorder
    reader.prefill(input_ids[:, : context * reader.layout.tokens_per_frame].clone(), starts)
    return recorder


@torch.no_grad()
def go_on(reader: Reader, recorder: Recorder, input_ids: Tensor, plan: DecodingOptions = RASTER) -> Tensor:
    """Let a plan predict the rest of input_ids; gives the logits (B, n, num_logits) of its picture slots."""
    size, context = reader.layout.tokens_per_frame, reader.frames
    for _ in plan.frames(reader, input_ids[:, context * size :: size]):
        pass
    starts = reader.starts
    logits = recorder.logits if starts is None else _rolled(recorder.logits, starts)
    return logits[:, picture_positions(reader.layout, context, input_ids.shape[1] // size, input_ids.device)]


@torch.no_grad()
def play(reader: Reader, input_ids: Tensor, context: int, plan: DecodingOptions = RASTER, starts: Tensor | None = None) -> Tensor:
    """Let a plan predict input_ids (B, L) behind their first `context` frames; gives the logits of these picture slots."""
    recorder = begin(reader, input_ids, context, starts)
    return go_on(reader, recorder, input_ids, plan)


@torch.no_grad()
def read_pieces(reader: Reader, input_ids: Tensor, ends: Iterable[int], wrong: Tensor | None = None) -> Tensor:
    """Read input_ids (B, L) in pieces that end at `ends`, as plans do; gives all logits.

    wrong: other ids (B, L); before each piece but the first, those of it and of some places behind are read, then overwritten.
    """
    length, logits, start = input_ids.shape[1], [], 0
    reader.tokens, reader.length = input_ids, length
    for end in ends:
        if start and wrong is not None:
            ahead = min(length, end + reader.layout.cells // 2 + 1)
            positions = torch.arange(start, ahead, device=input_ids.device)
            reader.read(reader.queries(positions, length), length, wrong[:, start:ahead])
        is_plain, used = reader.is_plain and wrong is None, end if wrong is None else length
        is_whole = start == 0 and is_plain
        queries = reader.queries(torch.arange(start, end, device=input_ids.device), used, use_mask=not is_whole)
        queries = queries.unmasked() if end - start == 1 and is_plain else queries
        logits.append(reader.logits(reader.read(queries, used, is_causal=is_whole, keep=end - start)))
        start = end
    return torch.cat(logits, dim=1)


def _rolled(values: Tensor, shifts: Tensor) -> Tensor:
    """Move each row of (B, L, ...) by its own shift."""
    return torch.stack([row.roll(int(shift), dims=0) for row, shift in zip(values, shifts, strict=True)])
