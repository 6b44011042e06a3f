"""Temporally teacher-forced frames: the fast way against a plain one and against rollouts of one frame; what they may see."""

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import chosen, clips, net, roll
from vidgpt import regimes
from vidgpt.fused import FusedModel
from vidgpt.regimes import FusedFrames, forced_batch_size, teacher_forced_scores, temporally_forced
from vidgpt.sampling import SamplingOptions

DRAWN = SamplingOptions(temperature=0.8, top_k=5, frame_factor=0.7)
MODELS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_actions": 3},
        {"attention_frames": 2, "sink_frames": 1},
        {"factors": [4, 3], "digits": "slots"},
        {"factors": [4, 3], "digits": "parallel", "num_actions": 3},
    ],
    ids=str,
)


def actions_of(options: dict, frames: int = 5) -> Tensor | None:
    return chosen(3, frames) if options.get("num_actions") else None


@MODELS
@pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "drawn"])
def test_frames_side_by_side_are_those_of_one_forward_pass_a_slot(options: dict, sampling: SamplingOptions | None) -> None:
    model, indices = net(**options), clips(3, 5)
    layout, actions = model.model.layout, actions_of(options)
    fast = temporally_forced(FusedModel(model), layout, indices, actions, sampling, seed=3, first_sequence=2)
    plain = temporally_forced(model, layout, indices, actions, sampling, seed=3, first_sequence=2)
    assert torch.equal(fast.generated, plain.generated)
    assert fast.generated.shape == fast.scores.nats.shape == (3, 4, layout.height, layout.width)
    for name in ("nats", "top1", "top5", "confidence"):
        ours, theirs = (getattr(forced.scores, name) for forced in (fast, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, equal_nan=True)


@MODELS
@pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "drawn"])
def test_each_frame_is_the_rollout_of_one_frame_from_the_real_past(options: dict, sampling: SamplingOptions | None) -> None:
    model, indices = FusedModel(net(**options)), clips(3, 5)
    actions = actions_of(options)
    forced = temporally_forced(model, model.layout, indices, actions, sampling, seed=3, first_sequence=2)
    for frame in range(1, 5):
        led = None if actions is None else actions[:, : frame + 1]
        drawn = roll(model, indices[:, :frame], 1, actions=led, options=sampling, seed=3, first_sequence=2)
        assert torch.equal(drawn[:, 0], forced.generated[:, frame - 1])


def test_a_frame_never_sees_its_own_real_tokens_and_always_the_real_ones_before_it() -> None:
    model, indices = FusedModel(net()), clips(3, 5)
    edited = indices.clone()
    edited[:, 2] = (edited[:, 2] + 5) % 12
    before, after = (temporally_forced(model, model.layout, ids, None) for ids in (indices, edited))
    # Frame 2 stands at place 1: it and the one before it know nothing of the edit, the one behind it does.
    assert torch.equal(before.generated[:, :2], after.generated[:, :2])
    assert torch.equal(before.scores.confidence[:, :2], after.scores.confidence[:, :2])
    assert not torch.equal(before.scores.confidence[:, 2], after.scores.confidence[:, 2])
    full = [teacher_forced_scores(net(), model.layout, ids, None).confidence[:, 1] for ids in (indices, edited)]
    assert not torch.equal(*full)


def test_the_regimes_agree_where_the_models_own_tokens_are_the_real_ones_and_nowhere_else() -> None:
    network, given = net(), clips(3, 1)
    model = FusedModel(network)
    own = torch.cat([given, roll(model, given, 4)], dim=1)
    forced, full = temporally_forced(model, model.layout, own, None), teacher_forced_scores(network, model.layout, own, None)
    assert torch.equal(forced.generated, own[:, 1:])
    assert bool(forced.scores.top1.all())
    torch.testing.assert_close(forced.scores.nats, full.nats, atol=1e-4, rtol=0)
    real = clips(3, 5)
    forced, full = temporally_forced(model, model.layout, real, None), teacher_forced_scores(network, model.layout, real, None)
    differs = (forced.scores.nats - full.nats).abs() > 1e-3
    assert not differs[:, :, 0, 0].any(), "the first token of a frame sees the same in both"
    assert differs.flatten(2)[:, :, 1:].double().mean() > 0.5


@pytest.mark.parametrize("digits", ["slots", "parallel"])
def test_the_confidence_in_an_id_of_independent_digits_is_its_probability_and_of_others_unknown(digits: str) -> None:
    model = net(factors=[4, 3], digits=digits)
    indices = clips(1, 2).repeat(12, 1, 1, 1)
    indices[:, 1, 0, 0] = torch.arange(12)
    scores = teacher_forced_scores(model, model.model.layout, indices, None)
    probability, confidence = torch.exp(-scores.nats[:, 0, 0, 0]), scores.confidence[:, 0, 0, 0]
    if digits == "parallel":
        torch.testing.assert_close(confidence, probability.max().expand(12), atol=1e-6, rtol=0)
        assert scores.top1[:, 0, 0, 0].argmax() == probability.argmax()
    else:
        assert bool(confidence.isnan().all())


def test_fewer_clips_at_once_where_their_keys_take_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FusedModel(net())
    a_clip = FusedFrames(model, model.layout.flatten(clips(1, 5))).cache.num_bytes
    monkeypatch.setattr(regimes, "HELD_CACHE", 3 * a_clip)
    assert forced_batch_size(model, 5, 16) == 3
    assert forced_batch_size(model, 5, 2) == 2
    monkeypatch.setattr(regimes, "HELD_CACHE", 1)
    assert forced_batch_size(model, 5, 16) == 1
