"""Teacher-forced figures against a direct loop, worlds with known answers, and the written files."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vidgpt import counts as counting
from vidgpt.config import VidGPTConfig
from vidgpt.evaluation import TokenReport, add_forced, evaluate_tokens, teacher_forced_scores
from vidgpt.layout import TokenLayout
from vidgpt.metrics import Baselines, RolloutMeter, TokenCounts, TokenMeter
from vidgpt.model import VidGPTForCausalLM
from vidgpt.pages import headline
from vidgpt.regimes import ForcedFrames, temporally_forced

LAYOUT = TokenLayout(codebook_size=8, height=2, width=3, num_actions=3)


class Uniform(nn.Module):
    """Finds every id equally likely, illegal ones included."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, LAYOUT.vocab_size))


class Broken(nn.Module):
    """Gives what a diverged training leaves behind."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.full((*input_ids.shape, LAYOUT.vocab_size), math.nan))


class Copier(nn.Module):
    """Is sure that the next token is the one a frame before it, and surer still of an illegal id."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        source = input_ids.roll(LAYOUT.tokens_per_frame - 1, dims=1)
        logits = 50 * nn.functional.one_hot(source, LAYOUT.vocab_size).float()
        logits[..., LAYOUT.codebook_size] = 100
        return SimpleNamespace(logits=logits)


def clips(seed: int, count: int = 5, frames: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "indices": torch.randint(8, (count, frames, 2, 3), generator=generator),
        "actions": torch.randint(3, (count, frames), generator=generator),
    }


def counts(batch: dict[str, Tensor]) -> TokenCounts:
    made = TokenCounts(8, (2, 3))
    made.update(batch["indices"])
    return made


def copy_last(context: Tensor, future: int, actions: Tensor | None) -> Tensor:
    return context[:, -1:].expand(-1, future, -1, -1)


def tiny_model() -> VidGPTForCausalLM:
    torch.manual_seed(0)
    config = VidGPTConfig(
        codebook_size=8,
        grid_height=2,
        grid_width=3,
        num_actions=3,
        window=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = VidGPTForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def evaluate(model: nn.Module, batch: dict[str, Tensor], **options: int) -> TokenReport:
    return evaluate_tokens(model, LAYOUT, [batch], counts(batch), 2, copy_last, **options)


def test_teacher_forced_scores_agree_with_growing_the_sequence_one_token_at_a_time() -> None:
    model, batch = tiny_model(), clips(0, count=2, frames=3)
    scores = teacher_forced_scores(model, LAYOUT, batch["indices"], batch["actions"])
    ids = LAYOUT.flatten(batch["indices"], batch["actions"])
    for clip in range(2):
        for position in range(LAYOUT.tokens_per_frame, ids.shape[1]):
            if LAYOUT.is_lead(torch.tensor(position)):
                continue
            with torch.no_grad():
                logits = model(ids[clip : clip + 1, :position]).logits[0, -1, :8].double()
            t, h, w = (int(x) for x in LAYOUT.coordinates(torch.tensor(position)))
            target = int(ids[clip, position])
            assert scores.nats[clip, t - 1, h, w].item() == pytest.approx(-logits.log_softmax(0)[target].item(), abs=1e-4)
            assert scores.top1[clip, t - 1, h, w].item() == float(logits.argmax() == target)


def test_a_uniform_model_costs_ln_of_the_codebook_size_because_illegal_ids_are_no_candidates() -> None:
    figures = evaluate(Uniform(), clips(1)).metrics()["teacher_forced"]
    assert figures["model"]["cross_entropy_nats_per_token"] == pytest.approx(math.log(8), rel=1e-6)
    assert figures["model"]["cross_entropy_bits_per_frame"] == pytest.approx(3 * 6, rel=1e-6)
    assert figures["uniform"]["cross_entropy_nats_per_token"] == pytest.approx(math.log(8), rel=1e-12)


def test_a_copier_scores_exactly_what_the_copy_baseline_does() -> None:
    figures = evaluate(Copier(), clips(2)).metrics()["teacher_forced"]
    assert figures["model"]["top1_accuracy_fraction"] == figures["copy_last_frame_smoothed"]["top1_accuracy_fraction"]
    assert figures["model"]["top1_accuracy_on_changed_tokens_fraction"] == 0


def test_in_a_still_world_copying_is_always_right_in_both_regimes() -> None:
    batch = clips(3)
    batch["indices"] = batch["indices"][:, :1].expand(-1, 4, -1, -1)
    figures = evaluate(Copier(), batch).metrics()
    assert figures["teacher_forced"]["model"]["top1_accuracy_fraction"] == 1
    assert figures["free_running"]["model"]["top1_accuracy_fraction"] == 1
    assert figures["free_running"]["model"]["copy_last_given_frame_accuracy_fraction"] == 1
    assert figures["free_running"]["model"]["changed_tokens_generated_fraction"] == 0


def test_generating_the_truth_is_accuracy_one_at_every_horizon_and_gets_context_future_and_actions() -> None:
    batch = clips(4)
    seen = []

    def oracle(context: Tensor, future: int, actions: Tensor | None) -> Tensor:
        assert actions is not None
        seen.append((tuple(context.shape), future, tuple(actions.shape)))
        match = [int((batch["indices"][:, :2] == row).flatten(1).all(1).nonzero()[0]) for row in context]
        return batch["indices"][match, 2:]

    report = evaluate_tokens(Uniform(), LAYOUT, [batch], counts(batch), 2, oracle, batch_size=3)
    assert seen == [((3, 2, 2, 3), 2, (3, 4)), ((2, 2, 2, 3), 2, (2, 4))]
    assert [row["top1_accuracy_fraction"] for row in report.free_running["model"].by_frame()] == [1, 1]


def test_batch_size_changes_no_figure_and_progress_counts_clips() -> None:
    model, batch = tiny_model(), clips(5)
    done: list[int] = []
    small = evaluate_tokens(model, LAYOUT, [batch], counts(batch), 2, None, batch_size=2, progress=done.append).metrics()
    large = evaluate_tokens(model, LAYOUT, [batch], counts(batch), 2, None, batch_size=5).metrics()
    assert done == [2, 4, 5]
    for name, figures in large["teacher_forced"].items():
        assert small["teacher_forced"][name] == pytest.approx(figures, rel=1e-5)


def test_evaluation_leaves_the_training_mode_as_it_was() -> None:
    model = tiny_model().train()
    evaluate(model, clips(6))
    assert model.training


def test_the_files_keep_regimes_apart_and_hold_every_frame_and_place(tmp_path: Path) -> None:
    batch = clips(7)
    evaluate(Uniform(), batch).write(tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {"clips_count", "episodes_count", "bootstrap", "teacher_forced", "free_running"}
    assert metrics["clips_count"] == 5
    assert not any("cross_entropy" in key for key in metrics["free_running"]["model"])
    frames = list(csv.DictReader((tmp_path / "out" / "by_frame.csv").open()))
    forced = [row for row in frames if row["regime"] == "teacher_forced" and row["forecaster"] == "model"]
    free = [row for row in frames if row["regime"] == "free_running" and row["forecaster"] == "model"]
    assert [row["frame_index"] for row in forced] == ["1", "2", "3"]
    assert [(row["frame_index"], row["horizon_frames"]) for row in free] == [("2", "1"), ("3", "2")]
    places = list(csv.DictReader((tmp_path / "out" / "by_position.csv").open()))
    assert len(places) == 6 * (5 + 5)


def test_rollouts_stand_beside_those_of_every_baseline() -> None:
    train, batch = clips(11), clips(12)
    train["indices"][:, :, 0] = 5  # so that the likeliest id is known, and that of a place is another
    train["indices"][:, :, 1] = torch.tensor([1, 2, 2])
    free = evaluate_tokens(Uniform(), LAYOUT, [batch], counts(train), 2, copy_last).metrics()["free_running"]
    last, real = batch["indices"][:, 1:2], batch["indices"][:, 2:]
    expected = {
        "unigram": real == 5,
        "unigram_by_position": real == torch.tensor([[5, 5, 5], [1, 2, 2]]),
        "copy_last_frame": real == last,
        "model": real == last,
    }
    for name, hits in expected.items():
        assert free[name]["top1_accuracy_fraction"] == pytest.approx(float(hits.double().mean()))
        moves = 0 if name in ("copy_last_frame", "model") else None
        assert moves is None or free[name]["changed_tokens_generated_fraction"] == moves
    still = (last[:, 0] != 5).double().mean() / 2  # moves to its one frame at the first horizon, and nowhere at the second
    assert free["unigram"]["changed_tokens_generated_fraction"] == pytest.approx(float(still))
    assert free["uniform"]["top1_accuracy_fraction"] == pytest.approx(1 / 8)
    assert free["uniform"]["changed_tokens_generated_fraction"] == pytest.approx(7 / 8)
    assert free["uniform"]["frame_entropy_generated_bits"] is None


def test_the_three_regimes_are_three_tables_of_the_same_clips() -> None:
    model, batch = tiny_model(), clips(13)

    def force(indices: Tensor, actions: Tensor | None) -> ForcedFrames:
        return temporally_forced(model, LAYOUT, indices, actions)

    report = evaluate_tokens(model, LAYOUT, [batch], counts(batch), 2, copy_last, force=force, batch_size=2)
    figures, direct = report.metrics(), force(batch["indices"], batch["actions"])
    temporally = figures["temporally_teacher_forced"]
    assert set(temporally) == {"model", *Baselines.names}
    assert temporally["model"]["cross_entropy_nats_per_token"] == pytest.approx(float(direct.scores.nats.mean()))
    assert temporally["model"]["generated_accuracy_fraction"] == temporally["model"]["top1_accuracy_fraction"]
    moved = (direct.generated != batch["indices"][:, :-1]).double().mean()
    assert temporally["model"]["changed_tokens_generated_fraction"] == pytest.approx(float(moved))
    full = figures["teacher_forced"]
    assert temporally["model"]["cross_entropy_nats_per_token"] != pytest.approx(
        full["model"]["cross_entropy_nats_per_token"], rel=1e-4
    )
    assert all(temporally[name] == full[name] for name in Baselines.names)
    regimes = {row["regime"] for row in report.by_frame()}
    assert (
        regimes
        == {row["regime"] for row in report.by_position()}
        == {"teacher_forced", "temporally_teacher_forced", "free_running"}
    )
    assert "world_model_challenge_1x" not in figures
    with pytest.raises(ValueError, match="got 4 clips for a report of 5"):
        add_forced(report, LAYOUT, [{name: part[:4] for name, part in batch.items()}], force)


def test_clips_keep_the_episodes_that_they_were_cut_from_in_every_regime_whatever_the_batches() -> None:
    model, batch = tiny_model(), {**clips(12, count=6), "episodes": torch.tensor([4, 4, 4, 7, 7, 9])}

    def force(indices: Tensor, actions: Tensor | None) -> ForcedFrames:
        return temporally_forced(model, LAYOUT, indices, actions)

    reports = [
        evaluate_tokens(model, LAYOUT, [batch], counts(batch), 2, copy_last, force=force, batch_size=size) for size in (6, 4)
    ]
    for report in reports:
        meters = report.teacher_forced, report.temporally_teacher_forced, report.free_running
        assert {tuple(meter.sums.episodes) for regime in meters for meter in regime.values()} == {(4, 4, 4, 7, 7, 9)}
        figures = report.metrics()
        assert (figures["clips_count"], figures["episodes_count"], figures["bootstrap"]["unit"]) == (6, 3, "episodes")
        assert (figures["free_running"]["clips_count"], figures["free_running"]["episodes_count"]) == (6, 3)
        assert "intervals over 3 episodes: of fewer than 6 they are too narrow" in headline(report)
    apart = evaluate_tokens(model, LAYOUT, [clips(12, count=5)], counts(batch), 2, None)
    assert "intervals over 5 episodes" in apart.interval_note()


@pytest.mark.parametrize(
    ("forced", "rolled", "note"),
    [
        ([*range(10)], [*range(9)], ""),
        ([*range(10)], [4], ""),
        ([*range(10)], [0, 0, 1], "free-running, intervals over 2 episodes: of fewer than 6 they are too narrow"),
        ([0, 1, 2], [0, 1, 2], "intervals over 3 episodes: of fewer than 6 they are too narrow"),
        ([0, 1, 2], [0, 0], "intervals over 3 episodes: of fewer than 6 they are too narrow; free-running, no intervals: the 2 clips "
         "are of one episode, and depend on each other"),
    ],
)  # fmt: skip
def test_a_note_on_intervals_is_of_the_regimes_that_have_few_episodes(forced: list[int], rolled: list[int], note: str) -> None:
    token_meter, rollout_meter = TokenMeter((1, 1)), RolloutMeter((1, 1))
    for meter, episodes in ((token_meter, forced), (rollout_meter, rolled)):
        ones = torch.ones(len(episodes), 1, 1, 1)
        meter.sums.add(0, dict.fromkeys(meter.sums.fields, ones), torch.tensor(episodes))
    report = TokenReport(len(forced), 1, {"model": token_meter}, {"model": rollout_meter})
    assert report.interval_note() == note


def test_tables_name_episodes_in_any_letters_whatever_the_locale(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, vidgpt.token_report as r; r.write_csv(pathlib.Path(sys.argv[1]), [{'episode': 'caf\\xe9.mp4'}])"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "table.csv")], env=os.environ | plain, check=True)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "episode\ncafé.mp4\n"


def test_without_counts_the_unigram_baselines_are_left_out() -> None:
    report = evaluate_tokens(Uniform(), LAYOUT, [clips(9)], None, 2, copy_last)
    assert list(report.teacher_forced) == ["model", "uniform", "copy_last_frame_smoothed"]
    assert list(report.free_running) == ["model", "uniform", "copy_last_frame"]
    assert "per-position unigram" not in headline(report)[0]


def test_without_counts_only_copying_hits_however_large_the_codebook_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "TABLE_ENTRIES", 1)
    batch = clips(10)
    batch["indices"] = batch["indices"] % 7 + 1  # of id 0 alone something is known
    report = evaluate_tokens(Uniform(), LAYOUT, [batch], None, 2, None)
    figures = report.metrics()["teacher_forced"]["copy_last_frame_smoothed"]
    assert figures["top5_accuracy_fraction"] == figures["top1_accuracy_fraction"] < 0.5


def test_wrong_input_is_refused_in_one_sentence() -> None:
    batch = clips(8)
    with pytest.raises(ValueError, match="no clips"):
        evaluate_tokens(Uniform(), LAYOUT, [], counts(batch), 2, None)
    with pytest.raises(ValueError, match="clips of 4 frames; a context of 4"):
        evaluate_tokens(Uniform(), LAYOUT, [batch], counts(batch), 4, None)
    with pytest.raises(ValueError, match="no numbers"):
        evaluate(Broken(), batch)
    with pytest.raises(ValueError, match="context 0"):
        evaluate_tokens(Uniform(), LAYOUT, [batch], counts(batch), 0, None)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 2, 3\); the future is \(4, 2, 2, 3\)"):
        evaluate_tokens(Uniform(), LAYOUT, [batch], counts(batch), 2, lambda given, future, actions: given.repeat(1, 2, 1, 1))
