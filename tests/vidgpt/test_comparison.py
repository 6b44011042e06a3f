"""Paired differences against arithmetic."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import check_page
from tests.vidgpt.test_checkpoint_evaluation import write
from vidgpt.clip_sums import Bootstrap
from vidgpt.compare import main
from vidgpt.comparison import better_of, compare, paired_interval
from vidgpt.evaluate import main as evaluate
from vidgpt.evaluated_run import load_run
from vidgpt.metrics import RolloutMeter
from vidgpt.model import VidGPTForCausalLM
from vidtok.folders import save_model
from vidtok.tokens import TokenDataset

PROTOCOL = {"seed": 0, "split": "validation", "sampling": {"temperature": 0.0, "top_k": 0}}
NATS, TOP1 = "cross_entropy_nats_per_token", "top1_accuracy_fraction"


def write_run(
    folder: Path,
    values: Sequence[Mapping[str, Any]],
    regime: str = "teacher_forced",
    protocol: Any = PROTOCOL,
    episodes: Sequence[str] | None = None,
    **more: Any,
) -> Path:
    """Write what vidgpt-evaluate would, of clips 0, 1, ... of a row each; values: figures of each clip; episodes: of each, if known."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"protocol": protocol, **more}))
    (folder / "evaluation.json").write_text(json.dumps({"checkpoint": f"runs/{folder.name}", "files": []}))
    keys = [{"regime": regime, "forecaster": "model", "data_row": row, "first_latent_frame": 0} for row in range(len(values))]
    if episodes is not None:
        keys = [{**key, "episode": episode} for key, episode in zip(keys, episodes, strict=True)]
    with (folder / "by_clip.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys[0], *dict.fromkeys(name for figures in values for name in figures)])
        writer.writeheader()
        writer.writerows({**key, **figures} for key, figures in zip(keys, values, strict=True))
    return folder


def run_compare(folder: Path, *runs: Path, names: str = "out") -> dict[str, Any]:
    main([f"runs=[{','.join(map(str, runs))}]", f"output={folder / names}"])
    return json.loads((folder / names / "compare.json").read_text())


def refusal(folder: Path, *runs: Path, capsys: pytest.CaptureFixture[str], output: Path | None = None) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([f"runs=[{','.join(map(str, runs))}]", f"output={output or folder / 'out'}"])
    assert not (folder / "out").exists()
    told = capsys.readouterr().err
    assert told.startswith("vidgpt-compare: ") and told.count("\n") == 1
    return told


def test_two_evaluations_are_compared_figure_by_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write(tmp_path, [9, 8], "files")
    model = VidGPTForCausalLM.from_pretrained(tmp_path / "gpt")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    (tmp_path / "other").mkdir()
    save_model(model, tmp_path / "other")
    (tmp_path / "other" / "card.json").write_bytes((tmp_path / "gpt" / "card.json").read_bytes())
    evaluate(arguments)
    evaluate([f"checkpoint={tmp_path / 'other'}", *arguments[1:-1], f"output={tmp_path / 'out of the other=2'}"])
    runs = tmp_path / "out", tmp_path / "out of the other=2"
    main([f"runs=[{runs[0]}, {runs[1]}]", f"output={tmp_path / 'comparison'}"])
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "comparison" / "compare.json").read_text())
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    rows = {(row["regime"], row["figure"]): row for row in found["differences"] if row["forecaster"] == "model"}
    assert {regime for regime, _ in rows} == {"teacher_forced", "temporally_teacher_forced", "free_running"}
    for (regime, figure), row in rows.items():
        assert row["reference_value"] == pytest.approx(metrics[0][regime]["model"][figure]), (regime, figure)
        assert row["other_value"] == pytest.approx(metrics[1][regime]["model"][figure]), (regime, figure)
        assert row["clips_count"] == (1 if regime == "free_running" else 7)
    assert {("teacher_forced", name) for name in (NATS, "top1_accuracy_on_changed_tokens_fraction")} <= set(rows)
    assert rows["free_running", TOP1]["difference_ci95_low"] is None
    assert rows["teacher_forced", NATS]["verdict"] == "A better" and "A better" in printed
    assert "copy_last_frame_smoothed" in found["equal"]["teacher_forced"]
    assert rows["teacher_forced", NATS]["episodes_count"] == 2
    note = "intervals over 2 episodes: of fewer than 6 they are too narrow"
    assert {f"{regime}: {note}" for regime in ("teacher forced", "temporally teacher forced")} <= set(found["notes"])
    assert printed.count(f"teacher forced: {note}") == 2  # of one free-running clip nobody expects an interval
    page = check_page((tmp_path / "comparison" / "report.html").read_text(encoding="utf-8"))
    assert "each interval holds for its own figure at 95%" in page.text.replace("Each", "each")
    assert page.tags.count("table") == 3 and str(runs[1]) in page.text
    with (tmp_path / "comparison" / "compare.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["difference"]) for row in written] == [row["difference"] for row in found["differences"]]


def test_a_clip_has_the_place_where_its_tokens_lie(tmp_path: Path) -> None:
    write(tmp_path, [9, 3, 8], "files")
    clips = TokenDataset(tmp_path / "tokens", "validation", 6)
    whole = dict(zip((2, 3, 4), clips.rows(), strict=True))  # behind two rows of the training split
    assert [clips.place(index) for index in range(len(clips))] == [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 2)]
    for index in range(len(clips)):
        row, first = clips.place(index)
        assert torch.equal(clips[index]["indices"], whole[row][0, first : first + 6])
    with pytest.raises(IndexError, match="window 7 of 7"):
        clips.place(7)


def test_rows_by_clip_average_to_the_figures_of_all_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    meter = RolloutMeter((2, 2))
    for batch, frames in ((3, 4), (2, 2)):
        real, made = (torch.randint(3, (batch, frames, 2, 2), generator=generator) for _ in range(2))
        meter.update(made, real, real[:, 0])
    rows, whole = meter.by_clip(), meter.summary()
    counts, changed = ([row[name] for row in rows] for name in ("tokens_count", "changed_tokens_count"))
    assert counts == [16, 16, 16, 8, 8] and len(set(changed)) > 1
    for name, weights in {TOP1: counts, "top1_accuracy_on_changed_tokens_fraction": changed}.items():
        values = np.array([row[name] for row in rows], dtype=float)
        assert np.average(values, weights=np.array(weights, dtype=float)) == pytest.approx(whole[name])
    assert not {"perplexity_tokens", "cross_entropy_bits_per_token"} & {name for row in rows for name in row}


def test_intervals_are_of_pairs_and_as_wide_as_theory_says() -> None:
    draw = np.random.default_rng(0)
    clips = torch.tensor(draw.normal(5, 3, 400))
    ones, bootstrap = torch.ones(400, dtype=torch.float64), Bootstrap(2000)
    apart = range(400)
    assert paired_interval(clips, clips + 0.1, ones, bootstrap, apart) == pytest.approx((0.1, 0.1))
    change = torch.tensor(draw.normal(0.2, 1, 400))
    low, high = paired_interval(clips, clips + change, ones, bootstrap, apart) or (0, 0)
    half = 1.96 * float(change.std()) / 20
    assert (low + high) / 2 == pytest.approx(float(change.mean()), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    # Of weighted clips a ratio of sums: nine clips in ten weigh nothing.
    weights = (torch.arange(400) % 10 == 0).double()
    few = paired_interval(clips, clips + change, weights, bootstrap, apart) or (0, 0)
    assert few[1] - few[0] > 2.5 * (high - low)
    # Forty windows of one video are as good as one where all tell the same.
    same = change[:10].repeat_interleave(40)
    video = [clip // 40 for clip in range(400)]
    wide = paired_interval(clips, clips + same, ones, bootstrap, video) or (0, 0)
    assert wide == pytest.approx(paired_interval(change[:10] * 0, change[:10], ones[:10], bootstrap, range(10)))
    narrow = paired_interval(clips, clips + same, ones, bootstrap, apart) or (0, 0)
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert paired_interval(clips, clips + change, ones, bootstrap, [0] * 400) is None
    assert paired_interval(clips, clips + change, (torch.arange(400) < 40).double(), bootstrap, video) is None


def test_a_verdict_needs_a_direction_and_an_interval_that_leaves_zero_out(tmp_path: Path) -> None:
    names = {"psnr_db": 1.0, "mse": 1.0, "motion_lucas_kanade_pixels_per_frame": 1.0, "noise": 0.0, "word": "some text"}
    steps = [0.9, 1.0, 1.1, 1.2, 1.0, 0.8]
    first = [{**names, "noise": 0.0, "only_here": 1.0} for _ in steps]
    second = [
        {**{name: names[name] + step for name in list(names)[:3]}, "noise": (-1) ** place, "word": "another"}
        for place, step in enumerate(steps)
    ]
    a, b = write_run(tmp_path / "a", first, "pixels"), write_run(tmp_path / "b", second, "pixels")
    verdicts = {row["figure"]: (row["better"], row["verdict"]) for row in run_compare(tmp_path, a, b)["differences"]}
    assert verdicts == {
        "psnr_db": ("higher", "B better"),
        "mse": ("lower", "A better"),
        "motion_lucas_kanade_pixels_per_frame": (None, "differ"),
        "noise": (None, "not told apart"),
    }
    turned = {row["figure"]: row for row in run_compare(tmp_path, b, a, names="turned")["differences"]}
    assert turned["mse"]["verdict"] == "B better" and turned["mse"]["difference"] == pytest.approx(-1)
    found, _ = compare([load_run("A", a), load_run("B", b), load_run("C", a)], Bootstrap(100))
    assert {(row.reference, row.other) for row in found} == {("A", "B")}


@pytest.mark.parametrize(
    ("figure", "better"),
    [
        ("digit_1_cross_entropy_nats_per_token", "lower"),
        ("top1_accuracy_on_changed_tokens_fraction", "higher"),
        ("generated_accuracy_fraction", "higher"),
        ("changed_tokens_generated_fraction", None),
        ("copy_last_given_frame_accuracy_fraction", None),
        ("mse_sum_over_pixels_moving_mnist_mean_of_4", "lower"),
        ("ms_ssim_3_scales_best_of_4", "higher"),
        ("lpips_alex", "lower"),
        ("dtssd_grey_levels_of_255", "lower"),
        ("warping_error_lucas_kanade_mse", None),
        ("something_new", None),
    ],
)
def test_the_registry_tells_which_direction_is_better(figure: str, better: str | None) -> None:
    assert better_of(figure) == better


def test_few_episodes_are_noted_by_regime_and_of_some_figures_where_others_have_more(tmp_path: Path) -> None:
    hits, count, steps = "top1_accuracy_on_changed_tokens_fraction", "changed_tokens_count", range(9)
    first, second = ([{NATS: 1.0 + step * side, "tokens_count": 8} for step in steps] for side in (0, 0.1))
    moved = [{hits: side, count: int(step < 5)} for side in (0.5, 0.6) for step in steps]
    a, b = (
        write_run(tmp_path / name, [{**own, **more} for own, more in zip(values, changed, strict=True)])
        for name, values, changed in (("a", first, moved[:9]), ("b", second, moved[9:]))
    )
    few = "intervals over 5 episodes: of fewer than 6 they are too narrow"
    assert [note for note in run_compare(tmp_path, a, b)["notes"] if "over" in note] == [
        f"teacher forced, in some figures: {few}"
    ]
    for folder, values in ((a, first), (b, second)):
        write_run(folder / "pixels", [{"psnr_db": figures[NATS]} for figures in values[:5]], "pixels")
        lines = (folder / "pixels" / "by_clip.csv").read_text().replace("pixels,", "").replace("regime,", "")
        (folder / "pixels_by_clip.csv").write_text(lines)
        write_run(folder / "plain", values)
        (folder / "by_clip.csv").write_text((folder / "plain" / "by_clip.csv").read_text())
    assert [note for note in run_compare(tmp_path, a, b, names="both")["notes"] if "over" in note] == [f"pixels: {few}"]


def test_a_clip_of_which_a_figure_is_not_known_counts_in_neither_run(tmp_path: Path) -> None:
    name, count = "top1_accuracy_on_changed_tokens_fraction", "changed_tokens_count"
    a = write_run(tmp_path / "a", [{name: 0.5, count: 2}, {name: 0.25, count: 4}, {name: None, count: 0}, {name: 0.0, count: 6}])
    b = write_run(tmp_path / "b", [{name: 1.0, count: 2}, {name: 0.5, count: 4}, {name: None, count: 0}, {name: None, count: 6}])
    (row,) = run_compare(tmp_path, a, b)["differences"]
    assert (row["clips_count"], row["better"]) == (2, "higher")
    assert row["reference_value"] == pytest.approx(2 / 6) and row["other_value"] == pytest.approx(4 / 6)
    assert math.isfinite(row["difference_ci95_low"])


def test_whole_episodes_are_drawn_and_a_verdict_needs_more_than_many_windows_of_one(tmp_path: Path) -> None:
    steps = [0.5, 0.5, 0.5, 0.5, -0.1, 0.6]
    first, second = ([{NATS: 1.0 + step * side, "tokens_count": 8} for step in steps] for side in (0, 1))
    of = {"a": ["x"] * 4 + ["y", "z"], "b": ["x"] * 4 + ["y", "z"], "alone": ["x"] * 6}
    runs = {name: write_run(tmp_path / name, first if name == "a" else second, episodes=of[name]) for name in ("a", "b")}
    found = run_compare(tmp_path, *runs.values())
    (row,) = found["differences"]
    assert (row["clips_count"], row["episodes_count"]) == (6, 3) and found["bootstrap"]["unit"] == "episodes"
    assert (row["difference_ci95_low"], row["verdict"]) == (pytest.approx(-0.1), "not told apart")  # of y drawn alone
    assert "teacher forced: intervals over 3 episodes: of fewer than 6 they are too narrow" in found["notes"]
    # Older files do not say it: rows of the data set stand in, which is said.
    old = [write_run(tmp_path / f"old {name}", values) for name, values in (("a", first), ("b", second))]
    found = run_compare(tmp_path, *old, names="older")
    assert found["differences"][0]["episodes_count"] == 6 and found["differences"][0]["verdict"] == "A better"
    assert (
        "none of these evaluations says of which episode a clip is, so every row of the data set counts as one" in found["notes"]
    )
    # It is enough that one of them says it.
    assert run_compare(tmp_path, old[0], runs["b"], names="mixed")["differences"][0]["episodes_count"] == 3
    alone = [write_run(tmp_path / f"alone {side}", values, episodes=of["alone"]) for side, values in enumerate((first, second))]
    found = run_compare(tmp_path, *alone, names="one")
    assert found["differences"][0]["difference_ci95_low"] is None
    assert "teacher forced: no intervals: the 6 clips are of one episode, and depend on each other" in found["notes"]


@pytest.mark.parametrize(
    ("runs", "advice"),
    [
        ("A", "runs=A: expected a list, for example runs=[A,B]"),
        ("3", "runs=3: expected a list, for example runs=[3,B]"),
        ("{a:1}", "runs: expected a list, for example runs=[A,B]"),
        ("A,B", "runs=A,B: a list is written runs=[A,B]"),
        ("[A]", "runs=[A] has 1 folder: give 2 to 26, as runs=[A,B]"),
    ],
)
def test_whoever_forgets_the_brackets_or_the_second_run_is_told_how_it_is_written(
    runs: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([f"runs={runs}", "output=out"])
    assert capsys.readouterr().err.startswith(f"vidgpt-compare: {advice}")
