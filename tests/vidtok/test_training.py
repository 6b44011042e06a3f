"""What vidtok-train adds to a run: data that must stay the same, and a quantizer that trains in short runs too."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vidtok import training
from vidtok.codebook import CodebookMonitor, codebook_hash
from vidtok.config import VidTokConfig
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.options import LossOptions, TrainTokenizerOptions
from vidtok.runner import TrainingError
from vidtok.train import main
from vidtok.training import train_tokenizer

TOKENIZER = {"stride_t": 1, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
DIGITS = {"name": "digits", "episodes": 4, "validation_episodes": 1, "frames": 4, "size": 32}


def train(folder: Path, data: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None, **options: Any) -> None:
    values = {"batch_size": 2, "warmup_steps": 0, "clip_frames": 2, "evaluation_clips": 2, "num_workers": 0, **options}
    config = {name: value for name, value in values.items() if name != "loss"}
    train_tokenizer(TrainTokenizerOptions(run_dir=str(folder), **values), data or DIGITS, TOKENIZER | (tokenizer or {}), config)


def test_films_that_were_replaced_are_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    film, generator = tmp_path / "film.npy", np.random.default_rng(0)
    data = {"name": "files", "root": str(film), "size": [32, 32], "fps": 5, "cache_dir": str(tmp_path / "cache")}
    np.save(film, generator.integers(0, 256, (20, 32, 32, 3), np.uint8))
    train(tmp_path / "run", data, max_steps=1)
    film.touch()
    train(tmp_path / "run", data, max_steps=2)
    np.save(film, generator.integers(0, 256, (20, 32, 32, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"run was trained on data with fingerprint \w+, but now they have \w+: give back the old"
    ):
        train(tmp_path / "run", data, max_steps=3)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect, for every training step, whether it was quantised."""
    found: list[bool] = []
    forward = VidTokModel.forward

    def recording(self: VidTokModel, video: torch.Tensor, is_quantized: bool = True) -> Any:
        if self.training:
            found.append(is_quantized)
        return forward(self, video, is_quantized=is_quantized)

    monkeypatch.setattr(VidTokModel, "forward", recording)
    return found


def test_a_short_run_trains_its_quantizer(tmp_path: Path, quantized: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, max_steps=10)
    assert quantized == [False] * 2 + [True] * 8
    assert capsys.readouterr().out.count("unquantized_steps=100 is cut to 2, a fifth of max_steps, so that the quantizer") == 1
    train(tmp_path, max_steps=20)
    assert quantized[10:] == [True] * 10


def test_unquantized_steps_that_fit_are_kept(tmp_path: Path, quantized: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, max_steps=5, unquantized_steps=1)
    assert quantized == [False] + [True] * 4
    assert "is cut" not in capsys.readouterr().out


def test_negative_unquantized_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unquantized_steps=-1"):
        train(tmp_path, max_steps=5, unquantized_steps=-1)
    assert list(tmp_path.iterdir()) == []


def lines_of(folder: Path, key: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_before_its_codebook_is_filled_a_tokenizer_is_evaluated_unrounded_and_never_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vq = {"quantizer": "vq", "codebook_size": 8, "codebook_dim": 4}
    train(tmp_path, tokenizer=vq, max_steps=5, unquantized_steps=1, evaluate_every=1, checkpoint_every=1, keep_checkpoints=9)
    first, second = lines_of(tmp_path, "validation_loss")[:2]
    assert first["validation_loss"] is None and "validation_psnr_db" not in first
    assert math.isfinite(first["validation_unquantized_loss"] + first["validation_unquantized_psnr_db"])
    assert "validation_unquantized_loss" not in second and math.isfinite(second["validation_loss"])
    assert (tmp_path / "samples" / "step_000001.png").is_file()
    states = [json.loads((tmp_path / "checkpoints" / f"step_00000{step}" / "state.json").read_text()) for step in (1, 2)]
    assert [state["best"] for state in states] == [None, second["validation_loss"]]
    assert "step 1: validation_unquantized_loss" in (said := capsys.readouterr().out) and "loss inf" not in said


def test_every_clip_of_an_evaluation_counts_alike(tmp_path: Path) -> None:
    found = []
    for batch_size in (2, 3):  # the last batch of three clips is smaller, or not
        train(tmp_path / str(batch_size), max_steps=1, lr=1e-12, evaluation_clips=3, batch_size=batch_size, precision="fp32")
        found.append(lines_of(tmp_path / str(batch_size), "validation_loss")[0])
    for name in ("validation_loss", "validation_l2_loss", "validation_psnr_db"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


@pytest.mark.parametrize("quantizer", ["kl", "none"])
def test_continuous_latents_are_trained_and_evaluated_without_indices(quantizer: str, tmp_path: Path) -> None:
    train(tmp_path, tokenizer={"quantizer": quantizer, "codebook_dim": 4}, max_steps=4, evaluate_every=2, lr=0.01)
    evaluations = lines_of(tmp_path, "validation_loss")
    assert evaluations[1]["validation_loss"] < evaluations[0]["validation_loss"]
    assert not [key for line in lines_of(tmp_path, "step") for key in line if "codebook" in key]
    assert not load_model(VidTokModel, tmp_path).quantizer.is_discrete


def test_every_term_is_logged_on_its_own(tmp_path: Path) -> None:
    weights = {"charbonnier_weight": 0.1, "multiscale_weight": 0.2, "gradient_weight": 0.3, "temporal_weight": 0.4}
    train(tmp_path, max_steps=1, loss=LossOptions(**weights), tokenizer={"quantizer": "vq", "codebook_size": 8})
    first, evaluated = lines_of(tmp_path, "loss")[0], lines_of(tmp_path, "validation_loss")[0]
    shares = {"l2": 4.0, **{name.removesuffix("_weight"): weight for name, weight in weights.items()}}
    total = sum(weight * first[f"{name}_loss"] for name, weight in shares.items())
    assert first["reconstruction_loss"] == pytest.approx(total)
    assert first["loss"] == pytest.approx(total + first["quantizer_loss"])
    assert evaluated["validation_loss"] == pytest.approx(
        sum(weight * evaluated[f"validation_{name}_loss"] for name, weight in shares.items())
    )


def test_the_codebook_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compared: list[str] = []
    monkeypatch.setattr(training, "check_same_codebook", lambda quantizer: compared.append(codebook_hash(quantizer)))
    tokenizer = {"quantizer": "vq", "codebook_size": 8, "codebook_dim": 4}
    train(tmp_path, tokenizer=tokenizer, max_steps=6, log_every=2, evaluate_every=3, unquantized_steps=1)
    # Of 2 clips of 2 frames of 4x4 tokens; the first step was not quantised.
    tokens = {line["step"]: line.get("codebook_window_tokens") for line in lines_of(tmp_path, "loss")}
    assert tokens == {1: 0, 2: 64, 4: 192, 6: 320}
    assert len(set(compared)) == 2
    capsys.readouterr()
    monkeypatch.setattr(CodebookMonitor, "warning", lambda self: "codebook: hardly used")
    train(tmp_path, tokenizer=tokenizer, max_steps=9, log_every=2, evaluate_every=3, unquantized_steps=1)
    assert capsys.readouterr().out.count("codebook: hardly used\n") == 1


def test_a_loss_that_is_not_finite_names_term_and_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = VidTokModel.forward

    def broken(self: VidTokModel, video: torch.Tensor, is_quantized: bool = True) -> Any:
        output = forward(self, video, is_quantized=is_quantized)
        output.reconstruction = output.reconstruction + (torch.nan if calls else 0)
        calls.append(True)
        return output

    calls: list[bool] = []
    monkeypatch.setattr(VidTokModel, "forward", broken)
    with pytest.raises(
        TrainingError, match=r"at step 2: l2_loss is nan, .*clip \d+ \(digits/episode-0000\d at 0\.\d0 s\).*step_000001\."
    ):
        train(tmp_path, max_steps=4, evaluate_every=9)
    assert (tmp_path / "failure.json").is_file()


@pytest.fixture
def lpips_file(tmp_path: Path) -> Path:
    """Write an AlexNet of random weights, one channel wide but for the heads."""
    sides = {0: 11, 3: 5, 6: 3, 8: 3, 10: 3}
    tensors = {f"features.{at}.weight": torch.randn(2, 2 if at else 3, side, side) for at, side in sides.items()}
    tensors |= {f"features.{at}.bias": torch.zeros(2) for at in sides}
    torch.save(tensors | {f"lin{number}.model.1.weight": torch.rand(1, 2, 1, 1) for number in range(5)}, tmp_path / "net=1.pth")
    return tmp_path / "net=1.pth"


def test_lpips_is_trained_with_from_a_file(lpips_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=digits", "data.episodes=4", "data.validation_episodes=1", "data.frames=4", "data.size=32", "tokenizer.width=8"]
    keys = ["batch_size=2", "clip_frames=3", "evaluation_clips=2", "max_steps=2", f"run_dir={tmp_path / 'run'}"]
    keys += ["loss.l1_weight=1", "loss.l2_weight=1"]
    main([*words, *keys, f"loss.lpips_weights={lpips_file}", "loss.lpips_frames=1", "loss.lpips_weight=0.5"])
    checksum = hashlib.sha256(lpips_file.read_bytes()).hexdigest()
    assert f"LPIPS: alex of {lpips_file}, SHA-256 {checksum}\n" in capsys.readouterr().out
    line = lines_of(tmp_path / "run", "loss")[0]
    assert line["reconstruction_loss"] == pytest.approx(line["l1_loss"] + line["l2_loss"] + 0.5 * line["lpips_loss"])
    assert lines_of(tmp_path / "run", "validation_lpips_loss")
    content = {name: 2 * tensor for name, tensor in torch.load(lpips_file, weights_only=True).items()}
    torch.save(content, lpips_file)
    with pytest.raises(SystemExit):
        main([*words, *keys, f"loss.lpips_weights={lpips_file}", "loss.lpips_frames=1", "loss.lpips_weight=0.5", "max_steps=3"])
    assert f"was trained on the weights of LPIPS with fingerprint {checksum}" in capsys.readouterr().err


def test_wrong_lpips_weights_are_refused_before_any_data_is_opened(lpips_file: Path, tmp_path: Path) -> None:
    nothing = {"name": "files", "root": str(tmp_path / "nowhere")}
    for loss in (
        LossOptions(lpips_weights=str(tmp_path / "missing.pth")),
        LossOptions(lpips_weights=str(lpips_file), lpips_sha256="0" * 64),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=r"is no file: give lpips_weights|has the SHA-256 checksum"):
            train(tmp_path / "run", nothing, max_steps=1, loss=loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [["data=files", "data.root=nowhere"], ["data=digits", "data.size=33"], ["data=digits", "data.frames=3"],
     ["data=digits", "tokenizer.codebook_size=0"], ["data=digits", "tokenizer.stride_t=4", "clip_frames=8"]],
)  # fmt: skip
def test_a_refused_training_leaves_no_folder(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*words, "max_steps=1", "run_dir=runs/tok"])
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


class Announced:
    """The part of a Runner that is told about a training."""

    def say(self, line: str) -> None: ...

    def report(self, model: VidTokModel, optimizer: object, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes


def test_the_memory_of_training_goes_by_latent_frames() -> None:
    episodes, found = SimpleNamespace(height=256, width=256, fps=10.0, split=lambda name: []), []
    for stride_t, clip_frames in ((4, 9), (1, 3), (1, 9)):
        model, runner = VidTokModel(VidTokConfig(**TOKENIZER | {"stride_t": stride_t})), Announced()
        options = TrainTokenizerOptions(run_dir="", batch_size=8, clip_frames=clip_frames)
        training._report(runner, model, None, episodes, [], options)
        found.append(runner.memory_bytes)
    assert found == pytest.approx([found[1], found[1], 3 * found[1]], rel=0.05)


class PlannedRun:
    """The part of a Runner that decides where the unquantised steps end."""

    def __init__(self, values: dict[str, int], step: int, planned_steps: int | None) -> None:
        self.values, self.step, self.planned_steps = values, step, planned_steps

    def first_value(self, name: str, value: int) -> int:
        return self.values.setdefault(name, value)


def objective_of(run: PlannedRun) -> Any:
    objective = object.__new__(training.Objective)
    objective._runner, objective._unquantized_steps = run, 100
    objective._quantised_from = run.values.get("quantised_from")
    return objective


def test_a_run_continued_for_longer_never_falls_back_to_unquantised_steps() -> None:
    values: dict[str, int] = {}
    run = PlannedRun(values, step=0, planned_steps=60)
    objective, seen = objective_of(run), []
    for run.step in range(60):
        seen.append(objective._is_quantised())
    assert seen == [step >= 12 for step in range(60)]
    assert objective_of(PlannedRun(values, step=60, planned_steps=6000))._is_quantised()
    # Killed before its last checkpoint, it draws the same line again.
    assert not objective_of(PlannedRun(values, step=11, planned_steps=6000))._is_quantised()
