"""What vidtok-train adds to a run: data that must stay the same, and a quantizer that trains in short runs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidtok.model import VidTokModel
from vidtok.options import TrainTokenizerOptions
from vidtok.training import train_tokenizer

TOKENIZER = {"stride_t": 1, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
DIGITS = {"name": "digits", "episodes": 4, "validation_episodes": 1, "frames": 4, "size": 32}


def train(folder: Path, data: dict[str, Any] | None = None, **options: Any) -> None:
    values = {"batch_size": 2, "warmup_steps": 0, "clip_frames": 2, "evaluation_clips": 2, "num_workers": 0, **options}
    train_tokenizer(TrainTokenizerOptions(run_dir=str(folder), **values), data or DIGITS, TOKENIZER, values)


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
    assert capsys.readouterr().out.count("unquantized_steps=200 is cut to 2, a fifth of max_steps, so that the quantizer") == 1
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
