"""A thousand predicted frames: the memory of a rollout does not grow while it goes on, and its last ids are still the uncached ones."""

import gc
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import CODES, net
from vidgpt.decoding import DecodingOptions, reader
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.stream import LongOptions, stream_tokens
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.masks import build_mask, rule_of
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions

FUTURE, CONTEXT, WINDOW, SIZE = 1000, 3, 6, 5
TINY = {"grid_height": 2, "grid_width": 2, "window": WINDOW}
SAMPLED = SamplingOptions(temperature=3.0)
# Two layers, each of which looks one frame back, and at the first frame.
SLIDING = {**TINY, "attention_frames": 2, "sink_frames": 1}
MODES = {"window": (SLIDING, LongOptions("window")), "reprefill": (TINY, LongOptions("reprefill", 3))}
# Frames at which memory is weighed: after as many since the last prefill, so that all that differs is how many went before.
WEIGHED, SOON = (100, 550, 991), (31, 61, 91)


def weigh() -> tuple[int, int, int]:
    """Count live tensors, the bytes that they hold, and the blocks of Python's own memory."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values()), sys.getallocatedblocks()


def roll(
    mode: str, plan: str, weighed: tuple[int, ...] = WEIGHED, future: int = FUTURE, stop: int = FUTURE
) -> tuple[Tensor, list[tuple[int, int, int]], list[int]]:
    """Give the ids (1, context + future, h, w) before frame `stop`, what was weighed on the way, and the bytes of the cache."""
    options, long = MODES[mode]
    given = torch.randint(CODES, (1, CONTEXT, 2, 2), generator=torch.Generator().manual_seed(0))
    ids, weights, work = torch.zeros(1, CONTEXT + future, 2, 2, dtype=torch.long), [], Work()
    ids[:, :CONTEXT] = given
    stream = stream_tokens(
        FusedModel(net(**options)), given, future, options=SAMPLED, decoding=DecodingOptions(plan), long=long, work=work
    )
    cache_bytes = []
    for number, frame in enumerate(stream):
        ids[:, CONTEXT + number] = frame
        cache_bytes.append(work.cache_bytes)
        if number in weighed:
            weights.append(weigh())
        if number + 1 == stop:
            break
    return ids, weights, cache_bytes


def is_flat(weights: list[tuple[int, int, int]], weighed: tuple[int, ...] = WEIGHED) -> bool:
    tensors, held, blocks = zip(*weights, strict=True)
    # Python's own memory trembles: less than a block for four frames is no growth with frames.
    return len(set(tensors)) == len(set(held)) == 1 and max(blocks) - min(blocks) < (max(weighed) - min(weighed)) / 4


def uncached(model: VidGPTForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """Give the logits (1, n, V) of input_ids (1, n) at positions (n,), each of which sees what is here and allowed."""
    rule = build_mask(rule_of(model.config), positions[None], positions[None])
    with torch.no_grad():
        return model(ids, attention_mask=rule, position_ids=positions[None]).logits


def drawn_in_window(model: VidGPTForCausalLM, ids: Tensor, frame: int) -> tuple[Tensor, Tensor]:
    """Give the logits that predict frame `frame` and the two before it of ids (1, t, h, w), and their positions."""
    # Their receptive field: two frames before them, and the first, whose own begins with it.
    seen = torch.tensor([0, *range(frame - 4, frame + 1)])
    positions = (seen[:, None] * SIZE + torch.arange(SIZE)).flatten()
    flat = model.model.layout.flatten(ids)
    return uncached(model, flat[:, positions], positions)[:, -3 * SIZE : -1], positions[-3 * SIZE + 1 :]


def drawn_in_clip(model: VidGPTForCausalLM, ids: Tensor, frame: int) -> tuple[Tensor, Tensor]:
    """Give the same where windows of 6 frames begin anew every 3."""
    begin = (frame - 3) // 3 * 3
    clip = model.model.layout.flatten(ids[:, begin : frame + 1])
    positions = torch.arange(clip.shape[1])
    own = positions[(frame - begin) * SIZE + 1 :]
    return uncached(model, clip, positions)[:, own - 1], own + begin * SIZE


def is_exact(mode: str, ids: Tensor, frames: tuple[int, ...]) -> bool:
    """Tell whether ids of these frames and the two before each are what uncached logits draw."""
    model = net(**MODES[mode][0])
    sampler, flat = Sampler(model.model.layout, SAMPLED, sequence_keys(0, 1)), model.model.layout.flatten(ids)
    for frame in frames:
        logits, positions = {"window": drawn_in_window, "reprefill": drawn_in_clip}[mode](model, ids, frame)
        picture = ~model.model.layout.is_lead(positions)
        logits, positions = logits[:, picture], positions[picture]
        if not torch.equal(sampler.draw(logits, positions[None]), flat[:, positions]):
            return False
    return True


@pytest.mark.parametrize(("mode", "plan"), [("window", "raster"), ("reprefill", "speculative")])
def test_a_thousand_frames_take_the_memory_of_a_hundred_and_stay_exact(mode: str, plan: str) -> None:
    ids, weights, cache_bytes = roll(mode, plan)
    assert is_flat(weights), weights
    held = {"window": 1 + 2 + 2 + 1, "reprefill": WINDOW + 1}[mode]
    assert set(cache_bytes) == {held * SIZE * 2 * 2 * 16 * 4}
    assert is_exact(mode, ids, (400, 997, 1000, 1001, 1002))
    # A rollout that repeats itself would hide an old frame in place of the new.
    assert len({tuple(frame.flatten().tolist()) for frame in ids[0]}) > 800


def _keeps_logits(patch: pytest.MonkeyPatch) -> None:
    draw, kept = Reader.draw, []
    patch.setattr(Reader, "draw", lambda self, logits, positions: kept.append(logits) or draw(self, logits, positions))


def _keeps_numbers(patch: pytest.MonkeyPatch) -> None:
    draw, kept = Reader.draw, []
    patch.setattr(Reader, "draw", lambda self, logits, positions: kept.append(object()) or draw(self, logits, positions))


def _lets_the_ids_grow(patch: pytest.MonkeyPatch) -> None:
    prefill = Reader.prefill

    def longer(self: Reader, context: Tensor, *rest: object) -> None:
        former = getattr(self, "former", context)
        self.former = torch.cat([former, context], dim=1)
        prefill(self, context, *rest)

    patch.setattr(Reader, "prefill", longer)


@pytest.mark.parametrize("growing", [_keeps_logits, _keeps_numbers, _lets_the_ids_grow])
def test_growing_memory_is_seen(growing: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    growing(monkeypatch)
    assert not is_flat(roll("reprefill", "speculative", SOON, stop=92)[1], SOON)


@pytest.mark.parametrize("mode", MODES)
def test_a_frame_lost_or_left_is_seen(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_exact(mode, roll(mode, "raster", (), stop=50)[0], (41, 44, 47, 50))
    allocate = FusedModel.new_cache
    if mode == "window":
        # A frame too many, rather, which is still in the cache.
        monkeypatch.setattr(reader, "rule_of", lambda config, rule: rule)
    else:
        monkeypatch.setattr(FusedModel, "new_cache", lambda self, slots, *rest: allocate(self, 3 * SIZE, *rest))
    assert not is_exact(mode, roll(mode, "raster", (), stop=50)[0], (41, 44, 47, 50))


def test_a_longer_future_takes_only_the_room_of_its_ids_more() -> None:
    short, long = (roll("window", "raster", SOON[:1], future, 32)[1][0] for future in (SOON[0] + 5, FUTURE))
    more = FUTURE - SOON[0] - 5
    # An int64 for each place and lead, in the rollout and in what this test keeps, and for the leads that came with the request.
    assert long[0] == short[0] and 0 <= long[1] - short[1] <= 8 * more * (SIZE + 1 + 4)
