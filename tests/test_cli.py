from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from transformers import PreTrainedConfig

from vidtok import cli
from vidtok.data.options import FilesOptions
from vidtok.schema import build_options, config_dir, model_schema


@dataclasses.dataclass(frozen=True)
class Outer:
    seed: int
    inner: FilesOptions = dataclasses.field(default_factory=FilesOptions)


EXAMPLE = "toy-train data=digits run_dir=runs/toy"


def test_the_work_gets_a_plain_dictionary_of_defaults_preset_and_overrides(toy) -> None:
    config = toy.run(
        "run_dir=a", "data.episodes=5", "max_minutes=2", "data.size=[24,96]", "loss.l1_weight=3", "loss.ramp.steps=9"
    )
    assert config == {
        "run_dir": "a",
        "data": {"name": "digits", "file": None, "episodes": 5, "size": [24, 96], "crop": None},
        "tokenizer": {"width": 8},
        "input": None,
        "max_steps": 20,
        "max_minutes": 2.0,
        "is_fast": False,
        "loss": {"l1_weight": 3.0, "ramp": {"steps": 9}},
    }
    assert type(config["data"]) is dict
    assert type(config["data"]["size"]) is list


def test_the_schema_as_preset_is_all_defaults(toy) -> None:
    config = toy.run("run_dir=a", "tokenizer=schema", "data=schema_digits")
    assert (config["tokenizer"]["width"], config["data"]["episodes"]) == (3, 2)


def test_a_preset_of_the_users_own_folder_is_found(toy, tmp_path: Path) -> None:
    (tmp_path / "mine" / "tokenizer").mkdir(parents=True)
    (tmp_path / "mine" / "tokenizer" / "wide.yaml").write_text("defaults: [schema]\nwidth: 99\n")
    assert toy.run("run_dir=a", "--config-dir", str(tmp_path / "mine"), "tokenizer=wide")["tokenizer"]["width"] == 99


def test_hydra_writes_nothing_and_leaves_the_process_as_it_was(toy) -> None:
    argv, environment, folder = list(sys.argv), dict(os.environ), os.getcwd()
    toy.run("run_dir=a")
    assert os.listdir() == []
    assert (sys.argv, dict(os.environ), os.getcwd()) == (argv, environment, folder)


def test_a_sweep_runs_once_for_each_value(toy) -> None:
    toy.run("-m", "run_dir=runs/${max_steps}", "max_steps=1,2")
    assert [(config["run_dir"], config["max_steps"]) for config in toy.configs] == [("runs/1", 1), ("runs/2", 2)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["max_step=5"], "max_step: unknown key, did you mean max_steps?"),
        (["+max_step=5"], "max_step: unknown key, did you mean max_steps?"),
        (["++max_step=5"], "max_step: unknown key, did you mean max_steps?"),
        (["tokenizer.widht=3"], "tokenizer.widht: unknown key, did you mean tokenizer.width?"),
        (["+tokenizer.widht=3"], "tokenizer.widht: unknown key, did you mean tokenizer.width?"),
        (["data.episods=3"], "data.episods: unknown key, did you mean data.episodes?"),
        (["loss.l1_wieght=3"], "loss.l1_wieght: unknown key, did you mean loss.l1_weight?"),
        (["+loss.l1_wieght=3"], "loss.l1_wieght: unknown key, did you mean loss.l1_weight?"),
        (["tokenzier=tiny"], "tokenzier: unknown key, did you mean tokenizer?"),
        (["debgu=true"], "debgu: unknown key, did you mean debug?"),
        (["episodes=3"], "episodes: unknown key, did you mean data.episodes?"),
        (["data.root=videos"], "data.root: unknown key here, it belongs to data=files"),
        (["tokenizer.zzz=1"], "tokenizer.zzz: unknown key, the known ones are width"),
        (["~max_steps"], "max_steps: cannot be taken away, give it a value instead"),
        (["tokenizer=tinny"], "tokenizer=tinny: unknown preset, did you mean tiny?"),
        (["data=zzz"], "data=zzz: unknown preset, the known ones are digits, files"),
        (["tokenizer=misspelt"], "in tokenizer/misspelt.yaml, tokenizer.widht: unknown key, did you mean tokenizer.width?"),
        (["max_steps=abc"], "max_steps=abc: expected an integer"),
        (["max_steps=1.5"], "max_steps=1.5: expected an integer"),
        (["max_minutes=soon"], "max_minutes=soon: expected a number"),
        (["is_fast=maybe"], "is_fast=maybe: expected true or false"),
        (["debug=maybe"], "debug=maybe: expected true or false"),
        (["max_steps=null"], "max_steps=null: a value is needed here"),
        (["data.size=64"], "data.size=64: expected a list, for example data.size=[32,48]"),
        (["data.size=96x64"], "data.size=96x64: expected a list, for example data.size=[96,64]"),
        (["data.size=large"], "data.size=large: expected a list, for example data.size=[32,48]"),
        (["data.size={a:1}"], "data.size: expected a list, for example data.size=[1,2]"),
        (["data.crop=8"], "data.crop=8: expected a list, for example data.crop=[8,8]"),
        (["loss=3"], "loss=3: expected one of its keys, for example loss.l1_weight=VALUE"),
        (["max_steps=1,2"], "max_steps=1,2: a list is written [1,2], and a text with a comma needs quotes"),
        (["data.size=1,2"], "data.size=1,2: a list is written data.size=[1,2], and a text with a comma needs quotes"),
        (["data=files,digits"], "data=files,digits: a list is written [files,digits], and a text with a comma needs quotes"),
        (["input="], "input is empty: give a path, as in input=PATH"),
        (["data=files"], "data.root is empty: give a path, as in data.root=PATH"),
        (["--max-steps", "10"], "--max-steps: unknown flag, options are written as max_steps=VALUE, see --help"),
        (["--cfg", "everything"], "--cfg everything: expected --cfg job"),
        (["--config-dir"], "--config-dir: expected --config-dir VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(toy, arguments: list[str], sentence: str) -> None:
    assert toy.refuse("run_dir=a", *arguments) == sentence


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tokenizer=unfinished"], "tokenizer/unfinished.yaml"),
        (["clip.mp4"], "clip.mp4: not of the form key=value"),
        (["max_steps=(1"], "max_steps=(1: not of the form key=value"),
        (["max_steps=${nope}"], "max_steps: Interpolation key 'nope' not found"),
        (["data=null"], "Config group override must be a string"),
        (["--config-dir", "nowhere"], "nowhere"),
    ],
)
def test_what_hydra_itself_refuses_is_one_sentence_too(toy, arguments: list[str], part: str) -> None:
    assert part in toy.refuse("run_dir=a", *arguments)


def test_a_missing_value_is_named_with_the_example(toy) -> None:
    assert toy.refuse("max_steps=3") == f"run_dir must be given, for example: {EXAMPLE}"


@pytest.mark.parametrize("typed", [["max_steps=3", "debug=true"], ["input=my clip.mp4"], []])
def test_a_missing_value_that_the_example_lacks_is_added_to_what_was_typed(toy, tmp_path: Path, typed: list[str]) -> None:
    (tmp_path / "conf" / "tokenizer" / "borrowed.yaml").write_text("defaults: [schema_borrowed]\n")
    given = ["tokenizer=borrowed", *typed]
    with pytest.raises(SystemExit):
        toy.main(given)
    sentence = toy.capsys.readouterr().err.splitlines()[-1].removeprefix("toy-train: ")
    start, example = sentence.split(" must be given, for example: ")
    assert start == "run_dir and tokenizer.levels and tokenizer.path"
    command, *words = shlex.split(example)
    kept = [word for word in given if word != "debug=true"]
    assert (command, words) == ("toy-train", [*kept, "run_dir=runs/toy", "tokenizer.levels=VALUE", "tokenizer.path=PATH"])
    # With a number where one is needed it runs as it is printed.
    assert toy.run(*(word.replace("VALUE", "5") for word in words))["tokenizer"] == {"path": "PATH", "levels": 5}


def test_a_missing_choice_of_preset_lists_the_presets(toy, tmp_path: Path) -> None:
    primary = tmp_path / "conf" / "toy_train.yaml"
    primary.write_text(primary.read_text().replace("data: digits", "data: ???"))
    assert toy.refuse("run_dir=a") == f"data must be given, one of digits, files, for example: {EXAMPLE}"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("clip of 3 frames:\n  give at least 5"), "clip of 3 frames: give at least 5"),
        (FileNotFoundError(2, "No such file or directory", "my clip.mp4"), "my clip.mp4: No such file or directory"),
        (FileNotFoundError("no video in x: tried mp4"), "no video in x: tried mp4"),
        (PermissionError(13, "Permission denied", "/out"), "/out: Permission denied"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_of_the_user_during_the_work_is_one_sentence(toy, error: Exception, sentence: str) -> None:
    def fail(config: dict[str, Any]) -> None:
        raise error

    toy.work = fail
    assert toy.refuse("run_dir=a") == sentence


def test_a_model_option_that_breaks_a_rule_is_told_without_the_wrapping(toy) -> None:
    from vidtok.config import VidTokConfig

    toy.work = lambda config: VidTokConfig(quantizer="wavelet") and None
    sentence = toy.refuse("run_dir=a")
    assert sentence.startswith("quantizer='wavelet'")
    assert "validation error" not in sentence


def test_an_error_of_ours_keeps_its_traceback(toy) -> None:
    def fail(config: dict[str, Any]) -> None:
        raise RuntimeError("ours")

    toy.work = fail
    with pytest.raises(RuntimeError, match="ours"):
        toy.run("run_dir=a")


def test_debug_shows_the_traceback_before_the_sentence(toy) -> None:
    with pytest.raises(SystemExit, match="2"):
        toy.run("run_dir=a", "max_step=5", "debug=true")
    lines = toy.capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "toy-train: max_step: unknown key, did you mean max_steps?"


def test_ctrl_c_is_one_line_and_status_130(toy) -> None:
    def interrupt(config: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    toy.work = interrupt
    assert toy.refuse("run_dir=a", status=130) == "interrupted"


HARD_PATHS = [
    "my folder=1, (a)",
    "[x] {y}.mp4",
    'it\'s "here"',
    "trailing\\",
    "a\\'b",
    "C:\\data\\x",
    "Zürich/映像",
    "a:b*?",
    "007",
    "true",
    "1,2",
]


@pytest.mark.parametrize("path", HARD_PATHS)
def test_a_path_arrives_as_it_was_typed(toy, path: str) -> None:
    config = toy.run("data=files", f"data.root={path}", f"run_dir={path}", f"input={path}")
    assert (config["data"]["root"], config["run_dir"], config["input"]) == (path, path, path)


def test_random_text_survives_hydras_grammar() -> None:
    draw, parser = random.Random(0), OverridesParser.create()
    for _ in range(200):
        text = "".join(draw.choices("ab '\"\\=,()[]{}:~$é", k=draw.randint(1, 8)))
        (override,) = parser.parse_overrides([f"input={cli._quote(text)}"])
        assert override.value() == text


def test_a_path_in_quotes_null_and_the_home_folder_keep_their_meaning(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = toy.run("data=files", "data.root=~/my videos", 'run_dir="a, b"', "input=null")
    assert config["data"]["root"] == "/home/ada/my videos"
    assert (config["run_dir"], config["input"]) == ("a, b", None)


def test_help_starts_with_an_example_and_lists_presets_and_keys(toy, tmp_path: Path) -> None:
    primary = tmp_path / "conf" / "toy_train.yaml"
    primary.write_text(primary.read_text().replace("data: digits", "data: ???"))
    with pytest.raises(SystemExit, match="0"):
        toy.run("--help")
    lines = toy.capsys.readouterr().out.splitlines()
    assert lines[0] == f"Example: {EXAMPLE}"
    assert "  data=digits|files" in lines
    assert "run_dir: ???" in lines
    assert "  episodes: 3" in lines
    assert not toy.configs


def test_cfg_job_shows_the_configuration_and_runs_nothing(toy) -> None:
    toy.main(["max_steps=7", "--cfg", "job", "tokenizer.width=5"])
    shown = OmegaConf.create(toy.capsys.readouterr().out)
    assert (shown.max_steps, shown.tokenizer.width, shown.data.episodes) == (7, 5, 3)
    assert not toy.configs


def test_the_schema_of_a_model_holds_only_its_own_fields() -> None:
    from vidtok.config import VidTokConfig

    schema = model_schema(VidTokConfig, frozenset({"format_version"}))
    names = {option.name for option in dataclasses.fields(schema)}
    assert names == {option.name for option in dataclasses.fields(VidTokConfig)} - {
        option.name for option in dataclasses.fields(PreTrainedConfig)
    } - {"format_version"}  # fmt: skip
    assert OmegaConf.structured(schema).stride_s == VidTokConfig().stride_s


def test_options_are_rebuilt_with_those_nested_in_them() -> None:
    built = build_options(Outer, {"seed": 3, "inner": {"root": "videos"}, "unrelated": 1})
    assert built == Outer(3, FilesOptions(root="videos"))


def test_every_preset_starts_from_its_schema() -> None:
    presets = sorted(Path(config_dir()).glob("*/*.yaml"))
    assert presets
    for preset in presets:
        assert preset.read_text().startswith("# "), f"{preset} does not open with its purpose and cost"
        if preset.parent.name in ("experiment", "budget"):
            continue  # keys of the whole command, which has a schema
        content = OmegaConf.load(preset)
        # Of its own where one source or project has keys that the others lack.
        own = f"schema_{preset.stem}"
        expected = {"data": {own}, "pretrained": {own, "schema"}}.get(preset.parent.name, {"schema"})
        assert next(iter(content.defaults)) in expected, preset


def start(script, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=script.parent / "empty",
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_ends_with_the_status_and_one_sentence_and_needs_no_torch(script) -> None:
    (script.parent / "empty").mkdir()
    out, err = (process := start(script, "run_dir=a, b", "max_steps=0")).communicate(timeout=60)
    assert json.loads(out) == [{"run_dir": "a, b", "max_steps": 0}, []]
    assert (process.returncode, err) == (0, "")
    _, err = (process := start(script, "run_dir=a", "max_step=0")).communicate(timeout=60)
    assert (process.returncode, err) == (2, "plain: max_step: unknown key, did you mean max_steps?\n")
    assert list((script.parent / "empty").iterdir()) == []


def test_ctrl_c_ends_a_process_with_status_130(script) -> None:
    (script.parent / "empty").mkdir()
    process = start(script, "run_dir=a", "max_steps=60")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "plain: interrupted\n")
