"""Laws of what a rollout is asked for beyond one future of a window: longer ones, several, guided ones."""

from __future__ import annotations

import torch

from vidgpt.decoding.stream import LongOptions
from vidgpt.laws.comparing import Finding, close, compare, drawn
from vidgpt.laws.forced import RASTER, SPECULATIVE, Subject, picture_positions, play, repeat_frames
from vidgpt.sampling import SamplingOptions

SAMPLES = 2
GUIDANCE = (0.0, 1.0, 2.0)


def reprefill(subject: Subject) -> Finding:
    """Go on past the window, and compare every stretch with an uncached pass over the frames that it was read anew with."""
    window, size = subject.model.config.window, subject.layout.tokens_per_frame
    drop = min(2, window - 1)
    frames = window + drop + 1
    options = SamplingOptions(temperature=1.0)
    ids = subject.rollout(RASTER, options, long=LongOptions("reprefill", drop), future=frames - subject.context)
    actions = None if subject.actions is None else repeat_frames(subject.actions, frames)
    indices, sampler = subject.layout.unflatten(ids), subject.sampler(options)
    parts, given = [], subject.context
    for start in range(0, frames - window + drop, drop):
        end = min(start + window, frames)
        # As of a clip that begins there: its first lead is that of a first frame.
        clip = subject.layout.flatten(indices[:, start:end], None if actions is None else actions[:, start:end])
        parts.append(drawn(subject, clip, sampler, given - start, before=start * size))
        given = end
    wrong, count, ties = (sum(getattr(part, name) for part in parts) for name in ("wrong", "count", "near_ties"))
    law = f"past the window with long.mode=reprefill long.drop={drop} = clips of the newest frames, uncached"
    seen = f"at {frames} frames, {wrong} of {count} sampled ids are not the uncached ones, bound 0"
    return Finding(law, not wrong, seen + (f", {ties} near ties" if ties else ""))


def guidance(subject: Subject) -> Finding:
    """Compare guided logits with those put together from two uncached passes, with actions and without."""
    law, layout, ids = f"guidance of {', '.join(f'{each:g}' for each in GUIDANCE)} = uncached", subject.layout, subject.input_ids
    if not layout.num_actions:
        return Finding(law, None, "not applicable to models without actions")
    is_action = layout.is_lead(torch.arange(ids.shape[1], device=ids.device)) & (ids != layout.bos_id)
    free = subject.uncached(ids.masked_fill(is_action, layout.separator_id))
    where = picture_positions(layout, subject.context, subject.frames, ids.device) - 1
    pairs = []
    for strength in GUIDANCE:
        # What rounding does to both is multiplied.
        scale = abs(strength) + abs(1 - strength)
        expected = (free + strength * (subject.logits - free))[:, where] / scale
        for plan in (RASTER, SPECULATIVE):
            pairs.append((play(subject.reader(plan, guidance=strength), ids, subject.context, plan) / scale, expected))
    return close(subject, law, pairs)


def samples(subject: Subject) -> Finding:
    """Compare samples that share the prefill of their clip with each alone under its own number."""
    hot = SamplingOptions(temperature=max(1.0, subject.spread))
    law = f"each of {SAMPLES} samples of a clip, which share its prefill = the sample alone"
    together = subject.rollout(RASTER, hot, samples=SAMPLES)
    alone = [
        subject.rollout(RASTER, hot, rows=[row], first=row * SAMPLES + sample)
        for row in range(subject.batch)
        for sample in range(SAMPLES)
    ]
    finding = compare(subject, law, together, torch.cat(alone), subject.sampler(hot, subject.batch * SAMPLES))
    if bool((together[::SAMPLES] == together[1::SAMPLES]).all()):
        return Finding(law, False, "the samples of a clip are all alike")
    return finding
