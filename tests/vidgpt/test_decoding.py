from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from tests.vidgpt.conftest import CODES, COLUMNS, ROWS, WINDOW, chosen, clips, net, ragged, roll
from vidgpt.cache import SlotCache
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.stream import LongOptions, stream_tokens, unlike_training
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.sampling import LayoutLogitsProcessor, SamplingOptions

# The package's attributes of these names are functions.
rasters, speculatives, diagonals, references, streams = (
    import_module(f"vidgpt.decoding.{name}") for name in ("raster", "speculative", "diagonal", "reference", "stream")
)
SAMPLED = SamplingOptions(temperature=1.0)
SPECULATIVE = (
    DecodingOptions("speculative"),
    DecodingOptions("speculative", draft="own"),
    DecodingOptions("speculative", draft="previous"),
    DecodingOptions("speculative", draft_length=3),
)
EXACT = (
    *SPECULATIVE,
    DecodingOptions("transformers"),
    DecodingOptions("diagonal", window=COLUMNS),
    DecodingOptions("diagonal", window=9),
)
DIAGONAL = tuple(
    DecodingOptions("diagonal", window=window, delay=delay) for window, delay in ((1, 0), (2, 0), (1, 3), (2, 6), (1, 99))
)
DIGITS = ({"factors": [3, 4]}, {"factors": [3, 4], "digits": "parallel"})


def test_greedy_decoding_equals_decoding_without_a_cache() -> None:
    model, given = net(), clips()
    layout = model.model.layout
    ids = layout.flatten(given)
    for _ in range(3):
        ids = torch.cat([ids, torch.full((3, 1), layout.separator_id)], dim=1)
        for _ in range(layout.cells):
            ids = torch.cat([ids, model(ids).logits[:, -1:, :CODES].argmax(-1)], dim=1)
    assert torch.equal(roll(model, given, 3), layout.unflatten(ids)[:, 2:])


@pytest.mark.parametrize("with_actions", [False, True])
@pytest.mark.parametrize("context", [1, 3])
def test_greedy_decoding_equals_transformers_generate(with_actions, context) -> None:
    model, given = net(num_actions=3 if with_actions else 0), clips(3, context)
    layout = model.model.layout
    actions = chosen(3, WINDOW) if with_actions else None
    theirs = model.generate(
        layout.flatten(given, None if actions is None else actions[:, :context]),
        max_new_tokens=(WINDOW - context) * layout.tokens_per_frame,
        do_sample=False,
        logits_processor=[LayoutLogitsProcessor(layout, actions)],
    )
    assert torch.equal(roll(model, given, WINDOW - context, actions=actions), layout.unflatten(theirs)[:, context:])


@pytest.mark.parametrize("options", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", EXACT, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_exact_plans_give_the_ids_of_raster(plan, options, batch) -> None:
    model, given = net(), clips(batch)
    assert torch.equal(roll(model, given, 4, decoding=plan, options=options), roll(model, given, 4, options=options))


@pytest.mark.parametrize("digits", DIGITS, ids=["slots", "parallel"])
def test_exact_plans_give_the_ids_of_raster_where_ids_have_digits(digits) -> None:
    model, given = net(**digits, num_actions=3), clips()
    wide = DecodingOptions("diagonal", window=COLUMNS * model.model.layout.slots_per_place)
    plans = [*SPECULATIVE, wide, *([DecodingOptions("transformers")] if digits == DIGITS[0] else [])]
    expected = roll(model, given, 3, options=SAMPLED, actions=chosen(3, 5))
    for plan in plans:
        assert torch.equal(roll(model, given, 3, decoding=plan, options=SAMPLED, actions=chosen(3, 5)), expected), plan


def test_a_plan_that_is_not_raster_gives_other_ids() -> None:
    model, given = net(), clips()
    assert not torch.equal(roll(model, given, 4, decoding=DIAGONAL[0]), roll(model, given, 4))


@pytest.mark.parametrize("is_broken", [False, True], ids=["kept", "broken"])
def test_a_frame_takes_the_passes_of_its_plans_closed_form(is_broken, monkeypatch) -> None:
    if is_broken:
        # Reads what it needs in passes of its own.
        read = Reader.read
        monkeypatch.setattr(Reader, "read", lambda self, *a, **k: (read(self, *a, **k), read(self, *a, **k))[1])
    model, given, frames, slots = net(), clips(), 4, ROWS * COLUMNS
    layout, found, exact = model.model.layout, {}, {}
    for plan in (DecodingOptions(), *EXACT[len(SPECULATIVE) :], *DIAGONAL):
        work = Work()
        roll(model, given, frames, decoding=plan, work=work)
        assert work.frames == frames and work.prefills == 1
        found[plan] = work.forward_passes - work.prefills, plan.passes_per_frame(layout)
        exact[plan] = frames * plan.passes_per_frame(layout, frames)
    whole = {window: COLUMNS + window * (ROWS - 1) for window in (1, 2, COLUMNS)}
    expected = {
        DecodingOptions(): (frames * slots, slots),
        # generate reads the prompt again, with its first lead, and each later lead in a pass of its own.
        DecodingOptions("transformers"): (frames * (slots + 1) - 1, slots + 1),
        DecodingOptions("diagonal", window=COLUMNS): (frames * whole[COLUMNS], slots),
        DecodingOptions("diagonal", window=9): (frames * whole[COLUMNS], slots),
        DecodingOptions("diagonal", window=1): (frames * whole[1], whole[1]),
        DecodingOptions("diagonal", window=2): (frames * whole[2], whole[2]),
        DecodingOptions("diagonal", window=1, delay=3): (3 * (frames - 1) + whole[1], 3),
        DecodingOptions("diagonal", window=2, delay=6): (6 * (frames - 1) + whole[2], 6),
        DecodingOptions("diagonal", window=1, delay=99): (frames * whole[1], whole[1]),
    }
    assert (found == expected) is not is_broken
    assert exact == {plan: passes for plan, (passes, _) in expected.items()}


def test_the_passes_are_counted_where_they_happen(monkeypatch) -> None:
    model, given, work, passes = net(), clips(), Work(), []
    read = FusedModel.read
    monkeypatch.setattr(FusedModel, "read", lambda self, *a, **k: passes.append(1) or read(self, *a, **k))
    for plan in (*SPECULATIVE, *DIAGONAL, DecodingOptions()):
        roll(model, given, 4, decoding=plan, work=work)
    assert len(passes) == work.forward_passes and work.prefills == len(SPECULATIVE) + len(DIAGONAL) + 1


def test_speculation_saves_passes_where_frames_repeat_and_costs_none_elsewhere() -> None:
    model, still = net(), torch.full((1, 2, ROWS, COLUMNS), 5)
    with torch.no_grad():
        # A model that says the same for every slot.
        model.model.norm.weight.zero_()
    work = Work()
    frames = roll(model, still, 4, decoding="speculative", work=work)
    assert frames.unique().numel() == 1
    assert 4 <= work.forward_passes - 1 < 4 * ROWS * COLUMNS / 2 and 0 < work.accepted <= work.drafted
    worst = Work()
    roll(net(), clips(1), 4, decoding=SPECULATIVE[2], options=SamplingOptions(temperature=50.0), work=worst)
    assert worst.forward_passes - 1 <= 4 * ROWS * COLUMNS


def test_every_sampled_id_is_legal_even_when_the_model_wants_a_special() -> None:
    model, given = net(num_actions=3), clips(64, 1)
    with torch.no_grad():
        model.lm_head.weight[CODES:] *= 100
    hot, actions = SamplingOptions(temperature=2.0), chosen(64, 5)
    for plan in (DecodingOptions(), SPECULATIVE[0], DIAGONAL[0]):
        sampled = roll(model, given, 4, options=hot, actions=actions, decoding=plan)
        assert sampled.shape == (64, 4, ROWS, COLUMNS) and 0 <= int(sampled.min()) <= int(sampled.max()) < CODES


def test_an_action_changes_the_frames_from_its_own_on() -> None:
    model, given, actions = net(num_actions=3), clips(4, 1), chosen(4, 5)
    edited = actions.clone()
    edited[:, 3] = (edited[:, 3] + 1) % 3
    before, after = (roll(model, given, 4, actions=taken) for taken in (actions, edited))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_samples_follow_the_models_distribution() -> None:
    model = net(codebook_size=4, grid_height=1, grid_width=1)
    layout = model.model.layout
    given = torch.tensor([2]).view(1, 1, 1, 1)
    sampled = roll(
        model, given, 1, options=SamplingOptions(temperature=2.0), seed=1, samples=4000, decoding="speculative"
    ).flatten()
    ids = torch.cat([layout.flatten(given), torch.tensor([[layout.separator_id]])], dim=1)
    expected = (model(ids).logits[0, -1, :4] / 2).softmax(-1) * 4000
    chi_square = ((torch.bincount(sampled, minlength=4) - expected).square() / expected).sum()
    assert bool((expected > 5).all()) and float(chi_square.detach()) < 16.27  # 0.1 % point of 3 degrees of freedom


@pytest.mark.parametrize("plan", [DecodingOptions(), SPECULATIVE[0], DIAGONAL[0], DIAGONAL[2]], ids=str)
def test_frames_come_one_by_one(plan) -> None:
    model, work = net(), Work()
    stream = stream_tokens(model, clips(), 4, decoding=plan, work=work)
    assert work.forward_passes == 0
    first = next(stream)
    assert work.forward_passes - 1 <= ROWS * COLUMNS and torch.equal(first, roll(model, clips(), 4, decoding=plan)[:, 0])
    assert isinstance(stream, Iterator) and len(list(stream)) == 3


def test_generate_runs_on_our_cache() -> None:
    model = net()
    prompt = model.model.layout.flatten(clips())
    with_ours = model.generate(prompt, max_new_tokens=15, do_sample=False, past_key_values=SlotCache(2, 45))
    assert torch.equal(with_ours, model.generate(prompt, max_new_tokens=15, do_sample=False, use_cache=False))


def test_generate_past_the_window_is_one_sentence() -> None:
    model = net()
    prompt = model.model.layout.flatten(clips(1, 5))
    # The last token needs no position of its own: it is never read.
    assert model.generate(prompt, max_new_tokens=14, do_sample=False).shape[1] == 79
    with pytest.raises(ValueError, match="position_ids from 78 to 78 do not fit the window of 6 frames"):
        model.generate(prompt, max_new_tokens=15, do_sample=False)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"decoding": "rasta"}, "'rasta' is not one of raster"),
        (
            {"model": net(draft_head=False), "decoding": DecodingOptions("speculative", draft="head")},
            "needs a model with a draft head",
        ),
        ({"future": 5}, "exceed the window of 6 frames"),
        ({"future": 0}, "both must be 1 or more"),
        ({"samples": 0}, "samples=0"),
        ({"guidance": 2.0}, "guidance=2.0 needs a model that was trained with actions"),
        ({"actions": chosen(3, 6)}, "trained without actions"),
        ({"future": 9, "long": LongOptions("window")}, "train with model.attention_frames"),
        ({"future": 9, "long": LongOptions("reprefill", 6)}, "long.drop=6"),
        ({"context": clips(3, 7), "future": 1}, "window of 6 frames"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_any_work(keys, sentence, monkeypatch) -> None:
    monkeypatch.setattr(FusedModel, "read", lambda *_, **__: pytest.fail("the context was read"))
    with pytest.raises(ValueError, match=sentence):
        stream_tokens(**{"model": net(), "context": clips(), "future": 4, **keys})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DecodingOptions("diagonal", window=0), "window=0"),
        (lambda: DecodingOptions("diagonal", delay=-1), "delay=-1"),
        (lambda: DecodingOptions("speculative", draft="other"), "speculative.draft='other' is not one of "),
        (lambda: DecodingOptions("speculative", draft_length=-1), "draft_length=-1"),
        (lambda: LongOptions("forever"), "long.mode='forever' is not one of stop, reprefill, window"),
        (lambda: LongOptions("reprefill", -1), "long.drop=-1"),
        (lambda: stream_tokens(net(num_actions=3), clips(), 3), "trained with 3 actions, and none came"),
        (lambda: stream_tokens(net(num_actions=3), clips(), 3, actions=chosen(2, 5)), "actions of 2 clips came for 3 clips"),
        (
            lambda: stream_tokens(net(num_actions=3), clips(), 3, actions=chosen(3, 5), guidance=2.0),
            "guidance=2.0 needs a model that was trained without its actions too, .* action_dropout=0.1",
        ),
        (
            lambda: stream_tokens(net(num_actions=3), clips(), 3, actions=chosen(3, 5), guidance=-1.0),
            "guidance=-1.0 is no number",
        ),
        (lambda: stream_tokens(net(**DIGITS[1]), clips(), 3, decoding="transformers"), "predicts several digits at once"),
        (
            lambda: stream_tokens(net(attention_frames=2, sink_frames=1), ragged(clips()), 9, long=LongOptions("window")),
            "clips of one length",
        ),
        (lambda: stream_tokens(net(attention_frames=2, sink_frames=1), ragged(clips()), 3), "clips of one length"),
    ],
)
def test_wrong_options_are_one_sentence(make, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("trained", "plan", "said"),
    [
        ({}, DecodingOptions("raster"), None),
        ({}, DecodingOptions("diagonal", window=4), None),
        ({}, DecodingOptions("diagonal", window=9), None),
        ({}, DecodingOptions("diagonal", window=2), "was not trained for decoding=diagonal"),
        ({"diagonal_window": 2}, DecodingOptions("diagonal", window=2), None),
        # As many passes as a frame takes are no delay.
        ({"diagonal_window": 2}, DecodingOptions("diagonal", window=2, delay=8), None),
        ({"diagonal_window": 2}, DecodingOptions("diagonal", window=2, delay=7), "diagonal.window=2 diagonal.delay=7 costs"),
        ({"diagonal_window": 1}, DecodingOptions("diagonal", window=2), "trained for diagonal.window=1 diagonal.delay=0, and"),
        (
            {"diagonal_window": 1, "diagonal_delay": 2},
            DecodingOptions("diagonal"),
            "trained for diagonal.window=1 diagonal.delay=2",
        ),
    ],
)
def test_a_diagonal_that_was_not_trained_is_told(trained: dict, plan: DecodingOptions, said: str | None) -> None:
    config = net(**trained, diagonal_share=0.5 if trained else 0.0).config
    found = unlike_training(config, plan)
    assert found is None if said is None else said in str(found) and "\n" not in str(found)


@pytest.mark.parametrize("plan", DIAGONAL[:4], ids=str)
def test_passes_that_were_moved_on_a_frame_are_those_made_anew(plan: DecodingOptions, monkeypatch) -> None:
    moved, is_a_frame_before = [], diagonals._Block.is_a_frame_before
    model, given = net(window=16), clips(2, 3)
    for is_tried in (True, False):

        def watched(*arguments: object, is_tried: bool = is_tried) -> bool:
            moved.append(is_tried and is_a_frame_before(*arguments))
            return moved[-1]

        monkeypatch.setattr(diagonals._Block, "is_a_frame_before", watched)
        found = roll(model, given, 13, decoding=plan, options=SAMPLED)
        if is_tried:
            expected, was_moved = found, any(moved)
    assert torch.equal(found, expected)
    assert was_moved
