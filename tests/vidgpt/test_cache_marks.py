"""Masks are made ahead of the passes, from arithmetic; marks follow the passes. What a mask shows, a mark must name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import clips, net, ragged, roll
from vidgpt.cache import SlotCache
from vidgpt.decoding import DecodingOptions, reader
from vidgpt.decoding.stream import LongOptions
from vidgpt.fused import FusedModel
from vidgpt.sampling import SamplingOptions

PLANS = {
    "raster": DecodingOptions("raster"),
    "speculative": DecodingOptions("speculative"),
    "diagonal": DecodingOptions("diagonal"),
    "delayed": DecodingOptions("diagonal", window=1, delay=2),
}
SLIDING = {"attention_frames": 2}


class Watch:
    """Looks on while a rollout reads, and counts what a pass shows of slots whose mark is another position's, or none."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.shown, self.unmarked, self.is_round = 0, 0, False
        writing, read, positions_of = SlotCache.writing, FusedModel.read, SlotCache.slot_positions
        watch = self

        @contextmanager
        def marked(cache: SlotCache, positions: Tensor, end: int) -> Iterator[Tensor]:
            with writing(cache, positions, end) as in_slots:
                watch.marks, watch.end = in_slots, end
                yield in_slots

        def seen(model: FusedModel, ids: Tensor, places: Tensor, turns: object, cache: SlotCache, mask: Tensor | None,
                 is_causal: bool = False, keep: int = 1) -> Tensor:  # fmt: skip
            watch.look(cache, ids.shape[1], mask, is_causal)
            return read(model, ids, places, turns, cache, mask, is_causal, keep)

        def thought(cache: SlotCache, end: int, device: object = "cpu") -> Tensor:
            watch.thought = positions_of(cache, end, device)
            return watch.thought

        patch.setattr(SlotCache, "slot_positions", thought)
        patch.setattr(SlotCache, "writing", marked)
        patch.setattr(FusedModel, "read", seen)

    def look(self, cache: SlotCache, count: int, mask: Tensor | None, is_causal: bool) -> None:
        used = self.marks.shape[1]
        if mask is None:
            allowed = torch.ones(1, count, used, dtype=torch.bool)
            allowed = allowed.tril() if is_causal else allowed
            thought = torch.arange(used)
        else:
            # Of the newest mask, which was made for this pass and others.
            allowed, thought = mask[:, 0] == 0, self.thought[:used]
            if len(thought) < used:  # a mask of a frame before, moved on, which nobody does where slots go round
                thought = torch.arange(used)
        is_wrong = (self.marks != thought)[:, None] & allowed
        self.shown, self.unmarked = self.shown + int(allowed.sum()), self.unmarked + int(is_wrong.sum())
        self.is_round |= self.end > cache.num_slots


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("options", "future", "long"),
    [({}, 4, LongOptions()), ({}, 9, LongOptions("reprefill", 2)), (SLIDING, 16, LongOptions("window"))],
    ids=["stop", "reprefill", "window"],
)
@pytest.mark.parametrize("given", [clips(), ragged(clips())], ids=["alike", "ragged"])
def test_a_pass_is_shown_what_is_marked(given, options: dict, future: int, long: LongOptions, plan: str, monkeypatch) -> None:
    watch = Watch(monkeypatch)
    future -= isinstance(given, list) and long.mode == "stop"
    roll(net(**options), given, future, decoding=PLANS[plan], options=SamplingOptions(), long=long)
    assert watch.shown > 1000 and watch.unmarked == 0
    assert watch.is_round == (long.mode == "window")


def _takes_a_frame_for_the_next(patch: pytest.MonkeyPatch) -> None:
    positions = SlotCache.slot_positions
    patch.setattr(SlotCache, "slot_positions", lambda self, end, device="cpu": positions(self, end, device).roll(13))


def _shows_one_slot_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reader, "rule_of", lambda config, rule: lambda queries, keys: keys <= queries + 1)


def _forgets_to_write(patch: pytest.MonkeyPatch) -> None:
    slots_of = SlotCache._slots_of
    patch.setattr(SlotCache, "_slots_of", lambda self, positions, end: slots_of(self, positions, end).clamp(max=end - 2))


@pytest.mark.parametrize("broken", [_takes_a_frame_for_the_next, _shows_one_slot_ahead, _forgets_to_write])
def test_what_is_not_marked_is_seen(broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    watch = Watch(monkeypatch)
    roll(net(**SLIDING), clips(), 9, long=LongOptions("window"))
    assert watch.unmarked > 0
