"""The arithmetic of adversarial training against numbers made by hand, and which part of a run trains when."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vidtok import adversarial
from vidtok.adversarial import adaptive_weight, hinge_loss, lecam_penalty, non_saturating_loss, quality_warning, r1_penalty, ramp
from vidtok.options import GanOptions, TrainTokenizerOptions
from vidtok.runner import TrainingError
from vidtok.training import train_tokenizer

TOKENIZER = {"stride_t": 1, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
DIGITS = {"name": "digits", "episodes": 4, "validation_episodes": 1, "frames": 4, "size": 32}
RUN = {"batch_size": 2, "warmup_steps": 0, "clip_frames": 3, "evaluation_clips": 2, "num_workers": 0, "precision": "fp32"}
RUN |= {"optimizer": "adamw", "lr": 3e-4}
GAN = {"weight": 0.5, "width": 4, "layers": 2, "start": 1, "warmup_steps": 1, "ramp_steps": 2}


def train(folder: Path, gan: dict[str, Any] | None = None, **changes: Any) -> Path:
    values = RUN | {"max_steps": 4, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 1, "keep_checkpoints": 9} | changes
    options = TrainTokenizerOptions(run_dir=str(folder), gan=GanOptions(**(gan or {})), **values)
    return train_tokenizer(options, DIGITS, TOKENIZER, values | {"gan": gan or {}})


def weights(folder: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / f"{part}.safetensors")


def is_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def curve(folder: Path) -> list[dict[str, float]]:
    return [line for text in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (line := json.loads(text))]


def test_the_losses_are_those_of_the_papers() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-2.0, 0.5]])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 1) / 2 + (0 + 1.5) / 2))
    expected = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-0.5))) / 2
    assert float(non_saturating_loss(fake)) == pytest.approx(expected)
    penalty = lecam_penalty(real, fake, real_mean=torch.tensor(1.0), fake_mean=torch.tensor(-1.0))
    assert float(penalty) == pytest.approx((3**2 + 1**2) / 2 + (3**2 + 0.5**2) / 2)


def test_both_sides_pull_the_scores_apart_from_each_other() -> None:
    fake = torch.zeros(1, 3, requires_grad=True)
    (towards_real,) = torch.autograd.grad(non_saturating_loss(fake), fake)
    (towards_fake,) = torch.autograd.grad(hinge_loss(torch.zeros(1, 3), fake), fake)
    assert (towards_real < 0).all() and (towards_fake > 0).all()


@pytest.mark.parametrize("side", [2, 6])
def test_r1_of_a_linear_judge_is_half_its_squared_weight_for_every_size(side: int) -> None:
    torch.manual_seed(0)
    judge = nn.Conv3d(3, 1, (1, 2, 2), stride=(1, 2, 2))
    video = torch.rand(2, 3, 1, side, side, requires_grad=True)
    penalty = r1_penalty(judge(video).flatten(1), video)
    torch.testing.assert_close(penalty, 0.5 * judge.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(judge.weight.grad, judge.weight.detach())


def test_the_adaptive_weight_makes_the_gradients_equally_long() -> None:
    torch.manual_seed(0)
    last, hidden = nn.Linear(4, 3), torch.randn(5, 4)
    out = last(hidden)
    reconstruction, adversarial_loss = out.square().mean(), 1e-3 * out.sum()
    factor = adaptive_weight(reconstruction, adversarial_loss, last.weight, limit=1e9)
    wanted, found = (
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial_loss)
    )
    torch.testing.assert_close(factor, wanted / found, rtol=1e-4, atol=0)
    assert not factor.requires_grad and factor.dtype == torch.float32
    assert float(adaptive_weight(reconstruction, adversarial_loss, last.weight, limit=2.0)) == 2.0
    assert float(adaptive_weight(reconstruction, 0 * adversarial_loss, last.weight, limit=2.0)) == 2.0


def test_the_ramp_rises_after_start_and_warm_up() -> None:
    options = GanOptions(start=10, warmup_steps=5, ramp_steps=4)
    assert [ramp(step, options) for step in (1, 11, 15, 16, 17, 19, 20, 1000)] == [0, 0, 0, 0.25, 0.5, 1, 1, 1]
    assert ramp(1, GanOptions(start=0, warmup_steps=0, ramp_steps=1)) == 1


def test_until_it_enters_the_tokenizer_trains_as_without_it(tmp_path: Path) -> None:
    plain, joined = train(tmp_path / "plain"), train(tmp_path / "joined", GAN)
    assert [is_same(weights(plain, step), weights(joined, step)) for step in (1, 2, 3, 4)] == [True, True, False, False]
    judge = [weights(joined, step, "discriminator") for step in (1, 2, 3)]
    assert not is_same(judge[0], judge[1]) and not is_same(judge[1], judge[2])
    lines = curve(joined)
    assert ["discriminator_loss" in line for line in lines] == [False, True, True, True]
    assert ["gan_adaptive_weight" in line for line in lines] == [False, False, True, True]
    for line, share in zip(lines[2:], (0.5, 1.0), strict=True):
        assert line["gan_weight"] == pytest.approx(share * 0.5 * line["gan_adaptive_weight"])
        total = line["reconstruction_loss"] + line["quantizer_loss"] + line["gan_weight"] * line["gan_loss"]
        assert line["loss"] == pytest.approx(total)


def test_the_model_is_kept_by_reconstruction_alone_and_only_its_weights_are_averaged(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", GAN, ema_decay=0.5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "validation_loss" in line]
    assert len(evaluations) == 2
    for line in evaluations:
        assert line["validation_loss"] == pytest.approx(4 * line["validation_l2_loss"])
    names = {path.name for path in (folder / "checkpoints" / "step_000004").iterdir()}
    assert names == {
        *("state.json", "model.safetensors", "model_optimizer.pt", "model_average.safetensors"),
        *("discriminator.safetensors", "discriminator_optimizer.pt"),
    }


def test_its_rate_is_its_own_and_follows_the_schedule(tmp_path: Path) -> None:
    lines = curve(train(tmp_path / "run", GAN | {"lr": 0.01, "start": 0}, lr=0.001))
    assert [line["discriminator_lr"] / line["lr"] for line in lines] == pytest.approx([10] * 4)


@pytest.mark.parametrize("gan", [{"dimensions": 3, "r1_weight": 1.0}, {"lecam_weight": 0.5}, {"is_adaptive": False}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_in_two_parts_ends_in_the_same_bits(gan: dict[str, Any], precision: str, tmp_path: Path) -> None:
    # A rate that does not depend on where the run ends.
    changes = {"gradient_accumulation": 2, "ema_decay": 0.9, "min_lr_ratio": 1.0, "precision": precision}
    whole = train(tmp_path / "whole", GAN | gan, **changes)
    train(tmp_path / "parted", GAN | gan, max_steps=3, **changes)
    parted = train(tmp_path / "parted", GAN | gan, **changes)
    for part in ("model", "discriminator", "model_average"):
        assert is_same(weights(parted, 4, part), weights(whole, 4, part))
    assert ("discriminator_r1" in curve(whole)[-1]) == ("r1_weight" in gan)


def test_a_discriminator_that_fails_leaves_the_tokenizer_at_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = train(tmp_path / "whole", GAN), 0

    def failing(real: Tensor, fake: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return hinge_loss(real, fake) * (1 if calls < 3 else torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial, "hinge_loss", failing)
        with pytest.raises(
            TrainingError,
            match=r"step 4: hinge is nan \(of the discriminator\), .* \(digits/episode-0000\d at 0\.\d0 s\).*step_000003",
        ):
            train(tmp_path / "run", GAN, checkpoint_every=100)
    for part in ("model", "discriminator"):
        assert is_same(weights(tmp_path / "run", 3, part), weights(whole, 3, part))
    train(tmp_path / "run", GAN, checkpoint_every=100)
    assert is_same(weights(tmp_path / "run", 4), weights(whole, 4))


def test_a_warning_comes_when_all_evaluations_since_it_began_are_worse() -> None:
    options = GanOptions(start=100, warmup_steps=100, patience=3)
    before = [(100, 24.0), (200, 25.0)]
    worse = [(300, 24.5), (400, 24.9), (500, 24.7)]
    assert quality_warning([*before, *worse[:2]], options) is None
    warning = quality_warning([*before, *worse], options)
    assert warning is not None
    assert "24.70, below the 25.00 of step 200 for 3 evaluations" in warning and "a temporary drop is normal" in warning
    assert quality_warning([*before, (300, 25.1), *worse[1:]], options) is None
    assert quality_warning([*before, *worse, (600, 24.0)], options) is None  # said already
    assert quality_warning(worse, options) is None  # nothing to compare with


def test_the_warning_is_printed_at_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adversarial, "quality_warning", lambda history, options: f"gan: seen {[step for step, _ in history]}")
    train(tmp_path / "run", GAN)
    said = capsys.readouterr().out
    assert "gan: seen [2]\n" in said and "gan: seen [2, 4]\n" in said
    assert "it trains after step 1 and reaches the tokenizer after step 2, fully at 4\n" in said


def test_a_run_too_short_for_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", {"weight": 0.1, "width": 4, "layers": 1}, max_steps=1)
    assert "reaches the tokenizer after step 3000, fully at 4000 (never: this run ends at 1)" in capsys.readouterr().out
    train(tmp_path / "minutes", {"weight": 0.1, "width": 4, "layers": 1}, max_steps=None, max_minutes=0.01)
    assert "fully at 4000 (never, should no more steps fit into 0.01 minutes)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -0.1}, r"gan\.weight=-0\.1 is not allowed"),
        ({"dimensions": 4}, r"gan\.dimensions=4 is not known: give 2 \(judges frames\) or 3"),
        ({"lr": 0.0}, r"gan\.lr=0\.0"),
        ({"betas": [0.5]}, r"gan\.betas=\[0\.5\]"),
        ({"ramp_steps": 0}, "ramp_steps=0"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GanOptions(**values)


def test_an_adaptive_weight_needs_a_tokenizer_that_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="which compile=true hides: set one of them to false"):
        TrainTokenizerOptions(compile=True, gan=GanOptions(weight=0.1))
    assert TrainTokenizerOptions(compile=True, gan=GanOptions(weight=0.1, is_adaptive=False)).compile


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_adversarial
from pathlib import Path
gan = test_adversarial.GAN | {"dimensions": 3, "r1_weight": 0.1}
test_adversarial.train(Path(sys.argv[2]), gan, batch_size=int(sys.argv[3]), gradient_accumulation=2, max_steps=6, ema_decay=0.5)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains_on_the_joined_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    for count, batch_size in ((1, 4), (2, 2)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if count == 2 else []
        command = [
            sys.executable,
            *launcher,
            str(script),
            str(Path(__file__).parent),
            str(tmp_path / f"run-{count}"),
            str(batch_size),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("all steps are done") == 1
    for part in ("model", "discriminator"):
        alone, together = (weights(tmp_path / f"run-{count}", 6, part) for count in (1, 2))
        for name in alone:
            torch.testing.assert_close(alone[name], together[name], rtol=1e-3, atol=5e-5)
    lines = [curve(tmp_path / f"run-{count}") for count in (1, 2)]
    factors = [[line["gan_adaptive_weight"] for line in found if "gan_adaptive_weight" in line] for found in lines]
    assert factors[0] == pytest.approx(factors[1], rel=1e-3) and len(factors[0]) == 4
