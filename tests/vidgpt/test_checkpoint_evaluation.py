"""What an evaluation leaves out is said, and counted beside its figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import check_page
from vidgpt.evaluate import main
from vidgpt.finetuning import config_for
from vidgpt.model import VidGPTForCausalLM
from vidtok.card import Card
from vidtok.folders import save_model
from vidtok.tokens import TokenRow, TokenWriter

GRID = {"grid_height": 2, "grid_width": 3, "stride_t": 1, "stride_s": 8, "frame_height": 16, "frame_width": 24}
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 6}


def write(folder: Path, lengths: list[int], data_name: str) -> list[str]:
    """Write tokens with held-out rows of these lengths, and a model; gives the arguments that evaluate it."""
    names = {"tokenizer_fingerprint": "0123abcd", "data_name": data_name, "manifest_hash": "abcd"}
    card = Card(codebook_size=8, fps=10.0, num_actions=0, **GRID, **names)  # type: ignore[arg-type]
    with TokenWriter(folder / "tokens", card) as writer:
        for number, (split, frames) in enumerate([("train", 6), ("train", 2), *(("validation", length) for length in lengths)]):
            indices = torch.randint(8, (frames, 2, 3), generator=torch.Generator().manual_seed(frames))
            writer.add(TokenRow(source=f"film {number}, {split}.mp4", start=0.0, split=split, frames=frames, indices=indices))
        writer.finish()
    torch.manual_seed(0)
    save_model(VidGPTForCausalLM(config_for(card, MODEL)), folder / "gpt")
    Card.load(folder / "tokens").save(folder / "gpt")
    keys = ["context=2", "rollout_clips=1", f"output={folder / 'out'}"]
    return [f"checkpoint={folder / 'gpt'}", f"tokens={folder / 'tokens'}", *keys]


@pytest.mark.parametrize(
    ("lengths", "data_name", "sentence", "advice"),
    [
        ([7, 5, 3, 6, 1], "files", "3 of 5 rows of split 'validation' have fewer than 6 latent frames and are left out",
         "a larger data.validation or a higher data.fps"),
        ([4, 3], "digits", "1 of 2 rows of split 'validation' has fewer than 4 latent frames and is left out",
         "a larger data.frames"),
        ([9, 6], "files", "", ""),
    ],
)  # fmt: skip
def test_rows_too_short_for_a_clip_are_named_and_counted(
    lengths: list[int], data_name: str, sentence: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(write(tmp_path, lengths, data_name))
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    window = min(6, max(lengths))
    assert (figures["rows_count"], figures["rows_left_out_count"]) == (len(lengths), sum(length < window for length in lengths))
    assert figures["clips_count"] == sum(max(0, length - window + 1) for length in lengths)
    page = check_page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    if sentence:
        assert f"{sentence}: encode longer ones, with {advice}\n" in printed and f"; {sentence}." in page.text
    else:
        assert "left out" not in printed + page.text.partition("Receipt")[0]


def test_every_clip_names_its_episode_and_the_episodes_behind_the_intervals_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*write(tmp_path, [9, 7], "files"), "rollout_clips=6", "batch_size=2"])  # more batches than one in every regime
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    note = "intervals over 2 episodes: of fewer than 6 they are too narrow"
    assert printed.count(note) == 1 and figures["episodes_count"] == figures["free_running"]["episodes_count"] == 2
    assert (
        "6 clips of 2 episodes, teacher-forced: "
        in check_page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    )
    with (tmp_path / "out" / "by_clip.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["data_row"], row["episode"]) for row in rows} == {
        ("2", "film 2, validation.mp4"),
        ("3", "film 3, validation.mp4"),
    }
    main([*write(tmp_path / "one", [9], "files"), "rollout_clips=3"])
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "one" / "out" / "metrics.json").read_text())
    assert "no intervals: the 4 clips are of one episode, and depend on each other\n" in printed
    assert not [name for name in figures["teacher_forced"]["model"] if "ci95" in name]
