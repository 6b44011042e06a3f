"""A run is a pure function of its configuration: killed, stopped or continued, it ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from vidtok.config import VidTokConfig
from vidtok.model import VidTokModel
from vidtok.run.checkpoints import newest_checkpoint, read_state
from vidtok.run_options import options_from
from vidtok.runner import Runner, TrainingError, build_optimizer


class Points(Dataset[dict[str, Tensor]]):
    """Hold 20 fixed random vectors."""

    def __init__(self) -> None:
        self.points = torch.randn(20, 6, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"point": self.points[index]}


class Noisy(nn.Module):
    """Reconstruct vectors through dropout (draws random numbers) and batch norm (has buffers)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)

    def forward(self, point: Tensor) -> Tensor:
        hidden = functional.dropout(self.norm(self.down(point)), 0.2, self.training)
        return self.up(hidden)


def compute_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    loss = functional.mse_loss(model(batch["point"]), batch["point"])
    return loss, {"doubled": 2 * loss}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"run_dir": str(folder), "max_steps": 12, "batch_size": 4, "lr": 0.01, "warmup_steps": 2, "num_workers": 0}
    return values | {"checkpoint_every": 3, "evaluate_every": 4, "log_every": 1, "ema_decay": 0.9} | changes


def train(config: dict[str, Any], stop_after: int | None = None, loss: Any = compute_loss) -> Noisy:
    """Run the loop both training commands have; stop_after: leave it there, as an exception would."""
    options = options_from(config)
    with Runner(options, config, name="test") as runner:
        model = Noisy()
        if runner.is_finished:
            assert list(runner.steps(Points())) == []
            return model
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options))

        def evaluate() -> dict[str, float]:
            losses = [float(compute_loss(model, batch)[0]) for batch in runner.evaluation_batches(Points(), max_items=8)]
            return {"validation_loss": sum(losses) / len(losses)}

        def save(folder: Path) -> None:
            torch.save(model.state_dict(), folder / "weights.pt")

        for step, batches in runner.steps(Points()):
            logs = runner.update(wrapped, optimizer, batches, loss)
            runner.after_step(step, logs, evaluate, save)
            if step == stop_after:
                break
        return model


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Give every tensor of the newest checkpoint: weights, buffers, averages and optimizer state."""
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    found = {f"{path.name}/{name}": value for path in checkpoint.glob("*.safetensors") for name, value in load_file(path).items()}
    state = torch.load(checkpoint / "model_optimizer.pt", weights_only=True)["state"]
    return found | {f"optimizer/{index}/{name}": value for index, part in state.items() for name, value in part.items()}


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert curve(folder) == curve(other)


def curve(folder: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl without the keys that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("elapsed_seconds", "clips_per_second")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(settings(folder))
    return folder


def slow_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Leave the parent process time to kill this one in the middle."""
    time.sleep(0.03)
    return compute_loss(model, batch)


def start_child(config: dict[str, Any]) -> subprocess.Popen[str]:
    script = f"import runpy; part = runpy.run_path({__file__!r}); part['train']({config!r}, loss=part['slow_loss'])"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(folder: Path, child: subprocess.Popen[str], count: int) -> None:
    """Wait until the child has logged `count` lines more than there are."""
    metrics = folder / "metrics.jsonl"
    enough = count + (len(metrics.read_text().splitlines()) if metrics.exists() else 0)
    while child.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= enough):
        time.sleep(0.002)


def test_a_run_killed_again_and_again_ends_in_the_same_bits(straight: Path, tmp_path: Path) -> None:
    folder, dice = tmp_path / "run", random.Random(3)
    for _ in range(3):
        child = start_child(settings(folder))
        wait_for_steps(folder, child, 3)
        time.sleep(dice.random() * 0.06)
        child.kill()
        child.communicate()
    train(settings(folder))
    assert_same_run(folder, straight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(straight: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    folder = tmp_path / "run"
    child = start_child(settings(folder, checkpoint_every=100))
    wait_for_steps(folder, child, 2)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert child.returncode == status
    assert checkpoint is not None and read_state(checkpoint).step == curve(folder)[-1]["step"] < 12
    assert "The same command continues from there" in output and "Traceback" not in output
    train(settings(folder, checkpoint_every=100))
    assert_same_run(folder, straight)


class Killed(BaseException):
    """Stand for a kill: nothing in the code under test catches it."""


def die_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die at the moment-th time that something is synced, renamed or deleted."""
    count = 0

    def dying(act: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            return act(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def test_whenever_a_save_is_cut_off_the_run_still_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"max_steps": 4, "checkpoint_every": 1, "evaluate_every": 2, "keep_checkpoints": 1}
    train(settings(tmp_path / "straight", **config))
    deaths = 0
    for moment in range(1, 200, 5):
        folder = tmp_path / f"run-{moment}"
        with monkeypatch.context() as patch:
            die_at(patch, moment)
            try:
                train(settings(folder, **config))
                break
            except Killed:
                deaths += 1
        train(settings(folder, **config))
        assert_same_run(folder, tmp_path / "straight")
        assert (folder / "model" / "weights.pt").is_file()
        assert not [path for path in folder.rglob("*") if path.name.startswith((".tmp-", ".old-"))]
        shutil.rmtree(folder)
    assert deaths > 12


def test_a_half_written_checkpoint_is_not_read(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=4))
    half = tmp_path / "checkpoints" / "step_000009"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step_000004"


def test_the_newest_whole_checkpoint_wins_over_a_stale_pointer(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=9))
    assert (tmp_path / "latest").read_text() == "checkpoints/step_000009\n"
    (tmp_path / "latest").write_text("checkpoints/step_000006\n")
    with Runner(options_from(settings(tmp_path, max_steps=12)), settings(tmp_path, max_steps=12), "test") as runner:
        assert runner.step == 9


def test_a_replacement_cut_between_its_two_renames_is_undone(tmp_path: Path) -> None:
    train(settings(tmp_path))
    (tmp_path / "model").rename(tmp_path / ".old-model")
    (tmp_path / ".tmp-model").mkdir()
    train(settings(tmp_path))
    assert (tmp_path / "model" / "weights.pt").is_file() and not (tmp_path / ".tmp-model").exists()


def test_only_the_newest_checkpoints_are_kept(straight: Path) -> None:
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step_000009", "step_000012"]


def test_a_finished_run_says_so_and_does_nothing(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file() and path.name != ".lock"}
    train(settings(straight))
    assert "is finished, at step 12: raise max_steps or max_minutes" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in straight.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=4))
    train(settings(tmp_path, max_steps=6, log_every=2, checkpoint_every=5, keep_checkpoints=1))
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and read_state(checkpoint).step == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.02}, r"holds a run with lr=0.01, but this command has lr=0.02: give another run_dir, or lr=0.01 to continue"),
        ({"data": {"name": "files"}}, r"data.name=\(absent\), but this command has data.name=files"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(straight: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(straight, **change))
    with pytest.raises(ValueError, match=message):  # not "another process": the refusal has freed the folder
        train(settings(straight, **change))


def test_a_start_that_failed_before_its_first_checkpoint_does_not_bind_the_folder(straight: Path, tmp_path: Path) -> None:
    train(settings(tmp_path, lr=0.5), stop_after=2)
    train(settings(tmp_path))
    assert_same_run(tmp_path, straight)


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with Runner(options_from(config), config, "test"), pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        Runner(options_from(config), config, "test")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_and_saves_the_step_before_it(tmp_path: Path, kind: str) -> None:
    calls = 0

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        nonlocal calls
        calls += 1
        loss, logs = compute_loss(model, batch)
        if calls < 5:
            return loss, logs
        # The square root of an exact zero: the value is fine, its derivative is not.
        return (loss * torch.nan if kind == "loss" else loss + (loss * 0).sqrt()), logs

    culprit = (
        "loss is nan"
        if kind == "loss"
        else r"the gradient of down\.weight, down\.bias, norm\.weight, norm\.bias and 2 more is not"
    )
    with pytest.raises(TrainingError, match=rf"stopped at step 5: {culprit}.*, lr 8.*step_000004\. Try a lower lr") as caught:
        train(settings(tmp_path / "run"), loss=failing)
    assert "\n" not in str(caught.value)
    train(settings(tmp_path / "whole", max_steps=12, checkpoint_every=4, keep_checkpoints=3))
    # What the failing forward pass moved (batch norm) is undone: the checkpoint is the one of an undisturbed run.
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step_000004/model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    train(settings(tmp_path / "run"))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Named(Points):
    """Points that tell where they come from."""

    def describe(self, index: int) -> str:
        return f"film {index} of 20"


def test_the_first_term_that_is_not_finite_and_the_clips_are_named(tmp_path: Path) -> None:
    def failing(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        loss, _ = compute_loss(model, batch)
        return loss * torch.inf, {"fine": loss, "sharpness": loss * torch.nan, "colour": loss * torch.inf}

    config = settings(tmp_path, gradient_accumulation=3)
    with Runner(options_from(config), config, "test") as runner:
        model = Noisy()
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options_from(config)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for _, batches in runner.steps(Named()):
            with pytest.raises(
                TrainingError, match=r"at step 1: sharpness is nan, .* with clip (\d+) \(film \1 of 20\), .* and 8 more"
            ):
                runner.update(wrapped, optimizer, batches, failing)
            break
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = json.loads((tmp_path / "failure.json").read_text())[0]
    assert report["values"]["fine"] > 0 and report["values"]["colour"] == "inf"
    seen = {tuple(Points().points[int(clip.split()[1])].tolist()) for clip in report["clips"]}
    assert seen == {tuple(point.tolist()) for batch in batches for point in batch["point"]} and len(report["clips"]) == 12
    # Nothing is learnt yet: a checkpoint would only tie the folder to this configuration.
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_two_micro_batches_equal_one_big_batch(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, point: Tensor) -> Tensor:
            return self.layer(point)

    weights = []
    # In bf16 sums of unlike order differ beyond any tolerance that would still notice a wrong mean.
    for name, sizes in {"big": {"batch_size": 8}, "small": {"batch_size": 4, "gradient_accumulation": 2}}.items():
        config = settings(tmp_path / name, precision="fp32", **sizes)
        with Runner(options_from(config), config, "test") as runner:
            plain = Plain()
            model, optimizer = runner.prepare(plain, build_optimizer(plain, options_from(config)))
            for step, batches in runner.steps(Points()):
                runner.after_step(step, runner.update(model, optimizer, batches, compute_loss))
            weights.append(plain.layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in ("big", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_saved_model_holds_the_averaged_weights_of_the_best_step(straight: Path) -> None:
    values = [line["validation_loss"] for line in curve(straight) if "validation_loss" in line]
    assert len(values) == 3 and min(values) == values[-1]  # so the last checkpoint is the best step's
    saved, state = torch.load(straight / "model" / "weights.pt", weights_only=True), weights_of(straight)
    for name in ("down.weight", "up.bias", "norm.weight"):
        assert torch.equal(saved[name], state[f"model_average.safetensors/{name}"])
    assert torch.equal(saved["norm.running_mean"], state["model.safetensors/norm.running_mean"])
    assert not torch.equal(saved["down.weight"], state["model.safetensors/down.weight"])


def test_metrics_name_every_figure_and_tensorboard_has_them_too(straight: Path) -> None:
    first = json.loads((straight / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == {"step", "loss", "doubled", "gradient_norm", "lr", "clips_per_second", "elapsed_seconds"}
    assert [line["step"] for line in curve(straight) if "loss" in line] == list(range(1, 13))
    assert list((straight / "tensorboard").glob("events*"))


class FakeTime:
    """A clock that moves on by a twentieth of a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.05
        return self.now


@pytest.mark.parametrize("max_steps", [None, 1_000_000])
def test_minutes_become_a_plan_that_a_resumed_run_keeps(
    max_steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidtok.run.clock.time", FakeTime())
    config = settings(tmp_path, max_steps=max_steps, max_minutes=0.6, evaluate_every=1000, checkpoint_every=1000)
    train(config, stop_after=30)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["planned_at"] == read_state(tmp_path / "checkpoints" / "step_000025").step == 25 < 30 < plan["horizon"]
    train(config)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert state.plan == plan == json.loads((tmp_path / "plan.json").read_text())
    assert state.step == plan["horizon"] and 0.7 * 36 < state.elapsed_seconds < 36
    rates = [line["lr"] for line in curve(tmp_path) if "lr" in line]
    assert rates[-1] == pytest.approx(0.001) and len(rates) == plan["horizon"]


def test_steps_that_fit_into_the_minutes_keep_their_own_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidtok.run.clock.time", FakeTime())
    train(settings(tmp_path, max_steps=60, max_minutes=60.0, evaluate_every=1000, checkpoint_every=1000))
    rates = [line["lr"] for line in curve(tmp_path) if "lr" in line]
    assert rates[-1] == pytest.approx(0.001) and len(rates) == 60


def test_a_run_whose_minutes_are_up_before_its_steps_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vidtok.run.clock.time", FakeTime())
    config = settings(tmp_path, max_steps=1000, max_minutes=0.05)
    train(config)
    assert "all steps that fit into 0.05 minutes are done, best validation_loss" in capsys.readouterr().out
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and 3 < read_state(checkpoint).step < 30
    train(config)
    assert "is finished" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "checkpoints") == checkpoint
    train(config | {"max_minutes": 0.1})
    assert newest_checkpoint(tmp_path / "checkpoints") != checkpoint


class SlowingTime(FakeTime):
    """A clock of a machine that becomes forty times slower after four seconds."""

    def monotonic(self) -> float:
        self.now += 0.05 if self.now < 4 else 2.0
        return self.now


def test_a_machine_that_slows_down_ends_the_run_with_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vidtok.run.clock.time", SlowingTime())
    train(settings(tmp_path, max_steps=None, max_minutes=0.6, evaluate_every=1000, checkpoint_every=1000))
    assert "the 0.6 minutes are used up" in capsys.readouterr().out


def test_minutes_that_measuring_uses_up_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = FakeTime()
    clock.monotonic = lambda: setattr(clock, "now", clock.now + 20.0) or clock.now  # type: ignore[method-assign]
    monkeypatch.setattr("vidtok.run.clock.time", clock)
    train(settings(tmp_path, max_steps=None, max_minutes=0.6))
    said = capsys.readouterr().out
    assert "Finished at step" in said and "h-" not in said and ", -" not in said


def test_evaluation_leaves_model_and_random_numbers_of_training_alone(straight: Path, tmp_path: Path) -> None:
    train(settings(tmp_path, evaluate_every=1))
    ours, theirs = weights_of(tmp_path), weights_of(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_evaluation_without_the_deciding_figure_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=1)
    with Runner(options_from(config), config, "test", best="psnr") as runner:
        model = Noisy()
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options_from(config)))
        for step, batches in runner.steps(Points()):
            logs = runner.update(wrapped, optimizer, batches, compute_loss)
            with pytest.raises(ValueError, match=r"evaluate gave \['loss'\], without 'psnr'"):
                runner.after_step(step, logs, lambda: {"loss": 1.0})
            break


@pytest.mark.parametrize("content", [b"", b"garbage", None])
@pytest.mark.parametrize("name", ["model.safetensors", "model_optimizer.pt", "model_average.safetensors"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(tmp_path: Path, name: str, content: bytes | None) -> None:
    train(settings(tmp_path, max_steps=4))
    file = tmp_path / "checkpoints" / "step_000004" / name
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ValueError, match=rf"^{file.parent} is damaged .*: delete that folder, and the run goes on") as caught:
        train(settings(tmp_path, max_steps=6))
    assert "\n" not in str(caught.value)
    shutil.rmtree(file.parent)
    train(settings(tmp_path, max_steps=6))
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step_000006"


def evaluate_as(config: dict[str, Any], values: list[float]) -> None:
    """Train with evaluations that give these values, one after every step."""
    with Runner(options_from(config), config, "test") as runner:
        model = Noisy()
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options_from(config)))
        for step, batches in runner.steps(Points()):
            logs = runner.update(wrapped, optimizer, batches, compute_loss)
            runner.after_step(
                step, logs, lambda: {"validation_loss": values[runner.step - 1]}, lambda folder: _write_step(runner, folder)
            )


def _write_step(runner: Runner, folder: Path) -> None:
    (folder / "step").write_text(str(runner.step))


def test_an_infinite_evaluation_never_makes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path / "never", max_steps=2, evaluate_every=1)
    evaluate_as(config, [float("inf"), float("inf")])
    assert not (tmp_path / "never" / "model").exists()
    assert "all steps are done; no model was good enough to be saved." in capsys.readouterr().out
    evaluate_as(settings(tmp_path / "later", max_steps=3, evaluate_every=1), [float("inf"), 3.0, float("-inf")])
    assert (tmp_path / "later" / "model" / "step").read_text() == "2"
    assert "best validation_loss 3 at step 2" in capsys.readouterr().out


def test_a_run_whose_data_changed_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    config = settings(tmp_path)
    train(config, stop_after=4)

    def check(name: str, fingerprint: str) -> None:
        with Runner(options_from(config), config, "test") as runner:
            runner.check_data(name, fingerprint)

    check("tokens", "old")
    check("tokens", "old")
    check("others", "new")
    with pytest.raises(ValueError, match="was trained on tokens with fingerprint old, but now they have new: give back the old"):
        check("tokens", "new")


def test_before_the_first_checkpoint_data_may_still_change(tmp_path: Path) -> None:
    config = settings(tmp_path)
    for fingerprint in ("old", "new"):
        with Runner(options_from(config), config, "test") as runner:
            runner.check_data("tokens", fingerprint)
            assert runner.first_value("data tokens", "other") == fingerprint


@pytest.mark.parametrize(("max_steps", "expected"), [(4, [1]), (12, [1, 10]), (100, [1, 10, 100])])
def test_rates_are_reported_for_steps_that_there_are(
    tmp_path: Path, max_steps: int, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, max_steps=max_steps)
    with Runner(options_from(config), config, "test") as runner:
        model = Noisy()
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options_from(config)))
        runner.report(wrapped, optimizer, 3 * 2**28)
        runner.report(wrapped, optimizer, 3 * 2**29)
    said = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"at step (\d+)", said)] == expected * 2
    assert "estimated memory: 768 MiB\n" in said and "estimated memory: 1.50 GiB\n" in said


def test_a_model_that_cannot_recompute_activations_is_refused_by_name(tmp_path: Path) -> None:
    config = settings(tmp_path, gradient_checkpointing=True)
    model = VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1))
    with (
        Runner(options_from(config), config, "test") as runner,
        pytest.raises(ValueError, match=r"^VidTokModel cannot recompute"),
    ):
        runner.prepare(model, build_optimizer(model, options_from(config)))
