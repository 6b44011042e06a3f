"""The distribution of what speculative decoding draws, against the law of the uncached model: a chi-square test of Pearson's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.laws.comparing import Finding
from vidgpt.laws.forced import Subject
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions, filter_logits

LEAST_PROBABILITY = 1e-6  # of a deviation as large as the one seen, were the law kept
SEQUENCES = 2000
# Times how far a lower precision moves the uncached model's law: a sum over all ids, so less of a margin than for the worst logit.
ROUNDINGS = 2
CACHE_BYTES = 1 << 28  # of the sequences that are drawn at once
PLAN = DecodingOptions("speculative", draft_length=3)


class Enough(Exception):
    """What was to be drawn is drawn."""


@dataclass(frozen=True, kw_only=True)
class FirstDraws(Sampler):
    """A sampler that ends a rollout when the first two slots of a frame are certain: a pass makes one more of them certain."""

    passes: list[int]

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw as ever. Raises Enough before the third time."""
        if len(self.passes) == 2:
            raise Enough
        self.passes.append(positions.shape[1])
        return super().draw(logits, positions)


def speculative_law(subject: Subject) -> Finding:
    """Draw the first slots of a frame many times, sharing one prefill, and count."""
    layout, given = subject.layout, subject.input_ids[:1, : subject.layout.tokens_per_frame + 1]
    # In bf16 another id may be the eighth, and one that fp32 excludes would be infinitely far.
    options = SamplingOptions(_temperature(subject, given), top_k=8 if subject.is_fp32 else 0)
    drawn = _draw_many(subject, given, options)
    parts = [(given, drawn[:, 0])]
    if layout.slots_per_frame > 1:
        # The law of the second slot depends on the first.
        found, numbers = drawn[:, 0].unique(return_counts=True)
        for first in found[numbers.argsort(descending=True)][:8]:
            parts.append((torch.cat([given, first.view(1, 1)], dim=1), drawn[drawn[:, 0] == first, 1]))
    statistic, freedom, shift = 0.0, 0, 0.0
    for number, (before, ids) in enumerate(parts):
        logits = subject.uncached(before)[0, -1]
        rounded = logits if subject.is_fp32 else subject.rounded(before)[0, -1]
        digits = layout.split(ids) if layout.is_parallel else ids[:, None] - layout.spans[layout.due_digits(min(number, 1))[0]][0]
        due = (layout.due_logits(each, min(number, 1)) for each in (logits, rounded))
        for digit, both in enumerate(zip(*due, strict=True)):
            law, other = (filter_logits(each, options).softmax(-1).double().cpu() for each in both)
            value, cells = chi_square(digits[:, digit].cpu(), law)
            statistic, freedom = statistic + value, freedom + cells
            shift += len(ids) * float(((other - law).square() / law).nan_to_num().sum())
    seen = f"chi-square {statistic:.1f}"
    if not subject.is_fp32:
        # Its root is a distance, part of which may be that between the laws of two computations.
        statistic = max(0.0, statistic**0.5 - ROUNDINGS * shift**0.5) ** 2
        seen += f", without what rounding may add {statistic:.1f}"
    probability = 1.0 if not freedom else float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))
    seen += f" at {freedom} degrees of freedom, probability {probability:.1e}, bound {LEAST_PROBABILITY:.0e}"
    return Finding(f"speculative samples follow the model's law ({len(drawn)} sequences)", probability >= LEAST_PROBABILITY, seen)


def chi_square(ids: Tensor, law: Tensor) -> tuple[float, int]:
    """Give Pearson's statistic and its degrees of freedom for ids (n,) and their law (V,); an id of probability 0 is infinitely far.

    Ids of fewer than 5 expected draws count as one.
    """
    expected, seen = law * len(ids), torch.bincount(ids, minlength=len(law)).double()
    if bool((seen[law == 0] > 0).any()):
        return float("inf"), 1
    is_rare = expected < 5
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    seen = torch.cat([seen[~is_rare], seen[is_rare].sum()[None]])
    if expected[-1] < 5:
        # Too few even together: they join the likeliest.
        most = int(expected.argmax())
        if most < len(expected) - 1:
            expected[most], seen[most] = expected[most] + expected[-1], seen[most] + seen[-1]
            expected, seen = expected[:-1], seen[:-1]
    return float(((seen - expected).square() / expected).sum()), len(expected) - 1


def _temperature(subject: Subject, given: Tensor) -> float:
    """Give one at which several ids are likely, however sure the model is."""
    due = subject.layout.due_logits(subject.uncached(given)[0, -1].float(), 0)[0]
    return max(0.1, float(due.topk(min(8, len(due))).values.std()))


@torch.no_grad()
def _draw_many(subject: Subject, given: Tensor, options: SamplingOptions) -> Tensor:
    """Give the first two slots (SEQUENCES, 2), or the one there is, behind one frame and a lead, given: (1, L)."""
    config, layout, device = subject.model.config, subject.layout, subject.fused.device
    size = layout.tokens_per_frame
    per_row = 2 * config.num_hidden_layers * 3 * size * int(config.num_key_value_heads or 1) * int(config.head_dim or 0) * 4
    rows = max(1, min(SEQUENCES, CACHE_BYTES // per_row))
    drawn = []
    for first in range(0, SEQUENCES, rows):
        count = min(rows, SEQUENCES - first)
        sampler = FirstDraws(layout, options, sequence_keys(subject.seed, count, device, first=first), passes=[])
        reader = subject.reader(PLAN, batch=1, num_frames=3)
        reader.prefill(given[:, :size])
        reader.repeat(count, sampler)
        with suppress(Enough):
            next(PLAN.frames(reader, given[:, size:].repeat_interleave(count, dim=0)))
        drawn.append(reader.tokens[:, size + 1 : size + 1 + min(2, layout.slots_per_frame)])
    return torch.cat(drawn)
