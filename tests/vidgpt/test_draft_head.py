"""The head that guesses a frame ahead: what it learns, that nothing else learns from it, and what guesses are worth."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import CARD as BASE_CARD
from tests.vidgpt.conftest import CODES, chosen, clips, net, ragged, roll, write_tokens
from vidgpt import training
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.stream import LongOptions
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.layout import IGNORED, TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.options import DiagonalTrainingKeys, TrainGPTOptions
from vidgpt.sampling import Sampler, SamplingOptions
from vidtok.folders import load_model

SAMPLED = SamplingOptions(temperature=1.0)
CARD = replace(BASE_CARD, codebook_size=8, codebook_factors=[8], grid_height=2, grid_width=3, frame_height=16, frame_width=24)
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 4, "draft_head": True}
RUN = {
    "batch_size": 2,
    "warmup_steps": 0,
    "checkpoint_every": 1,
    "evaluate_every": 6,
    "evaluation_clips": 2,
    "log_every": 1,
    "lr": 0.01,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), CARD, ("train",) * 4 + ("validation",) * 2, 6)


def train(folder: Path, tokens: Path, model: dict, steps: int, **keys: object) -> VidGPTForCausalLM:
    values = {**RUN, "max_steps": steps, **keys}
    training.train_gpt(TrainGPTOptions(run_dir=str(folder), tokens=str(tokens), **values), model, {"tokens": str(tokens)})
    return load_model(VidGPTForCausalLM, folder)


def read_all(model: VidGPTForCausalLM, ids: Tensor) -> tuple[Reader, Tensor]:
    layout = model.model.layout
    sampler = Sampler(layout, SAMPLED, sequence_keys(0, len(ids), ids.device))
    reader = Reader(FusedModel(model), sampler, Work(), len(ids), 4)
    queries = reader.queries(torch.arange(ids.shape[1]), ids.shape[1])
    return reader, reader.read(queries, ids.shape[1], ids, keep=ids.shape[1])


def oracle(patch: pytest.MonkeyPatch, truth: Tensor, layout: TokenLayout, wrong: int = 0) -> None:
    """Let guesses be the ids (1, frames, h, w) that raster decoding gives, all but every `wrong`-th."""
    ids = layout.flatten(truth)

    def tell(self: Sampler, logits: Tensor, positions: Tensor) -> Tensor:
        known = ids[0, positions.clamp(max=ids.shape[1] - 1)]
        return (known + (positions % wrong == 0)) % CODES if wrong else known

    draw = Sampler.guess
    patch.setattr(Sampler, "draw", lambda *arguments: draw(*arguments))
    patch.setattr(Sampler, "guess", tell)


@pytest.mark.parametrize("options", [{}, {"factors": [3, 4]}, {"factors": [3, 4], "digits": "parallel"}], ids=str)
def test_decoding_sees_the_head_that_training_sees(options: dict) -> None:
    model = net(**options)
    ids = model.model.layout.flatten(clips())
    reader, states = read_all(model, ids)
    with torch.no_grad():
        expected = model.lm_head(model.draft_head(model.model(ids).last_hidden_state))
    torch.testing.assert_close(reader.model.draft_logits(states), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, reader.logits(states), atol=1e-2)


@pytest.mark.parametrize("options", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", ["ragged", "samples", "reprefill", "window", "guided"])
def test_guesses_change_no_id(case: str, options: SamplingOptions | None) -> None:
    model, given, future, keys = net(), clips(), 3, {}
    if case == "ragged":
        given = ragged(given)
    if case == "samples":
        keys = {"samples": 2}
    if case == "reprefill":
        future, keys = 9, {"long": LongOptions("reprefill", 2)}
    if case == "window":
        model, future, keys = net(attention_frames=2), 9, {"long": LongOptions("window")}
    if case == "guided":
        model, keys = net(num_actions=3, action_dropout=0.5), {"actions": chosen(3, 5), "guidance": 2.0}
    fast = roll(model, given, future, options=options, decoding=DecodingOptions("speculative", draft="head"), **keys)
    assert torch.equal(fast, roll(model, given, future, options=options, **keys))


@pytest.mark.parametrize(("wrong", "most"), [(0, 5), (4, 26), (1, 52)])
def test_right_guesses_save_passes_and_wrong_ones_cost_no_id(wrong: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing repeats here, and no word of the model's own is right before its time.
    model, given, work = net(), clips(1), Work()
    expected = roll(model, given, 4, options=SamplingOptions(temperature=3.0))
    oracle(monkeypatch, torch.cat([given, expected], dim=1), model.model.layout, wrong)
    plan = DecodingOptions("speculative", draft_length=11)
    assert torch.equal(roll(model, given, 4, options=SamplingOptions(temperature=3.0), decoding=plan, work=work), expected)
    passes = work.forward_passes - work.prefills
    assert passes <= most and (not wrong or passes > 5)


def test_the_head_learns_the_ids_of_a_frame_later() -> None:
    layout = net().model.layout
    ids = layout.flatten(clips(2, 4))
    labels, size = layout.labels(ids), layout.tokens_per_frame
    drafts = training._draft_labels(layout, labels, share_frames=False)
    assert drafts.shape == labels.shape and (drafts[:, -size:] == IGNORED).all()
    # What position p learns is the label at p + 1, as everywhere.
    for position in (0, 1, size - 2, size, 2 * size + 3):
        later = position + 1 + size
        assert torch.equal(drafts[:, position + 1], labels[:, later])
        assert layout.is_lead(torch.tensor(later)) or torch.equal(labels[:, later], ids[:, later])


def test_a_step_teaches_every_other_frame_and_another_step_the_others() -> None:
    layout = net().model.layout
    labels = layout.labels(layout.flatten(clips(1, 5)))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        kept = (training._draft_labels(layout, labels) != IGNORED).unflatten(1, (5, -1)).any(-1)
        seen.add(tuple(kept[0].tolist()))
    assert seen == {(True, False, True, False, False), (False, True, False, True, False)}
    # Two frames have one to learn.
    short = layout.labels(layout.flatten(clips(1, 2)))
    assert (training._draft_labels(layout, short) != IGNORED).any()


def test_nothing_but_the_head_learns_from_its_loss() -> None:
    model = net()
    labels = model.model.layout.labels(ids := model.model.layout.flatten(clips()))
    model(ids, labels=labels).loss.backward()
    alone = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    found = model(ids, labels=labels, draft_labels=training._draft_labels(model.model.layout, labels))
    (found.loss + found.draft_loss).backward()
    for name, weight in model.named_parameters():
        if name.startswith("draft_head."):
            assert alone[name] is None and weight.grad.abs().sum() > 0
        else:
            assert torch.equal(weight.grad, alone[name]), name
    with pytest.raises(ValueError, match="train with model"):
        net(draft_head=False)(ids, labels=labels, draft_labels=labels)


def test_train_only_leaves_the_transformer_as_it_is(tokens: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", tokens, {**MODEL, "draft_head": False}, 2)
    assert plain.draft_head is None
    keys = {"init_from": str(tmp_path / "plain"), "train_only": "draft_head"}
    short, long = (train(tmp_path / str(steps), tokens, {}, steps, **keys) for steps in (1, 6))
    for name, weight in plain.state_dict().items():
        assert torch.equal(long.state_dict()[name], weight), name
    assert not torch.equal(long.draft_head.up_proj.weight, short.draft_head.up_proj.weight)
    with pytest.raises(ValueError, match="leave one of them away"):
        train(tmp_path / "neither", tokens, {"draft_head": False}, 1, **keys)
    # And back again.
    dropped = train(tmp_path / "dropped", tokens, {"draft_head": False}, 1, init_from=str(tmp_path / "6"))
    assert dropped.draft_head is None


def test_a_trained_head_guesses_what_comes(tokens: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (1, 40):
        model = train(tmp_path / str(steps), tokens, MODEL, steps, diagonal=DiagonalTrainingKeys(0.3))
        layout = model.model.layout
        ids = layout.flatten(training.TokenDataset(str(tokens), "train", 4)[0]["indices"][None].long())
        labels = training._draft_labels(layout, layout.labels(ids), share_frames=False)
        with torch.no_grad():
            losses.append(float(model.draft_loss(model.model(ids).last_hidden_state, labels)))
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"train_only": "lm_head", "init_from": "x"}, "train_only=lm_head is not known: give draft_head"),
        ({"train_only": "draft_head"}, "say which with init_from=DIR"),
        ({"train_only": "draft_head", "init_from": "x", "diagonal": DiagonalTrainingKeys(0.5)}, "diagonal.share would train it"),
    ],
)
def test_an_impossible_training_is_refused(keys: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainGPTOptions(run_dir="x", tokens="y", **keys)
