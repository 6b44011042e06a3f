"""Options of a run: what is refused, and the way through OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vidtok.bench import main as bench
from vidtok.config import VidTokConfig
from vidtok.data.options import DigitsOptions
from vidtok.options import TrainTokenizerOptions
from vidtok.run_options import RunOptions, check_options, default_values, options_from
from vidtok.schema import config_dir
from vidtok.train import main


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": None}, "Neither max_steps nor max_minutes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"betas": [0.9]}, "betas"),
        ({"precision": "fp16"}, "auto, fp32 or bf16"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ],
)
def test_impossible_options_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(options_from({"run_dir": "x", "max_steps": 1} | change))


def test_a_tracker_that_is_not_known_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"^trackers=\[tensorbord\] names tensorbord, which is not known"):
        TrainTokenizerOptions(trackers=["tensorbord"])


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("trackers=wandb", "trackers=wandb: expected a list, for example trackers=[wandb]"),
        ("trackers=''", "trackers=: expected a list, for example trackers=[tensorboard]"),
        ("trackers={a:1}", "trackers: expected a list, for example trackers=[tensorboard]"),
        ("trackers=a,b", "trackers=a,b: a list is written trackers=[a,b], and a text with a comma needs quotes"),
    ],
)
def test_whoever_forgets_the_brackets_of_trackers_is_told_what_is_allowed(
    typed: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data=digits", f"run_dir={tmp_path / 'a'}", typed])
    assert capsys.readouterr().err == f"vidtok-train: {advice}\n"


def test_the_example_of_a_list_with_a_default_is_that_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench([f"checkpoint={tmp_path}", "compare=''"])
    assert capsys.readouterr().err == "vidtok-bench: compare=: expected a list, for example compare=[precision,channels_last]\n"


def test_options_survive_omegaconf() -> None:
    merged = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(RunOptions(run_dir="x", max_minutes=2, betas=[0.8, 0.9]))))
    options = options_from({str(key): merged[key] for key in merged} | {"data": {}})
    assert (options.max_minutes, options.betas) == (2, [0.8, 0.9])


def test_default_values_are_those_of_the_composed_command() -> None:
    main.register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        composed = OmegaConf.to_container(compose("vidtok_train", ["data=schema_digits", "tokenizer=schema", "run_dir=x"]))
    defaults = default_values(TrainTokenizerOptions, {"data": DigitsOptions, "tokenizer": VidTokConfig})
    leaves = {key: value for key, value in _flat(composed).items() if key not in ("run_dir", "debug")}
    assert len(leaves) > 60 and {"data.frames", "tokenizer.norm", "gan.betas", "loss.l2_weight"} <= leaves.keys()
    assert {key: value for key, value in leaves.items() if _flat(defaults).get(key, "absent") != value} == {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
