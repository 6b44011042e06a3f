"""The health report: known answers for known faults, rules that judge as they say, a page that stands alone, the whole command."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.conftest import check_page, randomised
from vidtok.config import VidTokConfig
from vidtok.data import Episode
from vidtok.digits import join_digits, split_digits
from vidtok.evaluate import main
from vidtok.folders import save_model
from vidtok.health.evaluation import FILES, choose_clips, clip_length
from vidtok.health.measures import HealthMeter, code_usage
from vidtok.health.page import Health, ShownClip, write_health_page
from vidtok.health.seams import Coder
from vidtok.health.speed import measure_speed
from vidtok.health.verdicts import RULES, Verdict, judge_all, overall
from vidtok.metrics import PSNR_CAP_DB, CodeMeter
from vidtok.model import VidTokModel
from vidtok.padding import grid_for, valid_frames

FACTORS = [8, 8, 8]
DATA = ["data=digits", "data.frames=20", "data.size=32", "data.episodes=2", "data.validation_episodes=3"]


class Blocks:
    """A tokenizer of pictures in 512 colours: every place of 2 x 2 equal pixels is one id, and nothing is lost."""

    first_frames = stride_t = 1
    stride_s = 2
    codebook_factors = FACTORS
    is_framewise = True

    def encode(self, video: Tensor) -> Tensor:
        return join_digits(((video[..., ::2, ::2] + 1) * 3.5).round().long().movedim(1, -1), FACTORS)

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        small = split_digits(indices, FACTORS).movedim(-1, 1) / 3.5 - 1
        return small.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_for(frames, height, width, 1, 2)

    def valid_frames(self, frames: int) -> tuple[int, int]:
        return valid_frames(frames, 1)


class Fading(Blocks):
    """Every frame is one level of 255 darker than the one before."""

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        video = super().decode(indices)
        return video - torch.arange(video.shape[2]).view(-1, 1, 1) / 127.5


class Collapsed(Blocks):
    """All pictures are one code."""

    def encode(self, video: Tensor) -> Tensor:
        return torch.zeros_like(super().encode(video))


def clips(count: int = 3, frames: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(8, (count, 3, frames, 8, 8), generator=generator) / 3.5 - 1
    small[..., :4] = small[:, :, :1, :, :4]
    return small.repeat_interleave(2, -1).repeat_interleave(2, -2)


def measured(tokenizer: Any, video: Tensor | None = None) -> dict[str, Any]:
    meter = HealthMeter(Coder(tokenizer))
    for clip in clips() if video is None else video:
        meter.update(clip[None])
    return meter.figures(fps=10.0)


def verdict(figures: dict[str, Any], key: str) -> str:
    (found,) = [verdict.status for verdict in judge_all(figures) if verdict.rule.key == key]
    return found


def test_a_tokenizer_that_loses_nothing_is_good_throughout() -> None:
    figures = measured(Blocks())
    assert figures["psnr_db_mean_of_frames"] == figures["psnr_db_worst_tenth_of_clips"] == PSNR_CAP_DB
    assert figures["psnr_db_by_frame_index"] == [PSNR_CAP_DB] * 9
    assert figures["ssim_mean_of_frames"] == pytest.approx(1)
    assert figures["psnr_db_drop_over_frame_index"] == figures["flicker_static_grey_levels_of_255"] == 0
    assert figures["changed_ids_static_fraction"] == 0
    assert figures["changed_ids_moving_fraction"] == pytest.approx(511 / 512, abs=0.01)
    assert figures["static_places_fraction"] == pytest.approx(0.5, abs=0.01)
    assert {verdict.status for verdict in judge_all(figures)} == {"good"}


def test_the_rate_is_that_of_the_ids() -> None:
    figures = measured(Blocks())
    assert figures["bits_per_pixel_raw"] == 9 / 4
    assert figures["ids_per_second"] == 64 * 10
    assert figures["bits_per_second_raw"] == 9 * 64 * 10
    assert 0.97 * 9 / 4 < figures["bits_per_pixel_entropy_coded"] < 9 / 4
    assert figures["compression_of_24_bit_pixels_raw"] == pytest.approx(24 * 4 / 9)


def test_later_frames_that_are_worse_show_by_frame_in_the_drop_and_as_flicker() -> None:
    figures = measured(Fading())
    errors = [10 * math.log10(255**2 / frame**2) for frame in range(1, 9)]
    assert figures["psnr_db_by_frame_index"] == pytest.approx([PSNR_CAP_DB, *errors], abs=1e-3)
    # The first frame is left out.
    assert figures["psnr_db_drop_over_frame_index"] == pytest.approx(np.mean(errors[:4]) - np.mean(errors[4:]), abs=1e-3)
    assert figures["flicker_static_grey_levels_of_255"] == pytest.approx(1, abs=1e-4)
    assert verdict(figures, "psnr_db_drop_over_frame_index") == "broken"
    assert verdict(figures, "flicker_static_above_source_grey_levels_of_255") == "look at this"


def test_a_collapsed_codebook_is_called_broken() -> None:
    figures = measured(Collapsed())
    assert figures["codebook_used_codes"] == 3  # one of each of the three
    assert figures["codebook_used_of_attainable_fraction"] == 1 / 8
    figures = measured(Collapsed()) | code_usage_of([0] * 5000, 1024)
    assert verdict(figures, "codebook_used_of_attainable_fraction") == "broken"
    assert verdict(figures, "codebook_perplexity_of_size_fraction") == "look at this"
    assert figures["bits_per_pixel_entropy_coded"] == 0


def code_usage_of(ids: list[int], size: int) -> dict[str, float]:
    meter = CodeMeter(size)
    meter.update(torch.tensor(ids))
    return code_usage(meter)


def test_few_tokens_are_not_held_against_a_large_codebook() -> None:
    ids = np.random.default_rng(0).integers(65536, size=20_000)
    usage = code_usage_of(ids.tolist(), 65536)
    assert usage["codebook_used_fraction"] < 0.3
    assert usage["codebook_used_of_attainable_fraction"] == pytest.approx(1, abs=0.02)
    assert code_usage_of([0], 1)["codebook_used_of_attainable_fraction"] == 1


def test_clips_too_short_or_small_leave_out_what_they_cannot_tell() -> None:
    figures = measured(Blocks(), clips(2, 1)[..., :8, :8])
    assert figures["ssim_mean_of_frames"] is figures["psnr_db_drop_over_frame_index"] is None
    assert figures["flicker_static_grey_levels_of_255"] is figures["changed_ids_static_fraction"] is None
    statuses = {verdict.rule.key: verdict.status for verdict in judge_all(figures)}
    assert statuses["ssim_mean_of_frames"] == statuses["changed_ids_static_fraction"] == "not measured"


def test_continuous_latents_have_no_codes_and_a_width() -> None:
    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(quantizer="kl", stride_t=4, width=8, encoder_blocks=1, decoder_blocks=1)).eval()
    figures = measured(model, torch.zeros(1, 3, 5, 16, 16))
    assert not [key for key in figures if key.startswith(("codebook", "bits", "ids", "changed"))]
    assert figures["latent_values_per_pixel"] == pytest.approx(figures["latent_channels"] * 2 * 4 / (5 * 16 * 16))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_every_rule_judges_as_it_says(rule: Any) -> None:
    worse = -1 if rule.good > rule.broken else 1
    assert rule.judge(rule.good) == "good"
    assert rule.judge(rule.good + worse * 1e-9) == "look at this"
    assert rule.judge(None) == rule.judge(math.nan) == "not measured"
    if math.isfinite(rule.broken):
        assert rule.judge(rule.broken) == "look at this"
        assert rule.judge(rule.broken + worse * 1e-9) == "broken"
    assert rule.words().startswith("good ≥" if worse < 0 else "good ≤")
    assert ("broken" in rule.words()) == math.isfinite(rule.broken)
    assert rule.number.format(rule.good) in rule.words()


def test_every_rule_names_a_figure_that_is_measured() -> None:
    figures = measured(Blocks())
    cut = {rule.key for rule in RULES if rule.key.startswith(("chunk", "tile"))}
    assert {rule.key for rule in RULES} - cut <= set(figures)
    assert len({rule.key for rule in RULES}) == len(RULES)


def test_verdicts_are_counted() -> None:
    verdicts = [Verdict(RULES[0], 30.0, "good"), Verdict(RULES[1], None, "not measured"), Verdict(RULES[2], 1.0, "broken")]
    assert overall(verdicts) == "1 good, 0 to look at, 1 broken"


def test_speed_and_memory_are_those_of_this_machine() -> None:
    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(stride_t=4, width=8, encoder_blocks=1, decoder_blocks=1)).eval()
    speed = measure_speed(Coder(model), torch.zeros(2, 3, 5, 16, 16))
    assert speed["encode_median_frames_per_second"] > 0 < speed["decode_median_frames_per_second"]
    assert speed["parameters"] == model.num_parameters()
    # The decoded clip at least, and not a thousand of them.
    assert 1 <= speed["peak_tensors_mebibytes"] * 2**20 / (4 * 2 * 3 * 5 * 16 * 16) < 1000
    assert measure_speed(Coder(Blocks()), clips())["parameters"] is None


def episode(frames: int, name: str = "film") -> Episode:
    return Episode(name, 0.0, 10.0, np.zeros((frames, 4, 4, 3), np.uint8), None, "validation")


def test_clips_cover_the_data_and_depend_on_the_seed_alone() -> None:
    episodes = [episode(30), episode(5), episode(12)]
    chosen = choose_clips(episodes, 10, 8, 0)
    assert [(place.episode is episodes[2], place.first) for place in chosen] == sorted(
        (place.episode is episodes[2], place.first) for place in chosen
    )
    assert len({(id(place.episode), place.first) for place in chosen}) == 8
    assert chosen == choose_clips(episodes, 10, 8, 0) != choose_clips(episodes, 10, 8, 1)
    every = choose_clips(episodes, 10, 99, 5)
    assert [(place.episode is episodes[2], place.first) for place in every] == [
        *((False, first) for first in range(21)),
        *((True, first) for first in range(3)),
    ]


def test_a_clip_is_as_long_as_tokenizer_and_data_allow() -> None:
    coder = Coder(VidTokModel(VidTokConfig(stride_t=4, width=8, encoder_blocks=1, decoder_blocks=1)))
    assert clip_length(coder, [episode(100)], None) == 17
    assert clip_length(coder, [episode(12)], None) == 9
    assert clip_length(coder, [episode(100)], 33) == 33
    with pytest.raises(ValueError, match=r"clip_frames=18 does not fit stride_t=4: use 17 or 21"):
        clip_length(coder, [episode(100)], 18)
    with pytest.raises(ValueError, match="the longest of 1 episodes has 12"):
        clip_length(coder, [episode(12)], 17)


SMALL = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
CONFIGS = [
    {},
    {"encoder_kernel": 1, "patch_s": 8, "quantizer": "vq"},
    {"quantizer": "fsq", "codebook_size": 64000, "stride_s": 16, "channel_multipliers": [1, 3, 2]},
    {"quantizer": "fsq", "fsq_levels": [40, 40], "stride_s": 4},
    {"quantizer": "vq", "codebook_size": 70, "codebook_dim": 16},
    {"quantizer": "simvq", "codebook_size": 4096, "num_codebooks": 2},
    {"quantizer": "lfq", "codebook_size": 256},
    {"quantizer": "bsq", "codebook_size": 1 << 12},
    {"quantizer": "kl"},
]


def typed_keys(advice: str) -> list[dict[str, Any]]:
    """The changes of an advice, each as the keys of tokenizer= that a person would type together."""
    found = re.findall(r"tokenizer\.\S+?=\S+(?: tokenizer\.\S+?=\S+)*", advice)
    words = [[word.removeprefix("tokenizer.").rstrip(",:").split("=") for word in change.split()] for change in found]
    return [{key: yaml.safe_load(value) for key, value in change} for change in words]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_advised_key_can_be_typed_beside_what_the_tokenizer_has_and_changes_it(config: dict[str, Any]) -> None:
    has = VidTokConfig(**SMALL, **config)
    changes = [change for rule in RULES for change in typed_keys(rule.advise(has))]
    assert changes
    for change in changes:
        changed = VidTokConfig(**SMALL, **{**config, **change})
        for key, value in change.items():
            assert value is None or getattr(changed, key) == value != getattr(has, key), change
    for rule in RULES:
        words = re.sub(r"tokenizer\.\S+", "KEY", rule.advise(has))
        assert not re.search(r"\b(encoder_kernel|codebook_dim|codebook_size|quantizer)\b|[{}]", words)
        assert words.count(":") <= 1 and not words.rstrip().endswith((":", "with", "or"))


def test_nothing_is_advised_that_the_tokenizer_has_and_no_training_of_another_projects() -> None:
    advice = {rule.key: rule.advise(VidTokConfig(quantizer="fsq", encoder_kernel=1, stride_s=4)) for rule in RULES}
    for words in ("encoder_kernel", "quantizer=fsq", "stride_s", "codebook_dim"):
        assert not [text for text in advice.values() if words in text]
    used = {rule.key: rule.advise(VidTokConfig(quantizer="vq")) for rule in RULES}["codebook_used_of_attainable_fraction"]
    assert used.endswith(
        ": a training with tokenizer.codebook_size=512, tokenizer.codebook_dim=4 or tokenizer.quantizer=fsq may help"
    )
    assert not [rule for rule in RULES if "tokenizer." in rule.advise(None)]
    assert judge_all({"codebook_used_of_attainable_fraction": 0.0}, VidTokConfig(quantizer="vq"))[0].advice == used


def small_health() -> Health:
    meter = HealthMeter(Coder(Fading()))
    meter.update(clips())
    figures = {**meter.figures(10.0), "parameters": 12_345_678, "split": "validation split"}
    assert meter.codes is not None
    usage = [counts.sort(descending=True).values for counts in meter.codes.digit_counts]
    return Health("Health of <tok>", "3 clips", figures, judge_all(figures), usage, meter.clips)


def test_the_page_stands_alone_and_says_every_verdict_with_its_rule(tmp_path: Path) -> None:
    health = small_health()
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    shown = [ShownClip(kind, f"{kind} <film>", {"source": frames, "reconstruction": frames}) for kind in ("worst", "typical")]
    page = check_page(write_health_page(health, shown, 8.0, {"seed": 17}, tmp_path).read_text(encoding="utf-8"))
    for line in health.verdicts:
        for words in (line.rule.title, line.status, line.rule.words(), line.rule.show(line.value)):
            assert words in page.text
    for words in ("Health of <tok>", "worst <film>", "typical <film>", "12.3 M", "17", "Both axes are logarithmic"):
        assert words in page.text
    assert page.tags.count("picture") == 4
    assert page.headings == ["Verdicts", "Worst clips", "Typical clips", "Curves", "Numbers", "What the words mean", "Receipt"]


def test_a_page_without_clips_codes_or_curves_has_no_empty_section(tmp_path: Path) -> None:
    bare = replace(small_health(), figures={}, usage=[], clips=[], verdicts=[])
    page = check_page(write_health_page(bare, [], 8.0, {}, tmp_path).read_text(encoding="utf-8"))
    assert page.headings == ["Verdicts", "What the words mean", "Receipt"]


def save_tiny(folder: Path, **options: Any) -> str:
    torch.manual_seed(0)
    save_model(randomised(VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1, **options))), folder / "tok")
    return f"checkpoint={folder / 'tok'}"


@pytest.mark.parametrize("options", [{"stride_t": 4}, {"stride_t": 1, "quantizer": "kl"}], ids=["causal", "continuous"])
def test_the_command_writes_figures_clips_and_page(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tmp_path, **options)
    main([checkpoint, *DATA, f"output={tmp_path / 'out'}", "clips=6", "worst=2", "batch_size=4"])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["clips"] == 6 and figures["clip_frames"] == 17 and figures["split"] == "validation split"
    assert figures["chunk_max_abs_pixel_difference"] < 1e-4
    assert figures["verdicts"]["psnr_db_mean_of_frames"] in ("look at this", "broken")
    assert ("codebook_used_codes" in figures) == (options.get("quantizer") != "kl")
    with (tmp_path / "out" / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert np.mean([float(row["psnr_db"]) for row in rows]) == pytest.approx(figures["psnr_db_mean_of_frames"], abs=1e-6)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    # Curves and verdicts have places of their own.
    numbers = [key for key, value in figures.items() if not isinstance(value, list | dict)]
    tables = text.partition("<h2>Receipt</h2>")[0]
    assert {tables.count(f"<td>{key.replace('_', ' ')}</td>") for key in numbers} == {1}
    assert "<caption><span>Fidelity</span></caption>" in text and "<caption><span>Other</span></caption>" not in text
    lowest = min(rows, key=lambda row: float(row["psnr_db"]))
    assert f"{lowest['source']} at {float(lowest['start_seconds']):.1f} s" in page.text
    assert "6 clips of 17 frames, 32x32" in printed
    assert "PSNR of moving pixels" in printed and "broken" in printed and "report.html" in printed


def write_films(folder: Path, lengths: dict[str, int]) -> list[str]:
    for name, frames in lengths.items():
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{name}.npy", np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8))
    return ["data=files", f"data.root={folder}", "data.size=[16,16]", "data.fps=24", f"data.cache_dir={folder.parent / 'cache'}"]


@pytest.mark.parametrize(
    ("lengths", "keys", "sentence"),
    [
        # Of each film the last quarter is held out, at most 24 frames.
        ({"a": 96, "b": 36, "c": 20, "d": 40}, [],
         "3 of 4 episodes have fewer than 17 frames and are left out: clip_frames=5 takes all, or give a larger data.validation or a "
         "higher data.fps"),
        ({"a": 96, "b": 36}, ["split=train", "clip_frames=33"],
         "1 of 2 episodes has fewer than 33 frames and is left out: clip_frames=25 takes all, or give a higher data.fps or longer videos"),
        ({"a": 96, "b": 96}, [], ""),
    ],
    ids=["held out", "of training", "none"],
)  # fmt: skip
def test_episodes_too_short_for_a_clip_are_named_and_counted(
    lengths: dict[str, int], keys: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_films(tmp_path / "films", lengths)
    arguments = [save_tiny(tmp_path, stride_t=4), *data, f"output={tmp_path / 'out'}", "clips=2", "worst=0"]
    main([*arguments, *keys])
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    text = check_page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    left_out = sentence.partition(":")[0]
    assert figures["split_episodes"] == len(lengths)
    assert figures["split_episodes_left_out"] == int(left_out[:1] or 0)
    if sentence:
        assert f"{sentence}\n" in printed and f"of which {left_out}" in text
        # What it advises takes all of them in.
        (fewer,) = re.findall(r"clip_frames=\d+", sentence)
        main([*arguments, *(key for key in keys if "clip_frames" not in key), fewer])
    assert "left out" not in (capsys.readouterr().out if sentence else printed + text.partition("Curves")[0])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split_episodes_left_out"] == 0


def test_a_figure_of_no_group_is_on_the_page_too(tmp_path: Path) -> None:
    health = replace(small_health(), figures={"psnr_db_new": 1.5, "something_new": 2.5})
    text = write_health_page(health, [], 8.0, {}, tmp_path).read_text(encoding="utf-8")
    assert (
        text.count("<caption><span>Other</span></caption>")
        == text.count("<td>something new</td>")
        == text.count("<td>psnr db new</td>")
        == 1
    )


@pytest.mark.parametrize("name", ["metrics.json", "clips.csv", "figures/code_usage_dark.png", "evaluation.json"])
def test_only_what_an_evaluation_wrote_is_written_over(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    arguments = [save_tiny(tmp_path, stride_t=1), *DATA, f"output={tmp_path / 'out'}", "clip_frames=3"]
    with pytest.raises(SystemExit):
        main([*arguments, "clips=2"])
    assert f"{name} is there already, and no evaluation of this folder wrote it" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    kept = mine.rename(tmp_path / "out" / "mine")
    for count in (3, 2):
        main([*arguments, f"clips={count}"])
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["clips"] == count
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {*FILES, "evaluation.json", "mine"} and kept.read_text() == "mine"


def test_the_pictures_of_an_evaluation_are_no_data_of_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data=files", f"data.root={tmp_path / 'out' / 'figures'}"]
    with pytest.raises(SystemExit):
        main([save_tiny(tmp_path), *data, f"output={tmp_path / 'out'}"])
    assert re.search("data.root=.*figures lies where output=.*out is written", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["clips=0"], "clips=0 is not allowed"),
        (["split=test"], "split=test is no split"),
        (["data.validation_episodes=0", "split=validation"], "split=validation holds no episode"),
        (["chunk_frames=64"], "chunk_frames=64 leaves no border"),
        (["tile=32"], "tile=32 leaves no border in frames of 32x32"),
        (["checkpoint=null"], "is given: checkpoint=DIR"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([save_tiny(tmp_path, stride_t=4), *DATA, f"output={tmp_path / 'out'}", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
