"""Ids of several digits, in slots of their own or in parallel: the laws of one digit hold for each, and arithmetic over whole ids."""

import itertools
import json
import math

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from vidgpt import regimes
from vidgpt.cache import SlotCache
from vidgpt.counts import TokenCounts
from vidgpt.decoding import DecodingOptions
from vidgpt.evaluation import evaluate_tokens, teacher_forced_scores
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.rollout import stream_tokens
from vidgpt.sampling import LayoutLogitsProcessor, SamplingOptions
from vidtok.digits import join_digits, split_digits

FACTORS = [[5], [4, 3], [8, 8, 8]]
MODES = [(digits, factors) for digits in ("slots", "parallel") for factors in FACTORS]
every_mode = pytest.mark.parametrize(("digits", "factors"), MODES, ids=str)
SLOTS, PARALLEL = ("slots", [4, 3]), ("parallel", [4, 3])


def sizes(digits: str, factors: list[int], **options: object) -> dict:
    return {
        "codebook_size": math.prod(factors),
        "factors": factors,
        "digits": digits,
        "grid_width": 2,
        "grid_height": 2,
        **options,
    }


def random_indices(layout: TokenLayout, batch: int = 2, frames: int = 4, seed: int = 0) -> torch.Tensor:
    shape = (batch, frames, layout.height, layout.width)
    return torch.randint(0, layout.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def roll_out(model, context: torch.Tensor, future: int, **options) -> torch.Tensor:
    return torch.stack(list(stream_tokens(model, context, future, **options)), dim=1)


def legal_logits(model, input_ids: torch.Tensor) -> list[list[torch.Tensor]]:
    """Give the logits (B, f) of every digit of every picture slot, slot by slot in the order of the sequence."""
    layout, logits = model.model.layout, model(input_ids).logits
    picture = [p for p in range(input_ids.shape[1]) if p % layout.tokens_per_frame]
    return [layout.due_logits(logits[:, p - 1], p % layout.tokens_per_frame - 1) for p in picture]


@every_mode
@pytest.mark.parametrize("options", [{}, {"num_actions": 3}], ids=str)
def test_a_changed_slot_changes_no_earlier_logit(digits, factors, options, make_model, make_ids) -> None:
    model = make_model(**sizes(digits, factors, **options)).double()
    layout, input_ids = model.model.layout, make_ids(model)
    other = layout.flatten(
        (layout.unflatten(input_ids) + 1) % layout.codebook_size, torch.zeros(2, 5).long() if options else None
    )
    before = model(input_ids).logits
    for place in (1, layout.tokens_per_frame + 2, 3 * layout.tokens_per_frame - 1):
        edited = input_ids.clone()
        edited[:, place] = other[:, place]
        after = model(edited).logits
        assert torch.equal(before[:, :place], after[:, :place])
        changed = input_ids[:, place] != edited[:, place]
        assert not changed.any() or not torch.equal(before[changed, place:], after[changed, place:])


@every_mode
@pytest.mark.parametrize("piece", [1, 6, 17], ids=str)
def test_cached_logits_equal_uncached_ones(digits, factors, piece, make_model, make_ids) -> None:
    model = make_model(**sizes(digits, factors, num_actions=2))
    input_ids = make_ids(model, batch=3)
    cache = SlotCache(2, input_ids.shape[1])
    parts = [model(ids, past_key_values=cache, use_cache=True).logits for ids in input_ids.split(piece, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-5, rtol=0)


@every_mode
def test_embeddings_of_digits_add_up_and_a_lead_has_one(digits, factors, make_model, make_ids) -> None:
    model = make_model(**sizes(digits, factors, num_actions=2))
    layout, input_ids = model.model.layout, make_ids(model)
    table, embedded = model.model.embed_tokens.weight, model.model.embed(input_ids)
    assert table.shape[0] == sum(factors) + 4
    assert torch.equal(embedded[:, 0], table[sum(factors)].expand(2, -1))
    starts = [0, *itertools.accumulate(factors)]
    values = split_digits(layout.unflatten(input_ids), factors)[:, 0, 0, 0]
    own = torch.stack([table[start + values[:, digit]] for digit, start in enumerate(starts[:-1])])
    expected = own.sum(0) if layout.is_parallel else own[0]
    torch.testing.assert_close(embedded[:, 1], expected)


@every_mode
@pytest.mark.parametrize("loss_chunk", [1 << 25, 40], ids=str)
def test_the_loss_is_the_mean_over_places_of_the_sum_over_digits(digits, factors, loss_chunk, make_model, make_ids) -> None:
    model = make_model(**sizes(digits, factors, loss_chunk=loss_chunk))
    layout, input_ids = model.model.layout, make_ids(model)
    logits = [part for parts in legal_logits(model, input_ids) for part in parts]
    targets = split_digits(layout.unflatten(input_ids), factors).flatten(1)
    if len(factors) == 1:
        logits = [model(input_ids).logits[:, p - 1] for p in range(input_ids.shape[1]) if p % layout.tokens_per_frame]
    nats = torch.stack([F.cross_entropy(part, target) for part, target in zip(logits, targets.unbind(1), strict=True)]).sum()
    loss = model(input_ids, labels=layout.labels(input_ids)).loss
    torch.testing.assert_close(loss, nats / (5 * layout.cells))


def test_chunks_of_a_loss_over_digits_have_its_gradients(make_model, make_ids) -> None:
    gradients = []
    for loss_chunk in (1 << 25, 40):
        model = make_model(**sizes(*PARALLEL, loss_chunk=loss_chunk))
        input_ids = make_ids(model)
        model(input_ids, labels=model.model.layout.labels(input_ids)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("mode", [SLOTS, PARALLEL], ids=str)
def test_cross_entropy_is_exact_over_all_ids_of_a_place(mode, make_model) -> None:
    model = make_model(**sizes(*mode))
    layout = model.model.layout
    indices = random_indices(layout, batch=1, frames=3).repeat(12, 1, 1, 1)
    indices[:, 1, 0, 1] = torch.arange(12)
    nats = teacher_forced_scores(model, layout, indices, None).nats[:, 0, 0, 1]
    # By the chain rule, digit after digit, from the sequence up to this place alone.
    start = layout.tokens_per_frame + 1 + layout.slots_per_place
    prefix = layout.flatten(indices[:1])[:, :start]
    for index in range(12):
        low, high = index % 4, index // 4
        parts = [model(prefix).logits[0, -1]]
        if mode == SLOTS:
            parts.append(model(torch.cat([prefix, torch.tensor([[low]])], dim=1)).logits[0, -1])
        first, second = parts[0][:4].log_softmax(-1), parts[-1][4:7].log_softmax(-1)
        assert nats[index].item() == pytest.approx(-(first[low] + second[high]).item(), abs=1e-5)
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


@every_mode
@pytest.mark.parametrize("num_actions", [0, 3])
def test_scores_agree_with_the_logits_and_large_ones_are_made_piece_by_piece(
    digits, factors, num_actions, make_model, make_ids, monkeypatch
) -> None:
    model = make_model(**sizes(digits, factors, num_actions=num_actions))
    layout, input_ids = model.model.layout, make_ids(model)
    indices = layout.unflatten(input_ids)
    actions = (input_ids[:, :: layout.tokens_per_frame] - layout.separator_id - 1).clamp(min=0) if num_actions else None
    assert torch.equal(layout.flatten(indices, actions), input_ids)
    scores = teacher_forced_scores(model, layout, indices, actions)
    logits = torch.cat([part.log_softmax(-1) for parts in legal_logits(model, input_ids) for part in parts], dim=-1)
    values = split_digits(indices, factors)
    starts = torch.tensor([0, *itertools.accumulate(factors)][:-1])
    places = (torch.arange(5 * layout.cells) * sum(factors)).view(5, 2, 2, 1) + starts
    nats = -logits.gather(1, (places + values).flatten(1)).view_as(values)[:, 1:].double()
    torch.testing.assert_close(scores.nats, nats.sum(-1), atol=1e-5, rtol=0)
    assert len(scores.digits) == (len(factors) if len(factors) > 1 else 0)
    for digit, part in enumerate(scores.digits):
        torch.testing.assert_close(part.nats, nats[..., digit], atol=1e-5, rtol=0)
    assert bool((scores.top1 <= torch.exp(-scores.nats) * math.prod(factors)).all())
    monkeypatch.setattr(regimes, "HELD_LOGITS", 3 * layout.num_logits)
    pieces = teacher_forced_scores(model, layout, indices, actions)
    torch.testing.assert_close(pieces.nats, scores.nats, atol=1e-5, rtol=0)
    assert torch.equal(pieces.top1, scores.top1)


@pytest.mark.parametrize("mode", [SLOTS, PARALLEL], ids=str)
def test_a_place_is_right_where_greedy_decoding_finds_it(mode, make_model) -> None:
    model = make_model(**sizes(*mode, grid_height=1, grid_width=1, window=2))
    layout = model.model.layout
    given = torch.arange(12).view(12, 1, 1, 1)
    greedy = roll_out(model, given, 1)
    right = teacher_forced_scores(model, layout, torch.cat([given, greedy], dim=1), None)
    wrong = teacher_forced_scores(model, layout, torch.cat([given, (greedy + 4) % 12], dim=1), None)
    assert right.top1.all()
    assert not wrong.top1.any()
    assert wrong.digits[0].top1.all()
    assert right.top5.isnan().all()


@pytest.mark.parametrize("mode", [SLOTS, PARALLEL], ids=str)
def test_an_evaluation_reports_places_and_digits(mode, make_model, tmp_path) -> None:
    model = make_model(**sizes(*mode))
    layout = model.model.layout
    indices = random_indices(layout, batch=4, frames=5)
    counts = TokenCounts(12, (2, 2), [4, 3])
    counts.update(indices)
    report = evaluate_tokens(model, layout, [{"indices": indices, "actions": None}], counts, 2, None, batch_size=3)
    report.write(tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["teacher_forced"]
    for name in ("model", "uniform"):
        digit_nats = [figures[name][f"digit_{digit}_cross_entropy_nats_per_token"] for digit in (0, 1)]
        assert sum(digit_nats) == pytest.approx(figures[name]["cross_entropy_nats_per_token"])
        digit_hits = [figures[name][f"digit_{digit}_top1_accuracy_fraction"] for digit in (0, 1)]
        assert figures[name]["top1_accuracy_fraction"] <= min(digit_hits) <= 1
    assert figures["model"]["top5_accuracy_fraction"] is None
    assert figures["unigram"]["digit_0_cross_entropy_nats_per_token"] == pytest.approx(math.log(4), rel=0.1)
    assert figures["uniform"]["cross_entropy_nats_per_token"] == pytest.approx(math.log(12))
    assert figures["uniform"]["digit_1_cross_entropy_nats_per_token"] == pytest.approx(math.log(3))
    assert figures["copy_last_frame_smoothed"]["digit_0_cross_entropy_nats_per_token"] is None
    assert figures["model"]["tokens_count"] == 4 * 4 * 4
    scores = teacher_forced_scores(model, layout, indices, None)
    assert figures["model"]["cross_entropy_nats_per_token"] == pytest.approx(scores.nats.mean().item())


def test_counts_of_other_digits_are_refused(make_model) -> None:
    model = make_model(**sizes(*SLOTS))
    with pytest.raises(ValueError, match=r"counts are of digits \[12\], the model's are \[4, 3\]"):
        evaluate_tokens(model, model.model.layout, [], TokenCounts(12, (2, 2)), 2, None)


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("num_actions", [0, 3])
def test_greedy_decoding_of_slots_equals_transformers_generate(factors, num_actions, make_model) -> None:
    model = make_model(**sizes("slots", factors, num_actions=num_actions))
    layout = model.model.layout
    given = random_indices(layout, batch=3, frames=2)
    actions = torch.tensor([[0, 2, 1, 1, 0]] * 3) if num_actions else None
    theirs = model.generate(
        layout.flatten(given, None if actions is None else actions[:, :2]),
        max_new_tokens=3 * layout.tokens_per_frame,
        do_sample=False,
        logits_processor=[LayoutLogitsProcessor(layout, actions)],
    )
    assert torch.equal(roll_out(model, given, 3, actions=actions), layout.unflatten(theirs)[:, 2:])


@every_mode
def test_greedy_decoding_equals_decoding_without_a_cache(digits, factors, make_model) -> None:
    model = make_model(**sizes(digits, factors))
    layout = model.model.layout
    indices = random_indices(layout, frames=2)
    decoded = roll_out(model, indices, 2)
    for frame, row, column in itertools.product((2, 3), (0, 1), (0, 1)):
        if (row, column) == (0, 0):
            indices = torch.cat([indices, torch.zeros_like(indices[:, :1])], dim=1)
        place = frame * layout.cells + row * 2 + column
        for digit in range(len(factors)):
            # The logits before a slot see nothing of it, so the zeros that fill the frame do no harm.
            slots = [part for parts in legal_logits(model, layout.flatten(indices)) for part in parts]
            values = split_digits(indices[:, frame, row, column], factors)
            values[:, digit] = slots[place * len(factors) + digit].argmax(-1)
            indices[:, frame, row, column] = join_digits(values, factors)
    assert torch.equal(decoded, indices[:, 2:])


@every_mode
def test_every_sampled_id_is_legal_even_when_the_model_wants_another(digits, factors, make_model) -> None:
    model = make_model(**sizes(digits, factors, num_actions=0 if digits == "parallel" else 3))
    layout = model.model.layout
    with torch.no_grad():
        model.lm_head.weight[factors[0] :] *= 100
    actions = torch.zeros(32, 5, dtype=torch.long) if layout.num_actions else None
    sampled = roll_out(model, random_indices(layout, 32, 1), 4, options=SamplingOptions(temperature=2.0), actions=actions)
    assert 0 <= int(sampled.min()) <= int(sampled.max()) < math.prod(factors)
    assert sampled.shape == (32, 4, 2, 2)


@every_mode
def test_samples_follow_the_models_distribution(digits, factors, make_model) -> None:
    model = make_model(**sizes(digits, factors, grid_height=1, grid_width=1, window=2, initializer_range=0.03))
    layout, draws, size = model.model.layout, 10_000, math.prod(factors)
    given = random_indices(layout, 1, 1)
    every_id = torch.cat([given.expand(size, -1, -1, -1), torch.arange(size).view(size, 1, 1, 1)], dim=1)
    expected = torch.exp(-teacher_forced_scores(model, layout, every_id, None).nats).flatten() * draws
    sampled = roll_out(model, given.expand(draws, -1, -1, -1), 1, options=SamplingOptions(), seed=1).flatten()
    counts = torch.bincount(sampled, minlength=size)
    assert float(expected.min()) > 5
    assert expected.max() > 1.1 * expected.min()
    assert chisquare(counts.numpy(), (expected / expected.sum() * draws).numpy()).pvalue > 1e-3


@every_mode
def test_a_sample_depends_on_its_seed_and_number_alone(digits, factors, make_model) -> None:
    model, options = make_model(**sizes(digits, factors)), SamplingOptions()
    given = random_indices(model.model.layout, batch=4, frames=2)
    together = roll_out(model, given, 3, options=options, seed=7)
    alone = roll_out(model, given[2:3], 3, options=options, seed=7, first_sequence=2)
    assert torch.equal(together[2:3], alone)


@every_mode
def test_a_frame_takes_the_forward_passes_that_the_plan_says(digits, factors, make_model, monkeypatch) -> None:
    model, passes, read = make_model(**sizes(digits, factors)), [], FusedModel.read
    monkeypatch.setattr(FusedModel, "read", lambda *a, **k: passes.append(1) or read(*a, **k))
    roll_out(model, random_indices(model.model.layout, frames=2), 3)
    assert len(passes) - 1 == 3 * DecodingOptions("raster").passes_per_frame(model.model.layout)
    assert len(passes) - 1 == 3 * 4 * (len(factors) if digits == "slots" else 1)
