"""Rollouts as pixels: windows show the frames of their place, figures are those of an own count, samples and intervals are kept apart."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import check_page, randomised
from tests.vidgpt.conftest import clips as make_clips
from tests.vidgpt.conftest import net
from tests.vidtok.test_perceptual import backbone, heads
from vidgpt.clip_frames import ClipFrames
from vidgpt.clip_sums import Bootstrap, ClipPlace, lower_tail
from vidgpt.compare import main as compare
from vidgpt.evaluate import main
from vidgpt.finetuning import config_for
from vidgpt.fused import FusedModel
from vidgpt.futures import Futures
from vidgpt.metrics import HIGH, LOW
from vidgpt.model import VidGPTForCausalLM
from vidgpt.pixel_pages import GIVEN_MOVED, INVENTED, MISSED, MOVED, STILL, token_frames
from vidgpt.pixel_report import MODEL, PixelReport
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.data import build_episodes
from vidtok.encoding import encode_dataset
from vidtok.folders import copy_folder, save_model
from vidtok.metrics import psnr_by_frame
from vidtok.model import VidTokModel
from vidtok.options import EncodeOptions
from vidtok.perceptual import file_sha256
from vidtok.tokens import TokenDataset
from vidtok.video import to_video
from vidtok.video_metrics.table import PixelTable

DATA: dict[str, Any] = {"name": "digits", "episodes": 2, "validation_episodes": 3, "frames": 13, "size": 32}
GPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 5}


def encoded(folder: Path, stride_t: int = 1) -> VidTokModel:
    """Write a tokenizer, the tokens of moving digits and a transformer for them, all untrained; gives the tokenizer."""
    torch.manual_seed(0)
    tokenizer = randomised(VidTokModel(VidTokConfig(stride_t=stride_t, width=8, encoder_blocks=1, decoder_blocks=1)))
    save_model(tokenizer, folder / "tokenizer")
    encode_dataset(EncodeOptions(checkpoint=str(folder / "tokenizer"), output=str(folder / "tokens")), DATA)
    card = Card.load(folder / "tokens")
    save_model(VidGPTForCausalLM(config_for(card, GPT)), folder / "gpt")
    card.save(folder / "gpt")
    copy_folder(folder / "tokens" / "tokenizer", folder / "gpt" / "tokenizer")
    return tokenizer


def evaluate(folder: Path, *more: str) -> dict[str, Any]:
    keys = [f"checkpoint={folder / 'gpt'}", f"tokens={folder / 'tokens'}", f"output={folder / 'out'}", "context=2", "clips=3"]
    main([*keys, "rollout_clips=3", "temporally_forced=false", "resamples=50", *more])
    output = next((Path(key.partition("=")[2]) for key in reversed(more) if key.startswith("output=")), folder / "out")
    figures = json.loads((output / "metrics.json").read_text())
    assert isinstance(figures, dict)
    return figures


DIGITS = ["data=digits", *(f"data.{key}={DATA[key]}" for key in ("episodes", "validation_episodes", "frames", "size"))]


@pytest.mark.parametrize("stride_t", [1, 2])
def test_every_window_shows_the_frames_of_its_place(stride_t: int, tmp_path: Path) -> None:
    tokenizer = encoded(tmp_path, stride_t)
    windows = TokenDataset(tmp_path / "tokens", "validation", 5)
    frames = ClipFrames(windows, Predictor.from_pretrained(tmp_path / "gpt"), DATA)
    episodes = build_episodes(DATA).split("validation")
    starts = set()
    for index in range(len(windows)):
        row, start = windows.place(index)
        whole = to_video(episodes[row - DATA["episodes"]].frames[0:13])
        first = 1 + (start - 1) * stride_t if start else 0
        last = 1 + (start + 4) * stride_t
        real, shown = frames.real(index), frames.decode(index, windows[index]["indices"][None])
        assert torch.equal(real, whole[:, first:last])
        expected = tokenizer.decode(tokenizer.encode(whole[None]))[:, :, first:last].clamp(-1, 1)
        torch.testing.assert_close(shown[:, :, -4 * stride_t :], expected[:, :, -4 * stride_t :], atol=1e-4, rtol=0)
        assert shown.shape[2] == last - first
        starts.add(start)
    assert len(starts) > 2


def test_data_that_the_tokens_were_not_made_of_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path, "pixels=true", *DIGITS, "data.seed=5")
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert "data=digits has manifest_hash=" in told.err and "vidtok-encode command" in told.err
    assert told.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_compares_frames_with_the_source_and_gives_ceiling_and_baselines(tmp_path: Path) -> None:
    tokenizer = encoded(tmp_path)
    found = evaluate(tmp_path, "pixels=true", *DIGITS, "samples=2", "sampling.temperature=1")["pixels"]
    assert list(found) == [
        "protocol",
        "episodes_count",
        "model",
        "copy_last_frame",
        "linear_extrapolation",
        "tokenizer_ceiling",
        "real",
    ]
    protocol = found["protocol"]
    assert (protocol["reference"], protocol["clips_count"], protocol["samples_count"]) == ("source_frames", 3, 2)
    assert protocol["distances"] == {}  # three future frames are too few for the proxy
    # Counted once more without the evaluation's own code.
    windows = TokenDataset(tmp_path / "tokens", "validation", 5)
    episodes = build_episodes(DATA).split("validation")
    copied, ceiling = [], []
    for index in np.linspace(0, len(windows) - 1, 3).round().astype(int).tolist():
        row, start = windows.place(index)
        clip = to_video(episodes[row - DATA["episodes"]].frames[start : start + 5])[None]
        copied.append(psnr_by_frame(clip[:, :, 1:2].expand(-1, -1, 3, -1, -1), clip[:, :, 2:]))
        ceiling.append(psnr_by_frame(tokenizer.reconstruct(clip)[:, :, 2:].clamp(-1, 1), clip[:, :, 2:]))
    for name, values in (("copy_last_frame", copied), ("tokenizer_ceiling", ceiling)):
        assert found[name]["psnr_db"] == pytest.approx(float(torch.cat(values).mean()), abs=1e-3)
        assert found[name]["psnr_db" + LOW] <= found[name]["psnr_db"] <= found[name]["psnr_db" + HIGH]
    assert found["model"]["psnr_db_best_of_2"] > found["model"]["psnr_db_mean_of_2"] and "psnr_db" not in found["model"]
    with (tmp_path / "out" / "pixels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["forecaster"] == "copy_last_frame"]
    assert [row["horizon_frames"] for row in rows] == ["1", "2", "3"]
    assert [float(row["psnr_db"]) for row in rows] == pytest.approx(torch.cat(copied).mean(0).tolist(), abs=1e-3)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    # The best sample has no figures that are of all samples together, and so no row in the table of motion.
    assert text.count("<td>model, best of 2</td>") == 1 and text.count("<td>model, mean of 2</td>") == 2
    assert text.partition("<td>model, best of 2</td>")[2].partition("</tr>")[0].endswith("<td>–</td>")
    assert "worst 1 of 3 clips: " in page.text and "best 1 of 3 clips: " in page.text
    assert text.count("tokenizer&#x27;s ceiling</figcaption>") == 3
    for word in ("model, mean of 2", "model, best of 2", "copy last frame", "compute.pixels_seconds", "protocol.manifest_hash"):
        assert word in page.text


def test_without_data_the_reference_is_the_reconstruction_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoded(tmp_path)
    found = evaluate(tmp_path, "pixels=true")["pixels"]
    assert found["protocol"]["reference"] == "tokenizer_reconstruction"
    assert found["tokenizer_ceiling"]["psnr_db"] == 100 > found["model"]["psnr_db"]
    assert "against the tokenizer's reconstruction" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "real tokens, decoded</figcaption>" in text and "ceiling</figcaption>" not in text


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["pixels=true", "samples=2"], "samples=2 would all be one"),
        (["vmaf=true"], "vmaf= is for the comparison of frames: give pixels=true too"),
        (["samples=2", "sampling.temperature=1"], "samples= is for the comparison of frames"),
        (["optical_flow=false"], "optical_flow= is for the comparison of frames"),
        (["pixels=true", "rollout_clips=0"], "give rollout_clips=1 or more"),
        (["pixels=true", "fvd_detector=a.pt"], "fvd_sha256="),
    ],
)
def test_keys_that_do_nothing_or_run_unknown_code_are_refused(keys: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint=a", "tokens=b", "output=c", *keys])
    assert sentence in capsys.readouterr().err


class ForGrey(nn.Module):
    """A detector of clips of one colour."""

    def forward(self, video: Tensor) -> Tensor:
        return nn.functional.conv3d(video, torch.zeros(1, 1, 1, 1, 1)).mean((2, 3, 4))


class Colours(nn.Module):
    """A detector of three features."""

    def forward(self, video: Tensor) -> Tensor:
        return video.mean((2, 3, 4))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *keys: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        evaluate(folder, "pixels=true", *keys)
    told = capsys.readouterr().err
    assert told.startswith("vidgpt-evaluate: ") and told.count("\n") == 1 and not (folder / "out").exists()
    return told


def test_files_that_do_not_work_are_refused_in_one_sentence_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPT, "window", 12)
    encoded(tmp_path)

    def measure(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("vidgpt.checkpoint_evaluation._measure", measure)
    for name, network in {"grey": ForGrey(), "colours": Colours()}.items():
        torch.jit.script(network).save(str(tmp_path / f"{name}.pt"))
    keys = {
        name: [f"fvd_detector={tmp_path / name}.pt", f"fvd_sha256={file_sha256(tmp_path / f'{name}.pt')}"]
        for name in ("grey", "colours")
    }
    assert "grey.pt fails on clips of shape (2, 3, 10, 224, 224) (" in refusal(tmp_path, capsys, *keys["grey"])
    told = refusal(tmp_path, capsys, *keys["colours"], "rollout_clips=1")
    assert "fvd_detector compares 2 clips or more, and there is 1: give rollout_clips=2" in told
    torch.save(backbone("alex") | {name: head * 0 for name, head in heads("alex").items()}, tmp_path / "zero.pth")
    torch.save(backbone("alex") | {name: head / 0 for name, head in heads("alex").items()}, tmp_path / "broken.pth")
    for name, found in (("zero", "0.0"), ("broken", "nan")):
        told = refusal(tmp_path, capsys, f"lpips_weights={tmp_path / name}.pth")
        assert f"LPIPS of lpips_weights finds {found} between two images of noise: its files are damaged" in told
    for clips, figures in (
        (3, "frechet_random_conv3d_proxy (32 features) and fvd (3 features)"),
        (4, "frechet_random_conv3d_proxy (32 features)"),
    ):
        with pytest.raises(AssertionError, match="the work began"):
            evaluate(tmp_path, "pixels=true", *keys["colours"], f"rollout_clips={clips}")
        said = [line for line in capsys.readouterr().out.splitlines() if "singular" in line]
        assert len(said) == 1 and said[0].startswith(
            f"{figures} of {clips} clips: a covariance of no more clips than features is singular"
        )


def test_a_distance_of_few_clips_is_told_and_its_card_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPT, "window", 12)
    encoded(tmp_path)
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    keys = [f"fvd_detector={tmp_path / 'colours.pt'}", f"fvd_sha256={file_sha256(tmp_path / 'colours.pt')}", "optical_flow=false"]
    for clips in (3, 6):
        pixels = evaluate(tmp_path, "pixels=true", *keys, f"rollout_clips={clips}", f"output={tmp_path / str(clips)}")["pixels"]
        card = pixels["protocol"]["distances"]["fvd"]["model"]
        assert (card["num_real"], card["num_generated"], card["num_features"]) == (clips, clips, 3)
        assert card["is_covariance_singular"] is (clips == 3)
        for row in ("model", "copy_last_frame", "tokenizer_ceiling"):
            assert pixels[row]["fvd_distance"] >= 0 and "fvd_distance_missing_because" not in pixels[row]
        assert pixels["model"]["fvd_distance"] > 0 and pixels["model"]["frechet_random_conv3d_proxy_distance"] > 0
        page = (tmp_path / str(clips) / "report.html").read_text(encoding="utf-8")
        assert ("features: frechet_random_conv3d_proxy, fvd" in page) is (clips == 3)
        assert "biased upwards by no more clips than features: frechet_random_conv3d_proxy" in page
    with pytest.raises(SystemExit, match="2"):
        compare([f"runs=[{tmp_path / '3'},{tmp_path / '6'}]", f"output={tmp_path / 'compared'}"])
    told = capsys.readouterr().err
    assert "pixels.distances.fvd.model.num_real (3 and 6)" in told and "fvd.model.is_covariance_singular (True and False)" in told


def test_the_protocol_names_the_files_of_lpips_and_what_optical_flow_takes_can_be_left_out(tmp_path: Path) -> None:
    encoded(tmp_path)
    torch.save(backbone("alex"), tmp_path / "net.pth")
    torch.save(heads("alex"), tmp_path / "heads.pth")
    files = [f"lpips_weights={tmp_path / 'net.pth'}", f"lpips_heads={tmp_path / 'heads.pth'}"]
    found = evaluate(tmp_path, "pixels=true", "optical_flow=false", "context=4", *files)["pixels"]
    checksums = {
        f"{name}_sha256": file_sha256(tmp_path / file) for name, file in (("weights", "net.pth"), ("heads", "heads.pth"))
    }
    assert found["protocol"]["lpips"] == {"network": "alex", **checksums}
    assert found["protocol"]["motion_estimator"] is None and found["episodes_count"] == 3
    # Of a single future frame nothing is left that needs no reference.
    assert found["real"] == {} and not [name for row in ("model", "real") for name in found[row] if "lucas" in name]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "what needs optical flow is left out (optical_flow=false)" in text and "over 3 episodes" in text
    with (tmp_path / "out" / "pixels_by_clip.csv").open(newline="") as file:
        assert {row["episode"] for row in csv.DictReader(file)} == {f"digits/validation-{number:05d}" for number in range(3)}


def test_a_sample_is_the_same_in_any_batch_and_however_many_there_are() -> None:
    model, given = FusedModel(net()), make_clips(4)

    def draw(samples: int, sizes: list[int]) -> Tensor:
        futures = Futures(model, SamplingOptions(temperature=1.0), seed=3, samples=samples)
        for part in given.split(sizes):
            first = futures(part, 2, None)
            assert torch.equal(first, futures.indices()[0, -len(part) :])
        return futures.indices()

    three = draw(3, [4])
    assert three.shape == (3, 4, 2, 3, 4)
    assert torch.equal(three, draw(3, [1, 2, 1])) and torch.equal(three[:1], draw(1, [2, 2]))
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])
    with pytest.raises(ValueError, match="no futures were drawn"):
        Futures(model, SamplingOptions()).indices()


def test_intervals_are_those_of_drawing_clips_again_and_clips_are_ranked_by_psnr() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(6, 3, 4, 16, 16, generator=generator) - 0.5
    noise = torch.randn(real.shape, generator=generator) * torch.linspace(0.3, 0.05, 6).reshape(-1, 1, 1, 1, 1)
    table = PixelTable()
    table.update({MODEL: (real + noise).clamp(-1, 1)}, real, real[:, :, 0])
    report = PixelReport(table, [], {"samples_count": 1}, Bootstrap(200, 7), [ClipPlace(clip, 0, str(clip)) for clip in range(6)])
    assert report.worst_first() == [0, 1, 2, 3, 4, 5]
    values = table.values(MODEL, "psnr_db")[0].numpy()
    drawn = torch.randint(6, (200, 6), generator=torch.Generator().manual_seed(7)).numpy()
    assert report.clip_mean(MODEL, 2) == pytest.approx(values[2].mean())

    def bounds(clips: np.ndarray) -> list[float]:
        return [float(end) for end in np.percentile([clips[rows].mean() for rows in drawn], [100 * tail, 100 - 100 * tail])]

    tail = lower_tail(6)
    summary = report.summary[MODEL]
    assert [summary["psnr_db" + end] for end in (LOW, HIGH)] == pytest.approx(bounds(values.mean(1)), rel=1e-9)
    third = next(row for row in report.by_horizon if row["forecaster"] == MODEL and row["horizon_frames"] == 3)
    assert [third["psnr_db" + end] for end in (LOW, HIGH)] == pytest.approx(bounds(values[:, 2]), rel=1e-9)
    # Clips of one episode are drawn together.
    paired = replace(report, places=[ClipPlace(clip, 0, str(clip // 2)) for clip in range(6)])
    episodes = torch.randint(3, (200, 3), generator=torch.Generator().manual_seed(7)).numpy()
    tail, drawn = lower_tail(3), np.stack([2 * episodes, 2 * episodes + 1], axis=2).reshape(200, 6)
    assert [paired.summary[MODEL]["psnr_db" + end] for end in (LOW, HIGH)] == pytest.approx(bounds(values.mean(1)), rel=1e-9)
    # A figure that the last horizon does not have is unknown there, not a number.
    last = next(row for row in report.by_horizon if row["forecaster"] == MODEL and row["horizon_frames"] == 4)
    assert last["flicker_second_difference_grey_levels_of_255"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for row in report.by_horizon for value in row.values())


def test_squares_say_what_each_token_does() -> None:
    real = torch.tensor([[[1, 1, 1, 1]], [[2, 1, 1, 1]], [[2, 2, 2, 1]]])
    predicted = torch.tensor([[[1, 1, 1, 1]], [[2, 1, 1, 1]], [[2, 2, 9, 9]]])
    sizes = {"grid_height": 1, "grid_width": 4, "stride_t": 2, "stride_s": 2, "frame_height": 2, "frame_width": 7}
    card = Card("t", codebook_size=16, fps=1.0, num_actions=0, data_name="d", manifest_hash="m", **sizes)  # type: ignore[arg-type]
    shown = token_frames(real, predicted, 2, card, 5)
    assert shown.shape == (5, 2, 7, 3)
    at = [[tuple(frame[0, x].tolist()) for x in (0, 2, 4, 6)] for frame in shown]
    assert at[0] == [STILL] * 4
    assert at[1] == at[2] == [GIVEN_MOVED, STILL, STILL, STILL]
    assert at[3] == at[4] == [STILL, MOVED, MISSED, INVENTED]
