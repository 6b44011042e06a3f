"""A run writes into folders that runs have made, and into no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vidtok.run.run_folder import RunFolder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(folder: Path, command: str = "vidtok-train") -> None:
    RunFolder(folder, {"lr": 0.1}, command).close()


@pytest.mark.parametrize(
    "name", ["config.yaml", "plan.json", "model/net.py", ".old-model/weights.pt", "checkpoints/.tmp-a/b", ".env"]
)
def test_a_folder_of_the_users_is_refused_and_stays_as_it_was(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    message = rf"^{tmp_path} is not empty and no run has made it \(it holds {name.split('/')[0]}\): give a new or empty folder\.$"
    with pytest.raises(ValueError, match=message):
        start(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("text", ["", "[1]", '{"command": "vidtok-train"}', '{"lr": 3}'])
def test_a_run_json_of_the_users_is_no_marker(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "config.yaml").write_text("mine: 1")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run.json that no run has written \(it holds config.yaml, run.json\)"):
        start(tmp_path)
    assert contents(tmp_path) == before


def test_a_run_of_another_command_is_refused_by_name(tmp_path: Path) -> None:
    start(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run of vidtok-train, but this command is vidgpt-train: give another run_dir"):
        start(tmp_path, "vidgpt-train")
    assert contents(tmp_path) == before


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "vidtok-train", "format_version": 2}')
    with pytest.raises(ValueError, match="has run format 2, this version reads 1"):
        start(tmp_path)


@pytest.mark.parametrize("names", [[], [".lock"], [".lock", ".tmp-run.json"]])
def test_a_new_folder_and_one_of_a_start_killed_at_once_are_taken(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    start(tmp_path)
    start(tmp_path)
    assert not (tmp_path / ".tmp-run.json").exists()
    start(tmp_path / "not" / "there" / "yet")
    assert (tmp_path / "not" / "there" / "yet" / "run.json").is_file()


@pytest.mark.parametrize(("made", "tracker"), [("runs/mine/a", "tensorboard"), ("a", "wandb")])
def test_a_refused_start_leaves_no_folder_that_it_made(tmp_path: Path, made: str, tracker: str) -> None:
    folder = RunFolder(tmp_path / made, {"lr": 0.1}, "vidtok-train")
    folder.first_value("data", "x")
    (folder.path / "rejects.csv").write_text("source,reason\n")
    (folder.path / tracker).mkdir()
    (folder.path / tracker / "events").write_text("")
    folder.close(is_refused=True)
    folder.close(is_refused=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "failure.json", "checkpoints/step_1", "samples/a.png", "mine.txt"])
def test_a_refused_start_keeps_what_is_worth_something(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "a", {"lr": 0.1}, "vidtok-train")
    (tmp_path / "a" / name).write_text("")
    folder.close(is_refused=True)
    assert {name, "run.json", "config.yaml"} <= set(contents(tmp_path / "a"))


def test_a_refused_start_keeps_the_list_of_rejected_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a", {"lr": 0.1}, "vidtok-train")
    (tmp_path / "a" / "rejects.csv").write_text("source,reason\nfilm.mp4,damaged\n")
    folder.close(is_refused=True)
    assert (tmp_path / "a" / "rejects.csv").is_file()


def test_a_refused_start_leaves_a_folder_that_was_there_and_a_run_of_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty", {"lr": 0.1}, "vidtok-train").close(is_refused=True)
    assert list((tmp_path / "empty").iterdir()) == []
    start(tmp_path / "a")
    before = contents(tmp_path / "a")
    RunFolder(tmp_path / "a", {"lr": 0.1}, "vidtok-train").close(is_refused=True)
    assert contents(tmp_path / "a") == before
    start(tmp_path / "runs" / "a")
    RunFolder(tmp_path / "runs" / "b", {"lr": 0.1}, "vidtok-train").close(is_refused=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


def resume(folder: Path, **config: Any) -> None:
    """Start again in a folder with a checkpoint, as a version does whose keys mean DEFAULTS where nobody gives them."""
    (folder / "checkpoints" / "step_000001").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step_000001" / "state.json").write_text("{}")
    RunFolder(folder, {"lr": 0.1, **config}, "vidtok-train", DEFAULTS).close()


DEFAULTS = {"lr": 0.5, "corruption": 0.0, "betas": [0.9, 0.95], "diagonal": {"share": 0.0, "window": 1}, "model": {"sinks": None}}


def test_a_key_that_an_older_version_did_not_record_counts_as_its_default(tmp_path: Path) -> None:
    now = {"corruption": 0.0, "betas": [0.9, 0.95], "diagonal": {"share": 0.0, "window": 1}, "model": {"sinks": None, "width": 8}}
    for number, record in enumerate(({}, {"diagonal": {"window": 1}})):
        old = tmp_path / str(number)
        start(old)
        (old / "config.yaml").write_text(json.dumps({"lr": 0.1, "model": {"width": 8}, **record}))
        resume(old, **now)
        # From here on it is recorded.
        assert "corruption: 0.0" in (old / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corruption": 0.3}, "holds a run with corruption=0.0, but this command has corruption=0.3: give another run_dir, or"),
        ({"diagonal": {"share": 0.5}}, "holds a run with diagonal.share=0.0, but this command has diagonal.share=0.5"),
        ({"model": {"sinks": 2}}, "holds a run with model.sinks=None, but this command has model.sinks=2"),
        ({"model": {"unheard": 2}}, r"holds a run with model.unheard=\(absent\), but this command has model.unheard=2"),
        # What is recorded counts, not its default; and a default says nothing of what neither has.
        ({"lr": 0.5}, "holds a run with lr=0.1, but this command has lr=0.5"),
    ],
)
def test_a_key_that_was_not_recorded_may_not_change(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    start(tmp_path)
    resume(tmp_path)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, **change)
    resume(tmp_path)
