"""TensorBoard and W&B get every figure and picture of a run once, at its step, also of a run that was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from vidtok import run_options
from vidtok.run.trackers import Trackers
from vidtok.run_options import RunOptions, check_options
from vidtok.runner import Runner, build_optimizer


def told(file: Path, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line["what"] == what]


def picture_of(step: int) -> np.ndarray:
    """Give a picture whose every value says the step."""
    return np.full((4, 6, 3), step, np.uint8)


def compute_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    time.sleep(float(os.environ.get("SLOW", "0")))  # for a parent process that means to kill this one
    return (model(batch[0]) - batch[0]).pow(2).mean(), {}


def train(folder: Path, trackers: list[str] | None, stop_after: int | None = None, **changes: Any) -> None:
    """Train for 9 steps: figures at each, a picture at every second one, a checkpoint at every fourth."""
    values = {"max_steps": 9, "batch_size": 4, "warmup_steps": 0, "num_workers": 0} | changes
    options = RunOptions(
        run_dir=str(folder), checkpoint_every=4, evaluate_every=2, log_every=1, trackers=trackers, precision="fp32", **values
    )
    with Runner(options, {"batch_size": values["batch_size"], "trackers": trackers}, "test") as runner:
        model = nn.Linear(3, 3)
        points = TensorDataset(torch.randn(20, 3, generator=torch.Generator().manual_seed(7)))
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options))

        def evaluate() -> dict[str, float]:
            runner.show("samples/step", lambda: picture_of(runner.step))
            return {"validation_loss": float(model.weight.detach().abs().sum())}

        for step, batches in runner.steps(points):
            runner.after_step(step, runner.update(wrapped, optimizer, batches, compute_loss), evaluate)
            if step == stop_after:
                break


def kill_at(step: int, folder: Path, trackers: list[str]) -> None:
    """Train in another process, and kill it once it has logged this step."""
    script = (
        f"import runpy, pathlib; part = runpy.run_path({__file__!r}); part['train'](pathlib.Path({str(folder)!r}), {trackers!r})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"SLOW": "0.05"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def metrics(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def check_tensorboard(folder: Path) -> None:
    """Assert that TensorBoard shows each figure and picture once, at its step."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for name, steps in (("loss", range(1, 10)), ("validation_loss", (2, 4, 6, 8, 9))):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == list(steps)
        np.testing.assert_allclose(shown, metrics(folder, name), rtol=1e-6)
    pictures = events.Images("samples/step")
    assert [event.step for event in pictures] == [2, 4, 6, 8, 9]
    assert [(event.height, event.width) for event in pictures] == [(4, 6)] * 5
    for event in pictures:
        assert event.encoded_image_string.startswith(b"\x89PNG")
        assert _pixels(event.encoded_image_string) == {event.step}


def _pixels(png: bytes) -> set[int]:
    return set(np.asarray(Image.open(io.BytesIO(png))).ravel().tolist())


def check_wandb(file: Path, folder: Path) -> None:
    """Assert that W&B was given each figure and picture once, with its step in the same row."""
    rows = [line["row"] for line in told(file, "row")]
    given = Counter((name, row["step"]) for row in rows for name in row if name != "step")
    assert max(given.values()) == 1
    steps = {name: sorted(step for key, step in given if key == name) for name in ("loss", "validation_loss", "samples/step")}
    assert steps == {"loss": list(range(1, 10)), "validation_loss": [2, 4, 6, 8, 9], "samples/step": [2, 4, 6, 8, 9]}
    assert all(row["samples/step"] == [[4, 6, 3]] for row in rows if "samples/step" in row)
    losses = sorted((row["step"], row["loss"]) for row in rows if "loss" in row)
    assert losses == metrics(folder, "loss")
    assert {(line["name"], line["step_metric"]) for line in told(file, "define")} == {("*", "step")}


def test_every_tracker_gets_figures_and_pictures_of_every_step(tmp_path: Path, wandb_file: Path) -> None:
    train(tmp_path / "mine", ["tensorboard", "wandb"])
    check_tensorboard(tmp_path / "mine")
    check_wandb(wandb_file, tmp_path / "mine")
    (start,) = told(wandb_file, "init")
    given = start["given"]
    assert (given["project"], given["name"], given["resume"]) == ("test", "mine", "allow")
    assert given["dir"] == str(tmp_path / "mine")
    assert [line["exit_code"] for line in told(wandb_file, "finish")] == [0]
    assert told(wandb_file, "config")[0]["values"]["batch_size"] == 4
    assert sorted(path.name for path in (tmp_path / "mine" / "samples").iterdir()) == [
        f"step_00000{n}.png" for n in (2, 4, 6, 8, 9)
    ]
    # A finished run has nothing to tell.
    train(tmp_path / "mine", ["tensorboard", "wandb"])
    assert len(told(wandb_file, "init")) == 1


def test_a_killed_run_goes_on_in_the_same_places_without_a_step_twice(
    tmp_path: Path, wandb_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("FAKE_WANDB_ONLINE", "1")
    kill_at(7, folder, ["tensorboard", "wandb"])
    assert (folder / "checkpoints" / "step_000004").is_dir() and not (folder / "checkpoints" / "step_000008").is_dir()
    train(folder, ["tensorboard", "wandb"])
    check_tensorboard(folder)
    check_wandb(wandb_file, folder)
    first, second = told(wandb_file, "init")
    assert first["pid"] != second["pid"] and first["given"] == second["given"]


def test_a_run_killed_while_it_evaluates_still_gives_wandb_that_evaluation(tmp_path: Path, wandb_file: Path) -> None:
    folder, evaluated = tmp_path / "run", Trackers.log_picture

    def killed(self: Trackers, name: str, picture: np.ndarray, step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt  # nothing in the run catches it
        evaluated(self, name, picture, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trackers, "log_picture", killed)
        train(folder, ["wandb"])
    assert metrics(folder, "loss")[-1][0] == 6
    train(folder, ["wandb"])
    check_wandb(wandb_file, folder)


def test_what_a_kill_kept_from_wandb_is_sent_when_the_run_goes_on(
    tmp_path: Path, wandb_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(folder, ["wandb"], stop_after=7)
    kept = [line for line in wandb_file.read_text().splitlines() if json.loads(line).get("row", {}).get("step", 0) < 6]
    wandb_file.write_text("".join(line + "\n" for line in kept))
    monkeypatch.setenv("FAKE_WANDB_ONLINE", "1")
    train(folder, ["wandb"])
    check_wandb(wandb_file, folder)


def test_a_start_from_step_0_is_a_new_run_of_wandb(tmp_path: Path, wandb_file: Path) -> None:
    train(tmp_path / "run", ["wandb"], stop_after=3, seed=5)
    train(tmp_path / "run", ["wandb"], seed=5)
    first, second = told(wandb_file, "init")
    assert first["given"]["id"] != second["given"]["id"]
    rows = [line["row"]["step"] for line in told(wandb_file, "row") if "loss" in line["row"]]
    assert rows == [1, 2, 3, *range(1, 10)]


def test_trackers_may_change_from_start_to_start(tmp_path: Path, wandb_file: Path) -> None:
    train(tmp_path / "run", ["tensorboard"], stop_after=5)
    assert not wandb_file.read_text()
    train(tmp_path / "run", ["wandb"], max_steps=6)
    train(tmp_path / "run", [], max_steps=8)
    train(tmp_path / "run", ["tensorboard", "wandb"])
    rows = [line["row"]["step"] for line in told(wandb_file, "row") if "loss" in line["row"]]
    assert rows == [5, 6, 9]
    assert len({line["given"]["id"] for line in told(wandb_file, "init")}) == 1


def test_trackers_null_is_tensorboard_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "with", None, max_steps=1)
    assert list((tmp_path / "with" / "tensorboard").glob("events*"))
    train(tmp_path / "none", [], max_steps=1)
    assert not (tmp_path / "none" / "tensorboard").exists() and "TensorBoard" not in capsys.readouterr().out
    monkeypatch.setattr("vidtok.run.trackers.is_installed", lambda package: False)
    train(tmp_path / "without", None, max_steps=1)
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert "No TensorBoard curves: `pip install tensorboard` adds them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["tensorbord"],
            r"^trackers=\[tensorbord\] names tensorbord, which is not known: give any of tensorboard, wandb, or \[\]",
        ),
        (["tensorboard", "wandb"], r"^trackers names wandb, which is not installed: `pip install wandb`, or leave it out\.$"),
    ],
)
def test_unknown_and_missing_trackers_are_refused_before_any_work(
    names: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder that W&B leaves where it runs is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(run_options, "find_spec", lambda package: _find_spec_without_wandb(package, tmp_path))
    with pytest.raises(ValueError, match=sentence):
        check_options(RunOptions(run_dir="x", max_steps=1, trackers=names))
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path / "run", names)
    assert not (tmp_path / "run").exists()


def _find_spec_without_wandb(package: str, folder: Path) -> Any:
    """Find a package as if wandb were not installed, but a folder of that name lay in the working directory."""
    return PathFinder.find_spec(package, [str(folder)] if package == "wandb" else None)


@pytest.mark.parametrize(
    ("refused", "reason"), [("init", r"api_key not configured \(no-tty\)"), ("config", "config is not serializable")]
)
def test_what_wandb_refuses_is_one_sentence_and_leaves_nothing(
    refused: str, reason: str, tmp_path: Path, wandb_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB_REFUSES", refused)
    with pytest.raises(ValueError, match=rf"^W&B does not start \({reason}\): log in with") as caught:
        train(tmp_path / "run", ["wandb"])
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_wandb_refuses_before_anything_is_computed(tmp_path: Path, wandb_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WANDB_REFUSES", "init")
    options, model = RunOptions(run_dir=str(tmp_path / "run"), max_steps=1, trackers=["wandb"]), nn.Linear(3, 3)
    with Runner(options, {}, "test") as runner, pytest.raises(ValueError, match=r"^W&B does not start"):
        runner.prepare(model, build_optimizer(model, options))


def test_wandb_is_told_of_a_training_that_failed(tmp_path: Path, wandb_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Runner, *_: Any) -> None:
        raise ValueError("no step")

    monkeypatch.setattr(Runner, "update", fail)
    with pytest.raises(ValueError, match="no step"):
        train(tmp_path / "run", ["tensorboard", "wandb"])
    assert [line["exit_code"] for line in told(wandb_file, "finish")] == [1]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.5

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("is_own", [False, True])
def test_a_start_in_the_second_of_another_process_waits_so_that_its_events_come_later(
    is_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("vidtok.run.trackers.time", clock)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / f"events.out.tfevents.1000.host.{os.getpid() + (not is_own)}.0").touch()
    trackers = Trackers(["tensorboard"], tmp_path, "test", {})
    trackers.start(0, print)
    trackers.finish()
    assert (clock.now >= 1001) == (not is_own)


@pytest.mark.slow
def test_only_the_main_process_tells_trackers(tmp_path: Path, wandb_file: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import runpy, pathlib\npart = runpy.run_path({__file__!r})\n"
        f"part['train'](pathlib.Path({str(tmp_path / 'run')!r}), ['tensorboard', 'wandb'], batch_size=2)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([sys.executable, *launcher, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_tensorboard(tmp_path / "run")
    check_wandb(wandb_file, tmp_path / "run")
    assert len(told(wandb_file, "init")) == 1
