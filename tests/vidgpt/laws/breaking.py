"""Ways to break what the laws hold, each a patch; and of each law, in which precision it must be seen."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from vidgpt import sampling
from vidgpt.cache import SlotCache, SlotLayer
from vidgpt.config import VidGPTConfig
from vidgpt.decoding import reader
from vidgpt.decoding.reader import Reader
from vidgpt.fused import FusedModel
from vidgpt.generation import LayoutLogitsProcessor
from vidgpt.laws import invariants as laws
from vidgpt.laws import rollouts
from vidgpt.laws.sampled_law import speculative_law
from vidgpt.layout import TokenLayout
from vidgpt.masks import causal, sliding
from vidgpt.model import VidGPTForCausalLM
from vidgpt.sampling import Sampler

# The package's attributes of these names are functions.
diagonals, reference, streams = (import_module(f"vidgpt.decoding.{name}") for name in ("diagonal", "reference", "stream"))
Patch = Callable[[pytest.MonkeyPatch], None]
SLIDING = {"attention_frames": 2}


def _forgets_a_slot(patch: pytest.MonkeyPatch) -> None:
    write = SlotLayer._write

    def forgetful(self: SlotLayer, stored: Tensor, states: Tensor) -> None:
        write(self, stored, states)
        stored[:, :, 15] = 0

    patch.setattr(SlotLayer, "_write", forgetful)


def _shows_one_slot_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reader, "rule_of", lambda config, rule: lambda queries, keys: keys <= queries + 1)


def _mixes_rows(patch: pytest.MonkeyPatch) -> None:
    read = FusedModel.read
    patch.setattr(FusedModel, "read", lambda self, *a, **k: (logits := read(self, *a, **k)) + 0.01 * logits.mean(0, keepdim=True))


def _shows_what_lies_before_a_start(patch: pytest.MonkeyPatch) -> None:
    mask = Reader._mask

    def leaky(self: Reader, *arguments: object) -> Tensor:
        starts, self.starts = self.starts, None
        allowed = mask(self, *arguments)
        self.starts = starts
        return allowed

    patch.setattr(Reader, "_mask", leaky)


def _accepts_a_wrong_draft(patch: pytest.MonkeyPatch) -> None:
    draw = Reader.draw

    def generous(self: Reader, logits: Tensor, positions: Tensor) -> Tensor:
        drawn = draw(self, logits, positions)
        if drawn.shape[1] > 1:
            drawn[:, 0] = self.tokens.gather(1, positions.expand(len(drawn), -1))[:, 0]
        return drawn

    patch.setattr(Reader, "draw", generous)


def _biases_the_noise(patch: pytest.MonkeyPatch) -> None:
    noise = sampling.exponential_noise
    patch.setattr(sampling, "exponential_noise", lambda *a: noise(*a) ** 0.8)


def _begins_rows_too_early(patch: pytest.MonkeyPatch) -> None:
    schedule = diagonals.schedule
    patch.setattr(
        diagonals, "schedule", lambda layout, first, frames, window, delay: schedule(layout, first, frames, window - 1, delay)
    )


def _leaves_stand_ins(patch: pytest.MonkeyPatch) -> None:
    schedule = diagonals.schedule

    def careless(layout: object, first: int, *arguments: int) -> list:
        passes = list(schedule(layout, first, *arguments))
        stood_in = {position for due in passes for position in due.sources}
        for due in passes:
            due.ends = [position for position in due.ends if position not in stood_in]
        return passes

    patch.setattr(diagonals, "schedule", careless)
    patch.setattr(diagonals, "_writes", lambda due, free: due.reads)


def _generates_the_second_best(patch: pytest.MonkeyPatch) -> None:
    call = reference.DrawProcessor.__call__

    def second(self: LayoutLogitsProcessor, input_ids: Tensor, scores: Tensor) -> Tensor:
        return call(self, input_ids, scores.scatter(1, scores[:, :12].argmax(1, keepdim=True), -1e9))

    patch.setattr(reference.DrawProcessor, "__call__", second)


def _evicts(frames: int) -> Patch:
    def patch_rule(patch: pytest.MonkeyPatch) -> None:
        def rule_of(config: VidGPTConfig, rule: object) -> object:
            window = sliding(TokenLayout.from_config(config), config.attention_frames + frames, config.sink_frames)
            return lambda queries, keys: causal(queries, keys) & window(queries, keys)

        patch.setattr(reader, "rule_of", rule_of)

    return patch_rule


def _takes_a_slot_too_early(patch: pytest.MonkeyPatch) -> None:
    allocate = FusedModel.new_cache
    size = 3 * 4 + 1
    patch.setattr(FusedModel, "new_cache", lambda self, slots, *rest: allocate(self, min(slots, 2 * size), *rest))


def _shows_all_slots(patch: pytest.MonkeyPatch, more: int = 0) -> None:
    """Let every pass see what the cache has in use, and so many slots more, whatever its mask says of them."""
    read, update, causal_mask = FusedModel.read, SlotLayer.update, FusedModel._causal_mask

    def wide(self: SlotLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        update(self, key, value)
        end = self.cursor.end + more
        return self.keys[:, :, :end], self.values[:, :, :end]

    def padded(
        self: FusedModel, ids: Tensor, places: Tensor, turns: object, cache: SlotCache, mask: Tensor | None, *rest: object
    ) -> Tensor:
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, cache.cursor.end + more - mask.shape[-1]))
        return read(self, ids, places, turns, cache, mask, *rest)

    def seen_before(self: FusedModel, length: int, first: int) -> Tensor:
        return torch.nn.functional.pad(causal_mask(self, length, first), (0, more))

    patch.setattr(SlotLayer, "update", wide)
    patch.setattr(FusedModel, "read", padded)
    patch.setattr(FusedModel, "_causal_mask", seen_before)


def _keeps_the_former_clip(patch: pytest.MonkeyPatch) -> None:
    def lazy(self: SlotCache) -> None:
        self.positions, self.cursor.length, self.cursor.is_told = None, 0, False

    patch.setattr(SlotCache, "_known", _keeping_the_end(SlotCache._known))
    patch.setattr(SlotCache, "reset", lazy)
    _shows_all_slots(patch)


def _keeping_the_end(known: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def keep(self: SlotCache, like: Tensor) -> Tensor:
        end = self.end
        found = known(self, like)
        self.end = max(end, self.end)
        return found

    return keep


def _reads_unused_slots(patch: pytest.MonkeyPatch) -> None:
    _shows_all_slots(patch, more=1)


def _writes_a_slot_once(patch: pytest.MonkeyPatch) -> None:
    write = SlotLayer._write

    def once(self: SlotLayer, stored: Tensor, states: Tensor) -> None:
        former = stored.clone()
        write(self, stored, states)
        stored.copy_(torch.where(former != 0, former, stored))

    patch.setattr(SlotLayer, "_write", once)


def _rewinds_one_too_few(patch: pytest.MonkeyPatch) -> None:
    def rewind(self: SlotCache, length: int) -> None:
        self.cursor.length = length + 1

    def shorter(self: VidGPTForCausalLM, input_ids: Tensor, **rest: object) -> object:
        cache = rest.get("past_key_values")
        if cache is not None and cache.cursor.length + input_ids.shape[1] > cache.num_slots:
            cache.num_slots += 1
            for layer in cache.layers:
                layer.num_slots += 1
                layer.keys, layer.values = (torch.nn.functional.pad(part, (0, 0, 0, 1)) for part in (layer.keys, layer.values))
        return forward(self, input_ids, **rest)

    forward = VidGPTForCausalLM.forward
    patch.setattr(SlotCache, "rewind", rewind)
    patch.setattr(VidGPTForCausalLM, "forward", shorter)


def _drops_a_tensor(patch: pytest.MonkeyPatch) -> None:
    load = laws.load_model

    def lossy(*arguments: object) -> VidGPTForCausalLM:
        model = load(*arguments)
        torch.nn.init.ones_(model.model.layers[1].input_layernorm.weight)
        return model

    patch.setattr(laws, "load_model", lossy)


def _draws_from_all_ids(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "draw", lambda self, logits, positions: logits.argmax(-1))


def _counts_rows(patch: pytest.MonkeyPatch) -> None:
    noise = sampling.exponential_noise
    patch.setattr(sampling, "exponential_noise", lambda keys, *rest: noise(torch.arange(len(keys)), *rest))


def _knows_one_seed(patch: pytest.MonkeyPatch) -> None:
    noise = sampling.exponential_noise
    patch.setattr(sampling, "exponential_noise", lambda keys, *rest: noise(torch.zeros_like(keys), *rest))


def forget_the_first_lead(patch: pytest.MonkeyPatch) -> None:
    prefill = Reader.prefill

    def wrong(self: Reader, context: Tensor, *rest: object) -> None:
        if self.length:
            context[:, 0] = self.layout.separator_id
        prefill(self, context, *rest)

    patch.setattr(Reader, "prefill", wrong)


def _drops_a_frame_too_few(patch: pytest.MonkeyPatch) -> None:
    again = streams._reprefill
    patch.setattr(streams, "_reprefill", lambda reader, drop: again(reader, drop - 1))


def count_noise_from_the_window(patch: pytest.MonkeyPatch) -> None:
    prefill = Reader.prefill
    patch.setattr(Reader, "prefill", lambda self, context, starts=None, before=0: prefill(self, context, starts, 0))


def leave_actions_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenLayout, "without_actions", lambda self, ids: torch.where(ids > self.separator_id, ids - 1, ids))


def _guides_too_far(patch: pytest.MonkeyPatch) -> None:
    start = Reader.__post_init__

    def far(self: Reader) -> None:
        self.guidance = 1 + 1.01 * (self.guidance - 1)
        start(self)

    patch.setattr(Reader, "__post_init__", far)


def _repeats_rows_in_another_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotCache, "repeat_rows", lambda self, count: self.select_rows(torch.arange(3).repeat(count)))


def give_samples_one_key(patch: pytest.MonkeyPatch) -> None:
    repeat = Reader.repeat

    def alike(self: Reader, count: int, sampler: Sampler) -> None:
        keys = self.sampler.keys.repeat_interleave(count)
        repeat(self, count, Sampler(sampler.layout, sampler.options, keys, first_frames=sampler.first_frames))

    patch.setattr(Reader, "repeat", alike)


BROKEN = [
    (laws.cached, _forgets_a_slot, {}),
    (laws.cached, _evicts(-1), SLIDING),
    (laws.prefill_splits, _shows_one_slot_ahead, {}),
    (laws.batch_rows, _mixes_rows, {}),
    (laws.ragged_rows, _shows_what_lies_before_a_start, {}),
    (laws.speculative_logits, _shows_one_slot_ahead, {}),
    (laws.speculative_greedy, _accepts_a_wrong_draft, {}),
    (laws.speculative_sampled, _accepts_a_wrong_draft, {}),
    (speculative_law, _accepts_a_wrong_draft, {}),
    (speculative_law, _biases_the_noise, {}),
    (laws.wide_diagonal, _begins_rows_too_early, {}),
    (laws.narrow_diagonal, _leaves_stand_ins, {}),
    (laws.transformers_generate, _generates_the_second_best, {}),
    (laws.beyond_window, _evicts(1), SLIDING),
    (laws.beyond_window, _evicts(-1), SLIDING),
    (laws.beyond_window, _takes_a_slot_too_early, SLIDING),
    (rollouts.reprefill, forget_the_first_lead, {}),
    (rollouts.reprefill, _drops_a_frame_too_few, {}),
    (rollouts.reprefill, count_noise_from_the_window, {}),
    (rollouts.guidance, leave_actions_in, {"num_actions": 3}),
    (rollouts.guidance, _guides_too_far, {"num_actions": 3}),
    (rollouts.samples, _repeats_rows_in_another_order, {}),
    (rollouts.samples, give_samples_one_key, {}),
    (laws.stale_slots, _keeps_the_former_clip, {}),
    (laws.stale_slots, _reads_unused_slots, {}),
    (laws.overwriting, _writes_a_slot_once, {}),
    (laws.overwriting, _rewinds_one_too_few, {}),
    (laws.saved_and_loaded, _drops_a_tensor, {}),
    (laws.legal_ids, _draws_from_all_ids, {}),
    (laws.seeds, _counts_rows, {}),
    (laws.seeds, _knows_one_seed, {}),
]
BROKEN_IN_BF16 = [
    (laws.cached, _forgets_a_slot, {}),
    (laws.prefill_splits, _shows_one_slot_ahead, {}),
    (laws.ragged_rows, _shows_what_lies_before_a_start, {}),
    (laws.speculative_greedy, _accepts_a_wrong_draft, {}),
    (laws.speculative_sampled, _accepts_a_wrong_draft, {}),
    (speculative_law, _accepts_a_wrong_draft, {}),
    (speculative_law, _biases_the_noise, {}),
    (laws.narrow_diagonal, _leaves_stand_ins, {}),
    (laws.beyond_window, _evicts(1), SLIDING),
    (rollouts.reprefill, count_noise_from_the_window, {}),
    (rollouts.guidance, leave_actions_in, {"num_actions": 3}),
    (rollouts.samples, _repeats_rows_in_another_order, {}),
    (laws.stale_slots, _reads_unused_slots, {}),
    (laws.seeds, _counts_rows, {}),
]
BROKEN += [(law, how, {**options, "precision": "bf16"}) for law, how, options in BROKEN_IN_BF16]
