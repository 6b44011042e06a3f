"""Options of a run: what is refused, and the way through OmegaConf."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from vidtok.run_options import RunOptions, check_options, options_from


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


def test_options_survive_omegaconf() -> None:
    merged = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(RunOptions(run_dir="x", max_minutes=2, betas=[0.8, 0.9]))))
    options = options_from({str(key): merged[key] for key in merged} | {"data": {}})
    assert (options.max_minutes, options.betas) == (2, [0.8, 0.9])
