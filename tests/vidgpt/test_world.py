"""vidgpt-world writes what its law says, and the other commands take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.vidgpt.conftest import contents
from vidgpt.evaluate import main as evaluate
from vidgpt.train import main as train
from vidgpt.world import main
from vidgpt.worlds import Chains, Sprite, World, load_world
from vidtok.tokens import TokenDataset

SMALL = ["clips=6", "held_out=3", "frames=5"]


@pytest.mark.parametrize(
    ("arguments", "world"),
    [
        (["world=chains"], Chains()),
        (["world=chains", "codebook_size=5", "height=2", "width=3", "stay=0.25", "law_seed=4"], Chains(5, 2, 3, 0.25, 4)),
        (["world=sprite", "width=5", "is_random=true"], Sprite(4, 5, True)),
    ],
)
def test_the_clips_are_of_the_world_that_was_asked_for(
    arguments: list[str], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, *SMALL, "seed=2", f"output={tmp_path / 'tokens'}"]
    main(command)
    assert f"a perfect model has {world.entropy_nats_per_token:.4f} nats a token" in capsys.readouterr().out
    assert load_world(tmp_path / "tokens") == (world, pytest.approx(world.entropy_nats_per_token))
    drawn = world.sample(9, 5, seed=2)
    for split, clips in {"train": drawn[:6], "validation": drawn[6:]}.items():
        assert torch.equal(torch.cat(list(TokenDataset(tmp_path / "tokens", split, 5).rows())), clips)
    before = {path: text for path, text in contents(tmp_path).items() if ".cache" not in path.parts}
    main(command)
    assert {path: text for path, text in contents(tmp_path).items() if ".cache" not in path.parts} == before
    with pytest.raises(SystemExit, match="2"):
        main([word.replace("seed=2", "seed=3") for word in command])
    assert {path: text for path, text in contents(tmp_path).items() if ".cache" not in path.parts} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["world=dots"], "world=dots is not known: give chains or sprite"),
        (["world=sprite", "stay=0.5"], "stay=0.5 is not for world=sprite"),
        (["world=sprite", "law_seed=1"], "law_seed=1 is not for world=sprite"),
        (["world=chains", "is_random=true"], "is_random=True is not for world=chains"),
        (["world=sprite", "height=2"], "give 3x3 or more"),
        (["world=chains", "frames=1"], "frames=1 is not allowed"),
        (["world=chains", "held_out=0"], "held_out=0 is not allowed"),
    ],
)
def test_what_is_no_world_is_refused(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, f"output={tmp_path / 'tokens'}"])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_a_model_trained_on_it_is_told_how_far_from_perfect_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["world=sprite", *SMALL, f"output={tmp_path / 'tokens'}"])
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "evaluation_clips=2"]
    train([f"tokens={tmp_path / 'tokens'}", f"run_dir={tmp_path / 'gpt'}", "max_steps=1", *sizes])
    keys = [
        f"checkpoint={tmp_path / 'gpt'}",
        f"tokens={tmp_path / 'tokens'}",
        "context=2",
        "rollout_clips=0",
        "temporally_forced=false",
    ]
    evaluate([*keys, f"output={tmp_path / 'evaluation'}"])
    assert "gap to a perfect model: " in capsys.readouterr().out
    forced = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["teacher_forced"]
    assert forced["true_law"]["cross_entropy_nats_per_token"] == pytest.approx(0, abs=1e-9)
    assert forced["model"]["gap_nats_per_token"] == pytest.approx(forced["model"]["cross_entropy_nats_per_token"])


def test_a_world_of_other_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, codes in (("small", 5), ("large", 12)):
        main(["world=chains", f"codebook_size={codes}", *SMALL, f"output={tmp_path / name}"])
    train([f"tokens={tmp_path / 'large'}", f"run_dir={tmp_path / 'gpt'}", "max_steps=1", "model.hidden_size=32",
           "model.num_hidden_layers=1", "model.num_attention_heads=2", "evaluation_clips=2"])  # fmt: skip
    (tmp_path / "large" / "world.json").write_bytes((tmp_path / "small" / "world.json").read_bytes())
    with pytest.raises(SystemExit, match="2"):
        evaluate([f"checkpoint={tmp_path / 'gpt'}", f"tokens={tmp_path / 'large'}", f"output={tmp_path / 'out'}", "context=2"])
    assert "is of 5 ids on 4x4, these tokens are 12 on 4x4" in capsys.readouterr().err
