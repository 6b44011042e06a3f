"""Laws that every model must keep while it decodes, each a function that says how well a subject keeps it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vidgpt.cache import SlotCache
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import LongOptions
from vidgpt.diagonal_training import diagonal_batch
from vidgpt.fused import FusedModel
from vidgpt.laws.comparing import Finding, close, compare, drawn, predicting, same_ids
from vidgpt.laws.forced import (
    GREEDY,
    RASTER,
    SPECULATIVE,
    Subject,
    begin,
    go_on,
    picture_positions,
    play,
    read_pieces,
    repeat_frames,
)
from vidgpt.model import VidGPTForCausalLM
from vidgpt.sampling import Sampler, SamplingOptions
from vidtok.fingerprint import fingerprint
from vidtok.folders import load_model, save_model

SAMPLED = SamplingOptions(temperature=1.0)


def cached(subject: Subject) -> Finding:
    """Compare step by step reading with a cache and a forward pass over the whole sequence."""
    return close(subject, "cached = uncached", [(play(subject.reader(), subject.input_ids, 1), predicting(subject, 1))])


def prefill_splits(subject: Subject) -> Finding:
    """Read the sequence in pieces of several sizes."""
    length, size = subject.input_ids.shape[1], subject.layout.tokens_per_frame
    generator = torch.Generator().manual_seed(subject.seed)
    cuts = [[], list(range(size, length, size)), [length - 3, length - 2, length - 1]]
    cuts += [sorted(set((torch.randperm(length - 1, generator=generator)[:5] + 1).tolist())) for _ in range(2)]
    pairs = [(read_pieces(subject.reader(), subject.input_ids, [*ends, length]), subject.logits) for ends in cuts]
    return close(subject, f"any of {len(cuts)} splits into prefill and steps = one pass", pairs)


def batch_rows(subject: Subject) -> Finding:
    """Compare rows of a batch with each row alone."""
    together = play(subject.reader(), subject.input_ids, subject.context)
    alone = [play(subject.reader(batch=1), row[None], subject.context) for row in subject.input_ids]
    return close(subject, "a row of a batch = the row alone", [(together, torch.cat(alone))])


def ragged_rows(subject: Subject) -> Finding:
    """Compare rows whose contexts begin later with each of them uncached and alone."""
    law, layout = "contexts of different lengths in a batch = each alone", subject.layout
    missing = [row % subject.context for row in range(subject.batch)]
    if not any(missing):
        return Finding(law, None, "not applicable to contexts of one frame, or to one clip; use a larger frames= or clips=")
    if subject.model.config.sink_frames:
        return Finding(law, None, "not applicable to models with sink_frames, which take contexts of one length")
    rows = []
    for row, frames in enumerate(missing):
        actions = None if subject.actions is None else subject.actions[row : row + 1, frames:]
        rows.append(layout.flatten(subject.indices[row : row + 1, frames:], actions))
    starts = torch.tensor(missing, device=subject.fused.device) * layout.tokens_per_frame
    padded = torch.cat([torch.nn.functional.pad(row, (subject.input_ids.shape[1] - row.shape[1], 0)) for row in rows])
    logits = play(subject.reader(), padded, subject.context, starts=starts)
    where = picture_positions(layout, subject.context, subject.frames, logits.device) - 1
    alone = [subject.uncached(row)[:, where - start] for row, start in zip(rows, starts, strict=True)]
    return close(subject, law, [(logits, torch.cat(alone))])


def speculative_logits(subject: Subject) -> Finding:
    """Compare what speculative decoding accepts by with the uncached model, for every way to guess."""
    plans = (SPECULATIVE, replace(SPECULATIVE, draft="previous"), replace(SPECULATIVE, draft_length=3))
    expected = predicting(subject, subject.context)
    pairs = [(play(subject.reader(plan), subject.input_ids, subject.context, plan), expected) for plan in plans]
    return close(subject, "speculative = uncached", pairs)


def speculative_greedy(subject: Subject) -> Finding:
    """Compare greedy ids of the two plans."""
    return same_ids(subject, "speculative = raster, greedy ids", SPECULATIVE, GREEDY)


def speculative_sampled(subject: Subject) -> Finding:
    """Compare ids of the two plans that one seed draws."""
    return same_ids(subject, "speculative = raster, sampled ids of one seed", SPECULATIVE, SAMPLED)


def wide_diagonal(subject: Subject) -> Finding:
    """Compare sampled ids of a diagonal that waits for whole rows with raster's."""
    plan = DecodingOptions("diagonal", window=subject.layout.width * subject.layout.slots_per_place)
    return same_ids(subject, "diagonal with a window of a row = raster, sampled ids of one seed", plan, SAMPLED)


def narrow_diagonal(subject: Subject) -> Finding:
    """Compare diagonal decoding with one uncached pass over the sequence on which training teaches it."""
    law, layout = "diagonal with a window of 1, without and with delays = its own rule, uncached", subject.layout
    columns = layout.width * layout.slots_per_place
    if layout.height == 1 or columns == 1:
        return Finding(law, None, "not applicable to frames of one row or one column")
    # 1: as many frames under way as there can be; the height: one stack of rows, as in the paper.
    plans = [DecodingOptions("diagonal", window=1, delay=delay) for delay in (0, 1, layout.height)]
    ids = subject.input_ids
    return close(
        subject, law, [(play(subject.reader(plan), ids, subject.context, plan), _laid_out(subject, plan)) for plan in plans]
    )


def _laid_out(subject: Subject, plan: DecodingOptions) -> Tensor:
    """Give the uncached logits that predict the picture slots behind the context under the rule of diagonal decoding."""
    ids = subject.input_ids
    laid = diagonal_batch(subject.model.config, ids, ids, plan.window, plan.delay)
    with torch.no_grad():
        logits = subject.model(laid.input_ids, laid.attention_mask, laid.position_ids).logits
    positions, extra = laid.position_ids[0], laid.position_ids.shape[1] - ids.shape[1]
    # What predicts a position: the token before it, but where a stand-in has that place.
    source = torch.arange(ids.shape[1], device=ids.device) + extra
    source[positions[:extra]] = torch.arange(extra, device=ids.device)
    return logits[:, source[picture_positions(subject.layout, subject.context, subject.frames, ids.device) - 1]]


def transformers_generate(subject: Subject) -> Finding:
    """Compare greedy ids with those of transformers' own generate."""
    law = "transformers' generate = raster, greedy ids"
    if subject.layout.is_parallel:
        return Finding(law, None, "not applicable to digits=parallel, for which generate has no distribution")
    if not subject.is_fp32:
        return Finding(law, None, "not applicable to precision=bf16, which generate is not run in here")
    return same_ids(subject, law, DecodingOptions("transformers"), GREEDY)


def beyond_window(subject: Subject) -> Finding:
    """Go on past the window, where slots are taken again, and compare with an uncached pass over all."""
    law, config = "past the window with long.mode=window = uncached", subject.model.config
    if not config.attention_frames:
        return Finding(law, None, "not applicable, attention_frames=0: the model sees all frames of a window and none before")
    held = config.sink_frames + config.attention_frames
    frames = max(config.window, held + 3) + 2
    ids = subject.rollout(RASTER, GREEDY, long=LongOptions("window"), future=frames - subject.context)
    found = drawn(subject, ids, subject.sampler(GREEDY), subject.context)
    actions = None if subject.actions is None else repeat_frames(subject.actions, frames)
    given = subject.layout.flatten(repeat_frames(subject.indices, frames), actions)
    # The frames that are seen, the one under way, and room for the slot that is read with the next.
    logits = play(subject.reader(num_frames=max(subject.context + 1, held + 3)), given, subject.context)
    expected = subject.uncached(given)[:, picture_positions(subject.layout, subject.context, frames, ids.device) - 1]
    finding = close(subject, law, [(logits, expected)])
    seen = f"{finding.seen}; at {frames} frames, {found.wrong} of {found.count} greedy ids are not the uncached ones{found.ties_note}"
    return replace(finding, is_kept=bool(finding.is_kept) and not found.wrong, seen=seen)


def stale_slots(subject: Subject) -> Finding:
    """Let another clip go before in the same cache, then fill what is unused with large numbers."""
    frames, size = max(2, subject.frames - 1), subject.layout.tokens_per_frame
    ids = subject.input_ids[:, : frames * size]
    pairs = []
    for plan in (RASTER, SPECULATIVE, DecodingOptions("diagonal", window=1)):
        fresh, reader = play(subject.reader(plan), ids, 1, plan), subject.reader(plan)
        play(reader, subject.input_ids.flip(0), subject.frames - 1, plan)
        pairs.append((play(reader, ids, 1, plan), fresh))
        recorder = begin(reader, ids, 1)
        for layer in reader.cache.layers:
            layer.keys[:, :, reader.length - 1 :] = 1e4
            layer.values[:, :, reader.length - 1 :] = 1e4
        pairs.append((go_on(reader, recorder, ids, plan), fresh))
    return close(subject, "a former clip and rubbish in unused slots change nothing", pairs)


def overwriting(subject: Subject) -> Finding:
    """Read wrong ids and take them back: overwritten in place, and by rewinding."""
    ids, length = subject.input_ids, subject.input_ids.shape[1]
    wrong = subject.layout.flatten((subject.indices + 1) % subject.layout.codebook_size, subject.actions)
    first, last = subject.layout.tokens_per_frame, length - max(1, subject.layout.cells // 2)
    pairs = [(read_pieces(subject.reader(), ids, sorted({first, last, last + 1, length}), wrong), subject.logits)]
    cache = SlotCache(subject.model.config.num_hidden_layers, length)
    with torch.no_grad():
        for part in (ids[:, :first], wrong[:, first:last]):
            subject.model(part, past_key_values=cache, use_cache=True)
        cache.rewind(first)
        pairs.append((subject.model(ids[:, first:], past_key_values=cache, use_cache=True).logits, subject.logits[:, first:]))
    return close(subject, "wrong ids overwritten or rewound = never read", pairs)


def saved_and_loaded(subject: Subject) -> Finding:
    """Write the model, load it again, compare logits and fingerprints."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(subject.model, Path(folder))
        loaded = load_model(VidGPTForCausalLM, folder).to(subject.model.device)
    other = replace(subject, model=loaded, fused=FusedModel(loaded))
    ours, theirs = fingerprint(subject.model), fingerprint(loaded)
    finding = close(subject, "saved and loaded = as it was", [(other.logits, subject.logits)])
    names = f"fingerprint {ours}" if ours == theirs else f"fingerprint {ours} became {theirs}"
    return replace(finding, is_kept=bool(finding.is_kept) and ours == theirs, seen=f"{finding.seen}, {names}")


def legal_ids(subject: Subject) -> Finding:
    """Draw where the model wants illegal ids more than any other, and where it is made to draw anything."""
    layout, wrong, count = subject.layout, 0, 0
    positions = picture_positions(layout, subject.context, subject.frames, subject.fused.device)
    for options in (GREEDY, SAMPLED, SamplingOptions(temperature=10.0, top_k=3, top_p=0.9, min_p=0.01)):
        logits = predicting(subject, subject.context)
        if not layout.is_parallel:
            logits = logits + 1e4 * ~layout.legal_ids(positions)
        parts = [subject.sampler(options).draw(logits, positions.expand(subject.batch, -1))]
        # Not the frames, whose ids have lost what a slot really held.
        reader = subject.reader(SPECULATIVE)
        recorder = begin(reader, subject.input_ids, subject.context)
        reader.sampler = Sampler(layout, replace(options, temperature=10 * options.temperature), recorder.keys)
        with torch.no_grad():
            leads = subject.input_ids[:, reader.length :: layout.tokens_per_frame]
            parts.append(torch.cat([slots.clone() for slots in SPECULATIVE.frames(reader, leads)], dim=1))
        for ids in parts:
            wrong, count = wrong + _count_illegal(subject, ids, positions), count + ids.numel()
    return Finding("illegal ids are never drawn", not wrong, f"{wrong} of {count} ids are illegal, bound 0")


def seeds(subject: Subject) -> Finding:
    """Compare sampled rows of a batch with each row alone under its own number, and with another seed."""
    hot = SamplingOptions(temperature=max(1.0, subject.spread))
    together = subject.rollout(RASTER, hot)
    alone = torch.cat([subject.rollout(RASTER, hot, rows=[row], first=row) for row in range(subject.batch)])
    finding = compare(subject, "a row depends on its own seed only", together, alone, subject.sampler(hot))
    others = (replace(subject, seed=subject.seed + 1).rollout(RASTER, hot), subject.rollout(RASTER, hot, first=subject.batch))
    if not all(bool((other != together).any()) for other in others):
        return replace(finding, is_kept=False, seen="another seed draws the same ids")
    return finding


def _count_illegal(subject: Subject, ids: Tensor, positions: Tensor) -> int:
    layout = subject.layout
    if layout.is_parallel:
        return int(((ids < 0) | (ids >= layout.codebook_size)).sum())
    legal = layout.legal_ids(positions).expand(len(ids), -1, -1)
    return int((~legal.gather(2, ids[..., None])).sum())
