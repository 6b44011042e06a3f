"""Passes in fixed shapes give what passes of their own length give. A GPU replays them; here the same memory is run again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import chosen, clips, net, ragged, roll
from vidgpt import recording
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import LongOptions, stream_tokens
from vidgpt.fused import FusedModel
from vidgpt.recording import Call, RecordedPasses
from vidgpt.sampling import SamplingOptions

SAMPLED = SamplingOptions(temperature=1.0)
PLANS = (
    DecodingOptions("raster"),
    DecodingOptions("speculative"),
    DecodingOptions("speculative", draft="own"),
    DecodingOptions("diagonal"),
    DecodingOptions("diagonal", window=2, delay=3),
)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rows of unlike lengths": ({}, {"context": ragged(clips()), "future": 3}),
    "samples": ({}, {"samples": 2}),
    "guided": ({"num_actions": 3, "action_dropout": 0.1}, {"actions": chosen(3, 6), "guidance": 2.0}),
    "window": ({"attention_frames": 2, "sink_frames": 1}, {"long": LongOptions("window"), "future": 9}),
    "reprefill": ({}, {"long": LongOptions("reprefill", 2), "future": 9}),
    "digits": ({"factors": [3, 4]}, {}),
}


def as_a_graph(call: Call) -> Call:
    """Stand for a CUDA graph: what comes out lies where the next replay writes."""
    output = call().clone()

    def replay() -> Tensor:
        return output.copy_(call())

    return replay


def request(options: dict[str, Any], plan: DecodingOptions) -> dict[str, Any]:
    return {"context": clips(), "future": 4, "options": SAMPLED, "decoding": plan, **options}


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_recorded_passes_draw_the_same_ids(setting, plan: DecodingOptions) -> None:
    (config, options), recorded = setting, []

    def record(call: Call) -> Call:
        recorded.append(call)
        return as_a_graph(call)

    model = net(**config)
    found = roll(FusedModel(model, record=record), **request(options, plan))
    assert torch.equal(found, roll(FusedModel(model), **request(options, plan)))
    # Few shapes, though every pass has its own number of tokens: with and without a mask, before and after rows are repeated.
    assert 1 <= len(recorded) <= 6


@pytest.mark.parametrize("plan", PLANS[:4], ids=str)
def test_a_pass_of_more_tokens_than_any_size_is_run_as_it_is(plan: DecodingOptions, monkeypatch) -> None:
    monkeypatch.setattr(recording, "SIZES", (1, 2))
    model = net()
    found = roll(FusedModel(model, record=as_a_graph), **request({}, plan))
    assert torch.equal(found, roll(FusedModel(model), **request({}, plan)))


def test_two_rollouts_of_one_model_do_not_meet() -> None:
    model, given = FusedModel(net(), record=as_a_graph), clips(2)
    first, second = (stream_tokens(model, row[None], 4, decoding="speculative") for row in given)
    in_turn = list(zip(first, second, strict=True))
    for row, frames in zip(given, zip(*in_turn, strict=True), strict=True):
        assert torch.equal(torch.stack(frames, dim=1), roll(FusedModel(net()), row[None], 4, decoding="speculative"))


def _keeps_the_first_slots(known: Any, inputs: Any, slots: Tensor, mask: Any, used: int) -> tuple[Any, ...]:
    return known, inputs, known.slots[:, -slots.shape[1] :].clone(), mask, used


def _sees_all(known: Any, inputs: Any, slots: Tensor, mask: Any, used: int) -> tuple[Any, ...]:
    return known, inputs, slots, None, known.mask.shape[-1]


def _keeps_the_first_phases(known: Any, inputs: Any, slots: Tensor, mask: Any, used: int) -> tuple[Any, ...]:
    length = slots.shape[1]
    return known, (inputs[0], *(part[:, -length:].clone() for part in known.inputs[1:])), slots, mask, used


@pytest.mark.parametrize("breaking", [_keeps_the_first_slots, _sees_all, _keeps_the_first_phases])
def test_memory_that_is_not_filled_anew_is_seen(breaking: Callable[..., tuple[Any, ...]], monkeypatch) -> None:
    fill, filled = recording._Pass.fill, set()

    def broken(known: Any, *given: Any) -> None:
        is_first = id(known.mask) not in filled
        filled.add(id(known.mask))
        fill(*((known, *given) if is_first else breaking(known, *given)))

    monkeypatch.setattr(recording._Pass, "fill", broken)
    model = net()
    asked = replace(PLANS[1], draft_length=3)
    found = roll(FusedModel(model, record=as_a_graph), **request({}, asked))
    assert not torch.equal(found, roll(FusedModel(model), **request({}, asked)))


def test_recorded_passes_go_with_the_memory_they_were_recorded_over() -> None:
    model = FusedModel(net(), record=as_a_graph)
    cache = model.new_cache(10, 1)
    cache.recorded = RecordedPasses(lambda *inputs: inputs[0], as_a_graph)
    cache.repeat_rows(2)
    assert cache.recorded is None
