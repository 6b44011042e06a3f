"""How well two computations agree that should be one: logits to a bound, ids where no rounding can decide between the best two.

Logits are compared relative to their spread. Where two rollouts give different ids, each id must be what the uncached model draws there,
or its score so close to that one's that rounding decides: a near tie, which is counted and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.laws.forced import RASTER, Subject, picture_positions
from vidgpt.layout import TokenLayout
from vidgpt.sampling import Sampler, SamplingOptions


@dataclass(frozen=True)
class Finding:
    """One law and what was seen of it."""

    law: str
    is_kept: bool | None  # None where the law says nothing about this model
    seen: str

    def __str__(self) -> str:
        """Give one line."""
        return f"{'n/a ' if self.is_kept is None else 'pass' if self.is_kept else 'FAIL'}  {self.law}: {self.seen}"


@dataclass(frozen=True)
class Drawn:
    """How many ids are what the uncached model draws. decisive: draws whose best two scores are farther apart than the bound."""

    count: int
    wrong: int
    near_ties: int
    decisive: int

    @property
    def ties_note(self) -> str:
        """Tell of near ties."""
        return f", {self.near_ties} near ties" if self.near_ties else ""


def close(subject: Subject, law: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Finding:
    """Compare logits; one that is missing or NaN is no agreement."""
    largest = torch.stack([(ours.float() - theirs.float()).abs().max() for ours, theirs in pairs]).max()
    difference, bound = float(largest) / subject.spread, subject.tolerance
    return Finding(law, difference <= bound, f"largest difference {difference:.1e} of the logits' spread, bound {bound:.0e}")


def predicting(subject: Subject, context: int) -> Tensor:
    """Give the uncached logits that predict the picture slots behind `context` frames."""
    positions = picture_positions(subject.layout, context, subject.frames, subject.fused.device)
    return subject.logits[:, positions - 1]


def drawn(subject: Subject, input_ids: Tensor, sampler: Sampler, context: int, before: int = 0) -> Drawn:
    """Compare every id of sequences (B, L) behind their context with the draw from uncached logits on the ids before it.

    before: positions that each sequence has drawn before its first one here.
    """
    layout = subject.layout
    positions = picture_positions(layout, context, input_ids.shape[1] // layout.tokens_per_frame, input_ids.device)
    logits, ids = subject.uncached(input_ids)[:, positions - 1], input_ids[:, positions]
    rows, bound = (positions + before).expand(len(input_ids), -1), subject.tolerance * subject.spread
    expected = sampler.draw(logits, rows)
    is_other = expected != ids
    # Would the id have been drawn, had its score been higher by the bound; and the expected one, had its been lower?
    is_near = is_other & (sampler.draw(_shifted(layout, logits, ids, bound), rows) == ids)
    is_decisive = sampler.draw(_shifted(layout, logits, expected, -bound), rows) == expected
    return Drawn(ids.numel(), int((is_other & ~is_near).sum()), int(is_near.sum()), int(is_decisive.sum()))


def _shifted(layout: TokenLayout, logits: Tensor, ids: Tensor, by: float) -> Tensor:
    """Give logits (B, n, num_logits) with those of ids (B, n) moved."""
    moved = layout.embedding_rows(ids)[0] if layout.is_parallel else ids[..., None]
    return logits.scatter_add(2, moved, torch.full_like(moved, by, dtype=logits.dtype))


def same_ids(subject: Subject, law: str, plan: DecodingOptions, options: SamplingOptions) -> Finding:
    """Compare the ids of a plan with raster's."""
    ids, others = (subject.rollout(each, options) for each in (RASTER, plan))
    return compare(subject, law, ids, others, subject.sampler(options))


def compare(subject: Subject, law: str, ids: Tensor, others: Tensor, sampler: Sampler) -> Finding:
    """Compare the ids (B, L) of two rollouts; where they part, only near ties excuse."""
    different, is_rounded = int((ids != others).sum()), not subject.is_fp32
    checked = [drawn(subject, each, sampler, subject.context) for each in (ids, others)] if different or is_rounded else []
    wrong, near, decisive, count = (
        sum(getattr(each, name) for each in checked) for name in ("wrong", "near_ties", "decisive", "count")
    )
    total = len(ids) * (ids.shape[1] // subject.layout.tokens_per_frame - subject.context) * subject.layout.slots_per_frame
    seen = f"{different} of {total} ids differ, bound 0"
    if different:
        seen += f" but behind near ties: {near} near ties, {wrong} ids that the uncached model does not draw"
    if is_rounded:
        seen += f"; {decisive} of {count} draws are no near ties and were compared"
    return Finding(law, (not different or (near > 0 and not wrong)) and (decisive > 0 or not is_rounded), seen)
