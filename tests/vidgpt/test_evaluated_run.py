"""Evaluations that must not be compared are refused, and those of older versions are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vidgpt.test_comparison import NATS, PROTOCOL, refusal, run_compare, write_run


def test_protocols_that_differ_are_refused_by_field_and_both_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{NATS: 1.0, "tokens_count": 8}, {NATS: 2.0, "tokens_count": 8}]
    other = {**PROTOCOL, "seed": 3, "sampling": {"temperature": 0.5, "top_k": 0}}
    a, b = write_run(tmp_path / "a", clips), write_run(tmp_path / "b", clips, protocol=other)
    told = refusal(tmp_path, a, b, capsys=capsys)
    assert "their protocols differ in seed (0 and 3), sampling.temperature (0.0 and 0.5): evaluate both in one way" in told
    less = {name: value for name, value in PROTOCOL.items() if name != "split"}
    assert "split ('validation' and not there)" in refusal(
        tmp_path, a, write_run(tmp_path / "less", clips, protocol=less), capsys=capsys
    )
    # Of a part that both measured, and of one that only one did.
    c = write_run(tmp_path / "c", clips, pixels={"protocol": {"size": 64}})
    d = write_run(tmp_path / "d", clips, pixels={"protocol": {"size": 32}})
    assert "differ in pixels.size (64 and 32)" in refusal(tmp_path, c, d, capsys=capsys)
    assert run_compare(tmp_path, a, c)["notes"][0] == "every figure of every clip is the same in all runs"


def test_what_is_no_pair_of_evaluations_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{NATS: 1.0 + place, "tokens_count": 8} for place in range(3)]
    a = write_run(tmp_path / "a", clips)
    fewer, moved = (
        write_run(tmp_path / "fewer", clips[:2]),
        write_run(tmp_path / "m", [{**clip, "tokens_count": 9} for clip in clips]),
    )
    elsewhere = write_run(tmp_path / "elsewhere", clips, "free_running")
    old = write_run(tmp_path / "old", clips)
    (old / "by_clip.csv").unlink()
    twice = write_run(tmp_path / "twice", clips)
    lines = (twice / "by_clip.csv").read_text()
    (twice / "by_clip.csv").write_text(lines + lines.splitlines()[-1] + "\n")
    (tmp_path / "empty").mkdir()
    for runs, sentence in {
        (a,): f"runs=[{a}] has 1 folder: give 2 to 26, as runs=[A,B]",
        (a, tmp_path / "nowhere"): f"{tmp_path / 'nowhere'} does not exist: give output folders of vidgpt-evaluate",
        (a, tmp_path / "empty"): f"{tmp_path / 'empty'} has no metrics.json",
        (a, old): f"{old} has no by_clip.csv, which vidgpt-evaluate writes: run it again",
        (a, fewer): "has 3 clips and "
        + f"{fewer} 2 of the regime teacher_forced, 2 of them the same: evaluate both with the same clips",
        (a, moved): "have another tokens_count of the same clip",
        (a, elsewhere): "have no regime in common",
        (a, twice): "line 5, tells of a clip a second time",
    }.items():
        assert sentence in refusal(tmp_path, *runs, capsys=capsys), sentence
    assert "lies where" in refusal(tmp_path, a, a, capsys=capsys, output=a)
    assert sorted(path.name for path in a.iterdir()) == ["by_clip.csv", "evaluation.json", "metrics.json"]


def test_rows_of_unlike_episodes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{NATS: 1.0 + place, "tokens_count": 8} for place in range(2)]
    a, b = (write_run(tmp_path / name, clips, episodes=["x", name]) for name in "ab")
    assert f"{a} has row 1 of the data set from a and {b} from b" in refusal(tmp_path, a, b, capsys=capsys)


def test_an_episode_that_one_run_names_is_one_in_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = ([{NATS: 1.0 + step * side, "tokens_count": 8} for step in (0.5, 0.4, 0.6)] for side in range(3))
    old, other = write_run(tmp_path / "old", first), write_run(tmp_path / "other", third)
    new = write_run(tmp_path / "new", second, episodes=["x", "x", "y"])
    for number, runs in enumerate(((old, new, other), (old, other, new), (new, old, other))):
        rows = run_compare(tmp_path, *runs, names=str(number))["differences"]
        assert [row["episodes_count"] for row in rows] == [2, 2], runs
    # Two that do not agree are named, also where neither is the first.
    unlike = write_run(tmp_path / "unlike", third, episodes=["x", "z", "y"])
    assert f"{new} has row 1 of the data set from x and {unlike} from z" in refusal(tmp_path, old, new, unlike, capsys=capsys)


def test_pixels_measured_with_unlike_files_or_against_unlike_decoders_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [{NATS: 1.0, "tokens_count": 8}, {NATS: 2.0, "tokens_count": 8}]
    detector = {"figure": "fvd", "detector_sha256": "e" * 8}
    card = {
        "motion_estimator": "lucas_kanade, of all clips",
        "reference_tokenizer_fingerprint": "a" * 8,
        "lpips": {"network": "alex", "weights_sha256": "b" * 8, "heads_sha256": "c" * 8},
        "distances": {"fvd": {"model": detector}},
    }
    first = write_run(tmp_path / "first", clips, pixels={"protocol": card})
    changes: dict[str, dict[str, Any]] = {
        "pixels.reference_tokenizer_fingerprint ('aaaaaaaa' and 'd')": {"reference_tokenizer_fingerprint": "d"},
        "pixels.lpips.heads_sha256 ('cccccccc' and 'd')": {"lpips": {**card["lpips"], "heads_sha256": "d"}},
        "pixels.lpips.heads_sha256 ('cccccccc' and not there)": {"lpips": {"network": "alex", "weights_sha256": "b" * 8}},
        "pixels.lpips.weights_sha256 ('bbbbbbbb' and 'd')": {"lpips": {**card["lpips"], "weights_sha256": "d"}},
        "pixels.distances.fvd.model.detector_sha256 ('eeeeeeee' and 'd')": {
            "distances": {"fvd": {"model": {**detector, "detector_sha256": "d"}}}
        },
    }
    for number, (field, change) in enumerate(changes.items()):
        other = write_run(tmp_path / str(number), clips, pixels={"protocol": card | change})
        told = refusal(tmp_path, first, other, capsys=capsys)
        assert f"their protocols differ in {field}: evaluate both in one way" in told, field
    # What only one of them measured is not compared, and so no reason to refuse the rest.
    less = {**card, "lpips": None, "motion_estimator": None, "distances": {}}
    plain = write_run(tmp_path / "plain", clips, pixels={"protocol": less})
    assert run_compare(tmp_path, first, plain)["equal"] == {"teacher_forced": ["model"]}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (b"regime,forecaster\n\xff\xfe", "is no table of clips ("),
        (b"regime,forecaster,data_row,first_latent_frame\nteacher_forced,model,0,zero\n", "line 2, names no clip ("),
        (b"regime,forecaster,data_row,first_latent_frame\nteacher_forced,model,0\n", "line 2, names no clip ("),
        (b"\x00\x01", "have no regime in common"),
        (b"", "have no regime in common"),
    ],
)
def test_a_damaged_table_of_clips_is_one_sentence(
    damage: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(tmp_path / name, [{NATS: 1.0, "tokens_count": 8}]) for name in "ab")
    (b / "by_clip.csv").write_bytes(damage)
    told = refusal(tmp_path, a, b, capsys=capsys)
    assert str(b) in told and sentence in told
