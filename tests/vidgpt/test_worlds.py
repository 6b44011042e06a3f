"""Worlds against brute force; a model that is the law proves sampler, regimes and figures, and wrong ones are caught."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.vidgpt.test_checkpoint_evaluation import MODEL
from vidgpt.clip_sums import Bootstrap
from vidgpt.evaluate import main
from vidgpt.evaluation import evaluate_tokens
from vidgpt.finetuning import config_for
from vidgpt.metrics import CALIBRATION, HIGH, LOW, TokenCounts
from vidgpt.model import VidGPTForCausalLM
from vidgpt.monitor import STEADY
from vidgpt.noise import sequence_keys
from vidgpt.pages import headline
from vidgpt.regimes import temporally_forced
from vidgpt.sampling import Sampler, SamplingOptions
from vidgpt.token_report import Setting, TokenReport
from vidgpt.worlds import MOVES, Chains, LawModel, Sprite, World, load_world, score_law, write_world
from vidtok.card import Card
from vidtok.folders import save_model

CHAINS, STILL_LAW, WALK = Chains(6, 3, 3), Sprite(3, 4), Sprite(3, 4, is_random=True)
every_world = pytest.mark.parametrize("world", [CHAINS, STILL_LAW, WALK], ids=["chains", "sprite", "walk"])
DRAWN = SamplingOptions()


class Leaking(LawModel):
    """Sees the token that it predicts."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids).logits
        logits[:, :-1] += nn.functional.one_hot(input_ids[:, 1:], logits.shape[-1]) * 2
        return SimpleNamespace(logits=logits)


class Shifted(LawModel):
    """Says at a position what stands there, not what comes next."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids).logits.roll(1, dims=1))


def roll_out(model: LawModel, context: Tensor, future: int) -> Tensor:
    """Sample a future of a model that has no cache, slot by slot."""
    layout, keys = model.layout, sequence_keys(5, len(context))
    sampler, frames = Sampler(layout, DRAWN, keys), [context]
    for _ in range(future):
        ids = layout.flatten(torch.cat([*frames, context[:, :1] * 0], dim=1))[:, : -layout.slots_per_frame]
        for _ in range(layout.slots_per_frame):
            drawn = sampler.draw(model(ids).logits[:, -1:], torch.tensor([[ids.shape[1]]]).expand(len(ids), -1))
            ids = torch.cat([ids, drawn], dim=1)
        frames.append(layout.frame(ids[:, -layout.slots_per_frame :])[:, None])
    return torch.cat(frames[1:], dim=1)


def evaluate(world: World, model: LawModel, clips: int = 60, frames: int = 6, **options: object) -> TokenReport:
    indices, counts = world.sample(clips, frames, seed=1), TokenCounts(world.codebook_size, (world.height, world.width))
    counts.update(world.sample(100, 6, seed=2))
    setting = Setting(None, lambda ids: score_law(world, ids), bootstrap=Bootstrap(400))
    batch = {"indices": indices, "actions": None}
    return evaluate_tokens(model, model.layout, [batch], counts, 2, None, setting=setting, batch_size=60, **options)  # type: ignore[arg-type]


@every_world
def test_the_law_is_a_distribution_and_never_rules_out_what_happens(world: World) -> None:
    clips = world.sample(200, 5)
    law = world.law(clips)
    assert law.shape == (200, 4, world.height, world.width, world.codebook_size)
    torch.testing.assert_close(law.sum(-1), torch.ones(law.shape[:-1], dtype=torch.float64))
    assert float(law.min()) >= 0
    assert float(law.gather(-1, clips[:, 1:, ..., None]).min()) > 0
    assert torch.equal(world.sample(3, 4, seed=9), world.sample(3, 4, seed=9))
    assert not torch.equal(world.sample(3, 4, seed=9), world.sample(3, 4, seed=10))


def test_chains_move_as_their_matrix_says_and_begin_where_they_stay() -> None:
    clips = CHAINS.sample(20_000, 3)
    before, after = clips[:, 0].flatten(), clips[:, 1].flatten()
    counted = torch.zeros(6, 6, dtype=torch.float64).index_put_(
        (before, after), torch.ones(len(before)).double(), accumulate=True
    )
    torch.testing.assert_close(counted / counted.sum(1, keepdim=True), CHAINS.transitions, atol=0.02, rtol=0)
    torch.testing.assert_close(CHAINS.stationary @ CHAINS.transitions, CHAINS.stationary)
    torch.testing.assert_close(
        torch.bincount(clips[:, 2].flatten()).double() / before.numel(), CHAINS.stationary, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("world", [STILL_LAW, WALK], ids=["sprite", "walk"])
def test_the_law_of_a_sprite_gives_every_next_frame_its_probability(world: Sprite) -> None:
    place, colour = 5, 3
    ends = [((place // 4 + down) % 3) * 4 + (place % 4 + right) % 4 for down, right in MOVES]
    frames = torch.zeros(12, 2, 12, dtype=torch.long)
    frames[:, 0, place] = colour
    frames[torch.arange(12), 1, torch.arange(12)] = colour
    frames = frames.view(12, 2, 3, 4)
    probability = world.law(frames).gather(-1, frames[:, 1:, ..., None]).flatten(1).prod(1)
    expected = torch.zeros(12, dtype=torch.float64)
    for end in ends if world.is_random else [ends[colour - 1]]:
        expected[end] += 1 / len(MOVES) if world.is_random else 1
    torch.testing.assert_close(probability, expected)


@every_world
def test_a_perfect_model_costs_the_entropy_and_says_how_sure_it_may_be(world: World) -> None:
    report = evaluate(world, LawModel(world), clips=400)
    figures = report.metrics()["teacher_forced"]
    model, law, name = figures["model"], figures["true_law"], "cross_entropy_nats_per_token"
    assert model[name] == pytest.approx(law[name], abs=1e-6)
    assert model["gap_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert model[name + LOW] - 1e-6 <= world.entropy_nats_per_token <= model[name + HIGH] + 1e-6
    assert model[CALIBRATION] < 0.02
    assert figures["copy_last_frame_smoothed"]["gap_nats_per_token" + LOW] > 0.01
    assert min(value[name] for baseline, value in figures.items() if baseline not in ("model", "true_law")) > model[name]


def test_what_a_perfect_model_draws_by_itself_moves_as_the_world_does() -> None:
    context = CHAINS.sample(60, 2, seed=3)
    drawn = roll_out(LawModel(CHAINS), context, 6)
    share = float((drawn[:, 1:] != drawn[:, :-1]).double().mean())
    expected = 1 - float((CHAINS.stationary * CHAINS.transitions.diagonal()).sum())
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / drawn[:, 1:].numel()))
    model, indices = LawModel(CHAINS), CHAINS.sample(60, 8, seed=3)
    batch = {"indices": indices, "actions": None}
    report = evaluate_tokens(
        model, model.layout, [batch], None, 2, lambda given, future, _: roll_out(model, given, future), batch_size=60
    )
    assert report.monitor is not None and report.monitor.state == STEADY


def test_own_tokens_inside_a_frame_cost_nothing_where_places_are_independent_and_much_where_they_are_not() -> None:
    found = {}
    for name, world in (("chains", CHAINS), ("walk", WALK)):
        model = LawModel(world)
        report = evaluate(
            world, model, force=lambda ids, _, model=model: temporally_forced(model, model.layout, ids, None, DRAWN, seed=4)
        )
        figures = report.metrics()
        found[name] = [figures[regime]["model"] for regime in ("teacher_forced", "temporally_teacher_forced")]
    nats = {name: [regime["cross_entropy_nats_per_token"] for regime in regimes] for name, regimes in found.items()}
    assert nats["chains"][0] == pytest.approx(nats["chains"][1], abs=1e-9)
    assert nats["walk"][1] > 5 * nats["walk"][0]
    # Two draws of one law are alike as often as its law says: a sprite in one of six places.
    own = found["walk"][1]
    assert own["changed_tokens_generated_fraction"] == pytest.approx(own["changed_tokens_fraction"], rel=0.1)


@every_world
def test_a_model_that_sees_what_it_predicts_is_better_than_the_law_and_is_told_so(world: World) -> None:
    report = evaluate(world, Leaking(world))
    found = report.gaps()["model"]
    if world.entropy_nats_per_token:
        assert float(found["gap_nats_per_token" + HIGH] or 0) < -1e-3
        assert "no model can be better than the law" in headline(report)[-1]
    else:
        assert found["gap_nats_per_token"] == pytest.approx(0, abs=1e-6)


@every_world
def test_a_model_that_is_one_place_off_is_worse_than_the_law(world: World) -> None:
    report = evaluate(world, Shifted(world))
    assert float(report.gaps()["model"]["gap_nats_per_token" + LOW] or 0) > 0.05
    assert headline(report)[-1].startswith("gap to a perfect model: ")


def test_a_model_of_written_world_tokens_is_laid_beside_the_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_world(tmp_path / "tokens", CHAINS, clips=20, held_out=5, frames=6)
    assert load_world(tokens) == (CHAINS, pytest.approx(CHAINS.entropy_nats_per_token, abs=1e-8))
    card = Card.load(tokens)
    torch.manual_seed(0)
    save_model(VidGPTForCausalLM(config_for(card, MODEL)), tmp_path / "gpt")
    card.save(tmp_path / "gpt")
    arguments = [f"checkpoint={tmp_path / 'gpt'}", f"tokens={tokens}", f"output={tmp_path / 'out'}", "context=2", "resamples=50"]
    main([*arguments, "rollout_clips=2"])
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    forced = figures["teacher_forced"]
    assert forced["true_law"]["cross_entropy_nats_per_token"] == pytest.approx(CHAINS.entropy_nats_per_token, rel=0.2)
    gap = forced["model"]["cross_entropy_nats_per_token"] - forced["true_law"]["cross_entropy_nats_per_token"]
    assert 0 < forced["model"]["gap_nats_per_token" + LOW] < forced["model"]["gap_nats_per_token"] == pytest.approx(gap)
    assert set(figures["temporally_teacher_forced"]) == set(forced) - {"true_law"}
    assert "gap to a perfect model" in capsys.readouterr().out
    (tokens / "world.json").write_text('{"entropy_nats_per_token": 0.25}')
    main([*arguments, "rollout_clips=0", "temporally_forced=false"])
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(figures) & {"temporally_teacher_forced", "free_running"} == set()
    model = figures["teacher_forced"]["model"]
    for end in ("", LOW, HIGH):
        assert model["gap_nats_per_token" + end] == pytest.approx(model["cross_entropy_nats_per_token" + end] - 0.25)


@pytest.mark.parametrize("text", ["[]", "{", '{"entropy_nats_per_token": -1}', '{"name": "chains", "entropy_nats_per_token": 1}'])
def test_a_world_file_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(ValueError, match="does not say what these tokens are of"):
        load_world(tmp_path)
    assert load_world(tmp_path / "elsewhere") == (None, None)


def test_a_world_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="two ids or more"):
        Chains(codebook_size=1)
    with pytest.raises(ValueError, match="3x3 or more"):
        Sprite(2, 4)
