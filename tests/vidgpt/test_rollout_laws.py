"""Laws of rollouts, each a function that tells whether it holds, with a way to break it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import CODES, WINDOW, chosen, clips, net, ragged, roll
from tests.vidgpt.laws.breaking import (
    count_noise_from_the_window,
    forget_the_first_lead,
    give_samples_one_key,
    leave_actions_in,
)
from vidgpt import sampling
from vidgpt.cache import SlotCache
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.stream import LongOptions, stream_tokens
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.model import VidGPTForCausalLM
from vidgpt.sampling import SamplingOptions

SAMPLED = SamplingOptions(temperature=1.0)
RASTER, SPECULATIVE, TRANSFORMERS = (DecodingOptions(name) for name in ("raster", "speculative", "transformers"))
WIDE = DecodingOptions("diagonal", window=4)
NARROW, DELAYED = DecodingOptions("diagonal", window=1), DecodingOptions("diagonal", window=1, delay=2)


def is_uncached(model: VidGPTForCausalLM, clip: Tensor, given: int, logits_of: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether greedy ids of a clip (B, T, h, w) are what logits of the whole sequence say."""
    layout = model.model.layout
    ids = layout.flatten(clip)
    positions = torch.arange(given * layout.tokens_per_frame, ids.shape[1])
    positions = positions[~layout.is_lead(positions)]
    return torch.equal(logits_of(ids)[:, positions - 1, :CODES].argmax(-1), ids[:, positions])


def interleaved_rollouts() -> bool:
    model = FusedModel(net())
    holds = True
    for plan in (RASTER, SPECULATIVE, NARROW, DELAYED, TRANSFORMERS):
        first, second = (stream_tokens(model, clips(seed=seed), 4, decoding=plan, options=SAMPLED, seed=seed) for seed in (1, 2))
        turns = [(next(first), next(second)) for _ in range(4)]
        for seed, frames in enumerate(zip(*turns, strict=True), start=1):
            holds &= torch.equal(
                torch.stack(frames, 1), roll(model, clips(seed=seed), 4, decoding=plan, options=SAMPLED, seed=seed)
            )
    return holds


def share_a_cache(patch: pytest.MonkeyPatch) -> None:
    new, caches = FusedModel.new_cache, []

    def shared(self: FusedModel, *sizes: int) -> SlotCache:
        caches.append(caches[0] if caches else new(self, *sizes))
        return caches[-1]

    patch.setattr(FusedModel, "new_cache", shared)


def closed_midway() -> bool:
    model, holds = FusedModel(net()), True
    state = {name: value.clone() for name, value in model.source.state_dict().items()}
    for plan in (RASTER, SPECULATIVE, NARROW, DELAYED):
        before = set(vars(model)), set(vars(model.source))
        whole = roll(model, clips(), 4, decoding=plan, options=SAMPLED)
        stream = stream_tokens(model, clips(seed=1), 4, decoding=plan, options=SAMPLED)
        next(stream)
        stream.close()
        holds &= before == (set(vars(model)), set(vars(model.source)))
        holds &= torch.equal(roll(model, clips(), 4, decoding=plan, options=SAMPLED), whole)
    return holds and all(torch.equal(value, state[name]) for name, value in model.source.state_dict().items())


def keep_state_of_a_rollout(patch: pytest.MonkeyPatch) -> None:
    extend = Reader.extend

    def kept(self: Reader, leads: Tensor) -> None:
        extend(self, leads)
        self.model.former = self

    patch.setattr(Reader, "extend", kept)


def shared_prefill() -> bool:
    model, given, work = net(), clips(2), Work()
    several = roll(model, given, 3, options=SAMPLED, samples=3, work=work)
    repeated = roll(model, given.repeat_interleave(3, dim=0), 3, options=SAMPLED)
    differ = len({tuple(row.flatten().tolist()) for row in several}) == 6
    return work.prefills == 1 and work.cache_bytes > 0 and torch.equal(several, repeated) and differ


def reprefill_is_a_fresh_stream() -> bool:
    model, given, holds = net(), clips(), True
    for plan in (RASTER, SPECULATIVE, NARROW):
        for drop in (0, 2):
            work = Work()
            found = roll(model, given, 11, decoding=plan, long=LongOptions("reprefill", drop), work=work)
            clip, dropped, prefills = given, drop or WINDOW // 2, 0
            while clip.shape[1] < 13:
                kept = clip if not prefills else clip[:, -(WINDOW - dropped) :]
                clip = torch.cat([clip, roll(model, kept, min(WINDOW - kept.shape[1], 13 - clip.shape[1]), decoding=plan)], dim=1)
                prefills += 1
            holds &= torch.equal(found, clip[:, 2:]) and work.prefills == prefills
    return holds


def samples_go_on_behind_a_reprefill() -> bool:
    """Positions count on, or the noise of the first frames would come again."""
    flat, given = net(), clips(1, 1)
    with torch.no_grad():
        flat.model.norm.weight.zero_()
    frames = roll(flat, given, 11, options=SAMPLED, long=LongOptions("reprefill", 3))[0]
    return len({tuple(frame.flatten().tolist()) for frame in frames}) == 11


def rows_of_other_lengths() -> bool:
    model, given, holds = FusedModel(net()), ragged(clips()), True
    for plan in (RASTER, SPECULATIVE, TRANSFORMERS, NARROW, DELAYED):
        for future, long in ((3, LongOptions()), (8, LongOptions("reprefill", 4))):
            keys = {"decoding": plan, "options": SAMPLED, "long": long}
            together = roll(model, given, future, **keys)
            alone = [roll(model, [clip], future, first_sequence=row, **keys)[0] for row, clip in enumerate(given)]
            holds &= torch.equal(together, torch.stack(alone))
    return holds


def turn_all_rows_alike(patch: pytest.MonkeyPatch) -> None:
    turns = FusedModel.turns
    patch.setattr(FusedModel, "turns", lambda self, positions: turns(self, positions[:1].expand(len(positions), -1)))


def window_is_uncached() -> bool:
    holds = True
    for sinks in (0, 1):
        model, given = net(attention_frames=2, sink_frames=sinks), clips()
        work = Work()
        clip = torch.cat([given, roll(model, given, 14, long=LongOptions("window"), work=work)], dim=1)
        holds &= is_uncached(model, clip, 2, lambda ids, model=model: model(ids).logits) and work.prefills == 1
        expected = roll(model, given, 14, options=SAMPLED, long=LongOptions("window"))
        for plan in (SPECULATIVE, WIDE):
            holds &= torch.equal(roll(model, given, 14, options=SAMPLED, long=LongOptions("window"), decoding=plan), expected)
    return holds


def keep_too_few_frames(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vidgpt.decoding.stream._capacity", lambda *_: 2)


def guidance_is_two_passes() -> bool:
    model, given, actions = net(num_actions=3, action_dropout=0.1), clips(), chosen(3, 6)
    layout, holds = model.model.layout, True
    plain = roll(model, given, 4, actions=actions)
    holds &= torch.equal(roll(model, given, 4, actions=actions, guidance=1.0), plain)
    for guidance in (0.0, 2.0):
        for plan in (RASTER, SPECULATIVE, WIDE):
            guided = roll(model, given, 4, actions=actions, guidance=guidance, decoding=plan)
            ids = layout.flatten(torch.cat([given, guided], dim=1), actions)
            positions = torch.arange(2 * layout.tokens_per_frame, ids.shape[1])
            positions = positions[~layout.is_lead(positions)]
            with_them, without = (model(each).logits for each in (ids, ids.clamp(max=layout.separator_id)))
            logits = (without + guidance * (with_them - without))[:, positions - 1, :CODES]
            holds &= torch.equal(logits.argmax(-1), ids[:, positions]) and not torch.equal(guided, plain)
    return holds


def guided_rows_are_alone() -> bool:
    model, given, actions = net(num_actions=3, action_dropout=0.1), ragged(clips()), chosen(3, 7)
    rows = [actions[row, : len(clip) + 3] for row, clip in enumerate(given)]
    keys = {"options": SAMPLED, "guidance": 2.0, "samples": 2}
    together = roll(model, given, 3, actions=rows, **keys)
    alone = [
        roll(model, [clip], 3, actions=[rows[row]], first_sequence=2 * row, decoding=SPECULATIVE, **keys)
        for row, clip in enumerate(given)
    ]
    return torch.equal(together, torch.cat(alone))


def seed_is_of_a_sequence() -> bool:
    model, given, holds = net(), clips(4), True
    for plan in (RASTER, SPECULATIVE, NARROW):
        keys = {"decoding": plan, "options": SamplingOptions(temperature=3.0)}
        together = roll(model, given, 3, seed=7, **keys)
        alone = [roll(model, given[row : row + 1], 3, seed=7, first_sequence=row, **keys) for row in range(4)]
        holds &= torch.equal(together, torch.cat(alone)) and torch.equal(together, roll(model, given, 3, seed=7, **keys))
        holds &= not torch.equal(together, roll(model, given, 3, seed=8, **keys))
        same = roll(model, given[:1].expand(4, -1, -1, -1), 3, seed=7, **keys)
        holds &= len({tuple(row.flatten().tolist()) for row in same}) == 4
    return holds


def draw_by_row(patch: pytest.MonkeyPatch) -> None:
    noise = sampling.exponential_noise
    patch.setattr(sampling, "exponential_noise", lambda keys, *rest: noise(torch.arange(len(keys)), *rest))


LAWS = (
    (interleaved_rollouts, share_a_cache),
    (closed_midway, keep_state_of_a_rollout),
    (shared_prefill, give_samples_one_key),
    (reprefill_is_a_fresh_stream, forget_the_first_lead),
    (samples_go_on_behind_a_reprefill, count_noise_from_the_window),
    (rows_of_other_lengths, turn_all_rows_alike),
    (window_is_uncached, keep_too_few_frames),
    (guidance_is_two_passes, leave_actions_in),
    (guided_rows_are_alone, draw_by_row),
    (seed_is_of_a_sequence, draw_by_row),
)


@pytest.mark.parametrize(("law", "breaking"), LAWS, ids=[law.__name__ for law, _ in LAWS])
def test_a_law_holds_and_is_seen_to_be_broken(law, breaking, monkeypatch) -> None:
    assert law()
    breaking(monkeypatch)
    assert not law()


@pytest.mark.parametrize("plan", [RASTER, SPECULATIVE, NARROW, TRANSFORMERS], ids=lambda plan: plan.plan)
def test_what_a_caller_does_to_a_frame_reaches_no_other(plan: DecodingOptions) -> None:
    model, long = FusedModel(net()), LongOptions("reprefill", 2)
    expected = roll(model, clips(), 8, decoding=plan, long=long)
    kept = []
    for frame in stream_tokens(model, clips(), 8, decoding=plan, long=long):
        kept.append(frame.clone())
        frame.fill_(0)
    assert torch.equal(torch.stack(kept, dim=1), expected)


def test_a_fused_model_is_what_the_weights_were() -> None:
    model = net()
    fused, before = FusedModel(model), roll(model, clips(), 4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.25)
    assert not torch.equal(roll(model, clips(), 4), before)
    assert torch.equal(roll(fused, clips(), 4), before)


def test_the_library_knows_no_guidance_and_no_other_precision() -> None:
    model = net(num_actions=3)
    with pytest.raises(ValueError, match=r"decoding=transformers knows no guidance=2.0: use decoding=raster"):
        stream_tokens(model, clips(), 4, actions=chosen(3, 6), guidance=2.0, decoding=TRANSFORMERS)
    with pytest.raises(ValueError, match="knows no compile=true and no other precision"):
        stream_tokens(FusedModel(net(), torch.bfloat16), clips(), 4, decoding=TRANSFORMERS)
