"""Training that goes on from a trained transformer, and the options that change what a step sees."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vidgpt.conftest import CARD as BASE_CARD
from tests.vidgpt.conftest import write_tokens
from vidgpt import training
from vidgpt.config import FIELDS_FROM_TRAINING, VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import DiagonalKeys, DiagonalTrainingKeys, TrainGPTOptions
from vidgpt.train import main
from vidgpt.training import train_gpt
from vidtok.folders import load_model
from vidtok.runner import Runner

MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 4}
RUN = {"batch_size": 2, "warmup_steps": 0, "checkpoint_every": 1, "evaluate_every": 6, "evaluation_clips": 2, "log_every": 1}
ALL = {"diagonal": DiagonalTrainingKeys(0.5), "token_corruption": 0.3, "action_dropout": 0.5, "use_actions": True}
CARD = replace(
    BASE_CARD, codebook_size=8, codebook_factors=[8], grid_height=2, grid_width=3, frame_height=16, frame_width=24, num_actions=3
)
SPLITS = ("train",) * 4 + ("validation",) * 2


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), CARD, SPLITS, 6)


def train(folder: Path, tokens: Path, model: dict[str, Any], **changes: Any) -> VidGPTForCausalLM:
    values = RUN | {"max_steps": 2, "lr": 0.01} | changes
    options = TrainGPTOptions(run_dir=str(folder), tokens=str(tokens), **values)
    plain = {key: asdict(value) if key == "diagonal" else value for key, value in values.items()}
    train_gpt(options, model, {**plain, "tokens": str(tokens), "model": model})
    return load_model(VidGPTForCausalLM, folder)


def is_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def weights(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


def test_training_starts_at_the_given_weights(tokens: Path, tmp_path: Path) -> None:
    original = train(tmp_path / "first", tokens, {**MODEL, "attention_frames": 2})
    same = train(tmp_path / "same", tokens, {}, init_from=str(tmp_path / "first"), max_steps=1, lr=1e-12)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, atol=1e-8, rtol=0)
    assert same.config.to_diff_dict() == original.config.to_diff_dict()
    assert not is_same(train(tmp_path / "fresh", tokens, MODEL, max_steps=1, lr=1e-12), original)
    wider = {"window": 6, "attention_frames": 3, "sink_frames": 1, "hidden_size": 32}
    longer = train(tmp_path / "longer", tokens, wider, init_from=str(tmp_path / "first"))
    assert (longer.config.window, longer.config.attention_frames, longer.config.sink_frames) == (6, 3, 1)
    assert longer.config.max_position_embeddings == 6 * 7
    assert not is_same(longer, original)


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        (
            {"hidden_size": 64},
            {},
            r"^model\.hidden_size=64, but the transformer of init_from=.*first has hidden_size=32: leave model=",
        ),
        ({"rope_theta": 50.0}, {}, r"^model\.rope_theta=50\.0, but .* has rope_theta=100\.0"),
        ({"factors": [2, 4]}, {}, r"^model\.factors=\[2, 4\], but .* has factors=\[8\]"),
        ({"window": 7}, {}, r"^model\.window=7 latent frames, but the longest training clip of .* has 6"),
        (
            {},
            {"use_actions": True},
            "^use_actions=true, but the transformer of init_from=.*first knows 0 actions: set it to false",
        ),
        ({}, {"init_from": "nowhere"}, "^init_from: checkpoint nowhere does not exist"),
    ],
)
def test_a_contradiction_is_refused(model, changes, sentence, tokens: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", tokens, MODEL)
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path / "run", tokens, model, **{"init_from": str(tmp_path / "first"), **changes})
    # The folder may be used again once the mistake is mended.
    train(tmp_path / "run", tokens, {}, init_from=str(tmp_path / "first"))


def test_tokens_of_another_tokenizer_are_refused(tokens: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", tokens, MODEL)
    others = write_tokens(tmp_path / "others", replace(CARD, tokenizer_fingerprint="ffff"), SPLITS, 6)
    with pytest.raises(ValueError, match=r"^init_from: .*first has tokenizer_fingerprint=0123456789abcdef, but .*others has"):
        train(tmp_path / "run", others, {}, init_from=str(tmp_path / "first"))


def test_the_command_takes_the_architecture_from_init_from(tokens: Path, tmp_path: Path, capsys) -> None:
    first = train(tmp_path / "first", tokens, MODEL)
    keys = [f"{key}={value}" for key, value in RUN.items()]
    keys += [f"tokens={tokens}", f"init_from={tmp_path / 'first'}", "max_steps=1"]
    main([*keys, f"run_dir={tmp_path / 'tuned'}", "model.attention_frames=2"])
    tuned = load_model(VidGPTForCausalLM, tmp_path / "tuned")
    assert (tuned.config.hidden_size, tuned.config.window, tuned.config.attention_frames) == (32, 4, 2)
    assert first.config.attention_frames == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*keys, f"run_dir={tmp_path / 'other'}", "model=tiny"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("vidgpt-train: model.hidden_size=192, but the transformer of init_from=")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"token_corruption": -0.1}, r"token_corruption=-0\.1 is not allowed"),
        ({"action_dropout": 2.0, "use_actions": True}, r"action_dropout=2\.0 is not allowed"),
        ({"action_dropout": 0.1}, r"action_dropout=0\.1 has no actions to leave out: give use_actions=true too"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainGPTOptions(**options)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"share": 1.5}, r"diagonal\.share=1\.5 is not allowed: give 0 \(off\) to 1"),
        ({"window": 0}, r"diagonal\.window=0 and diagonal\.delay=0 are not allowed"),
        ({"delay": -1}, r"diagonal\.delay=-1 are not allowed"),
    ],
)
def test_an_impossible_diagonal_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DiagonalTrainingKeys(**keys)


@pytest.mark.parametrize("option", ["diagonal", "token_corruption", "action_dropout"])
def test_each_option_changes_what_is_learned(option: str, tokens: Path, tmp_path: Path) -> None:
    off, on = (DiagonalTrainingKeys(share) if option == "diagonal" else share for share in (0.0, 1.0))
    plain = train(tmp_path / "plain", tokens, MODEL, use_actions=True)
    assert is_same(train(tmp_path / "again", tokens, MODEL, use_actions=True, **{option: off}), plain)
    assert not is_same(train(tmp_path / "changed", tokens, MODEL, use_actions=True, **{option: on}), plain)


def how_trained(config: VidGPTConfig) -> tuple[float, float, int, int]:
    return config.action_dropout, config.diagonal_share, config.diagonal_window, config.diagonal_delay


def test_a_model_knows_how_it_was_trained(tokens: Path, tmp_path: Path) -> None:
    keys = {"use_actions": True, "max_steps": 1}
    plain = train(tmp_path / "plain", tokens, MODEL, **keys)
    assert how_trained(plain.config) == (0, 0, 0, 0)
    first = train(tmp_path / "first", tokens, MODEL, **keys, action_dropout=0.5)
    assert how_trained(first.config) == (0.5, 0, 0, 0)
    second = train(
        tmp_path / "second", tokens, {}, **keys, init_from=str(tmp_path / "first"), diagonal=DiagonalTrainingKeys(1, 2, 3)
    )
    assert how_trained(second.config) == (0.5, 1, 2, 3)
    other = {"init_from": str(tmp_path / "second"), "action_dropout": 0.25, "diagonal": DiagonalTrainingKeys(0.5)}
    third = train(tmp_path / "third", tokens, {}, **keys, **other)
    assert how_trained(third.config) == (0.25, 0.5, 1, 0)
    # A folder of an older version says nothing.
    file = tmp_path / "third" / "model" / "config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key not in FIELDS_FROM_TRAINING}
    file.write_text(json.dumps(values))
    assert how_trained(load_model(VidGPTForCausalLM, tmp_path / "third").config) == (0, 0, 0, 0)


@pytest.mark.parametrize("key", ["model.action_dropout=0.1", "model.diagonal_window=2"])
def test_how_a_model_was_trained_is_not_the_users_to_say(key: str, tokens: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"tokens={tokens}", f"run_dir={tmp_path / 'run'}", "max_steps=1", key])
    assert stop.value.code == 2 and key.partition("=")[0] in capsys.readouterr().err


def test_training_and_decoding_name_the_diagonal_alike() -> None:
    assert {option.name for option in fields(DiagonalTrainingKeys)} == {option.name for option in fields(DiagonalKeys)} | {
        "share"
    }


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 4, "digits": "slots", "factors": [2, 4]}], ids=["digit", "slots"])
def test_the_loss_of_diagonal_steps_is_measured_on_the_same_tokens(options, tokens: Path, tmp_path: Path) -> None:
    for window, is_equal in ((6, True), (1, False)):
        folder, keys = tmp_path / str(window), {"max_steps": 6, "lr": 0.1, "precision": "fp32"}
        train(folder, tokens, MODEL | options, diagonal=DiagonalTrainingKeys(0.5, window), **keys)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (abs(last["validation_diagonal_loss"] - last["validation_loss"]) < 1e-5) == is_equal
        # The model that is kept is the best at what is trained.
        mixed = 0.5 * (last["validation_diagonal_loss"] + last["validation_loss"])
        assert last["validation_mixed_loss"] == pytest.approx(mixed)
        state = json.loads((folder / "checkpoints" / "step_000006" / "state.json").read_text())
        assert state["best"] == pytest.approx(mixed)


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(tokens: Path, tmp_path: Path) -> None:
    later = {"token_corruption": 0.0, "diagonal": DiagonalTrainingKeys()}
    train(tmp_path, tokens, MODEL, max_steps=1)
    assert "token_corruption" not in (tmp_path / "config.yaml").read_text()
    for changed, sentence in (
        ({"token_corruption": 0.3}, "holds a run with token_corruption=0.0, but this command has token_corruption=0.3"),
        ({"diagonal": DiagonalTrainingKeys(0.5)}, r"holds a run with diagonal\.share=0\.0, but"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(tmp_path, tokens, MODEL, **later | changed)
    with pytest.raises(ValueError, match=r"holds a run with model\.sink_frames=0, but this command has model\.sink_frames=1"):
        train(tmp_path, tokens, {**MODEL, "sink_frames": 1}, **later)
    train(tmp_path, tokens, {**MODEL, "sink_frames": 0}, **later)
    assert (tmp_path / "checkpoints" / "step_000002").is_dir()


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_killed_run_ends_with_the_weights_of_a_straight_one(is_broken, tokens: Path, tmp_path: Path, monkeypatch) -> None:
    train(tmp_path / "first", tokens, MODEL, use_actions=True)
    if is_broken:
        # Draws of a generator that a resumed run begins anew.
        monkeypatch.setattr(training, "corrupt_tokens", Stateful())
    options = ALL | {"init_from": str(tmp_path / "first"), "max_steps": 6, "gradient_accumulation": 2}
    model = {"attention_frames": 2, "sink_frames": 1}
    train(tmp_path / "straight", tokens, model, **options)
    after_step = Runner.after_step

    def killed(runner: Runner, step: int, *arguments: Any) -> None:
        after_step(runner, step, *arguments)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", tokens, model, **options)
    monkeypatch.setattr(Runner, "after_step", after_step)
    if is_broken:
        monkeypatch.setattr(training, "corrupt_tokens", Stateful())
    # A resumed run needs the checkpoint alone.
    (tmp_path / "first").rename(tmp_path / "gone")
    train(tmp_path / "killed", tokens, model, **options)
    assert (weights(tmp_path / "killed", 6) == weights(tmp_path / "straight", 6)) == (not is_broken)
    assert load_model(VidGPTForCausalLM, tmp_path / "killed").config.attention_frames == 2


class Stateful:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, layout: Any, input_ids: torch.Tensor, share: float) -> torch.Tensor:
        is_replaced = torch.rand(input_ids.shape, generator=self.generator) < share
        return torch.where(is_replaced & (input_ids < layout.codebook_size), 0, input_ids)
