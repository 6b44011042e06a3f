import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vidtok import metrics
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.options import ReconstructOptions
from vidtok.reconstruction import reconstruct_file
from vidtok.video import probe, to_frames, to_video

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)


def reconstruct(folder: Path, stride_t: int) -> dict[str, float]:
    """Reconstruct FRAMES with a tokenizer that is the same in every call."""
    torch.manual_seed(0)
    save_model(VidTokModel(VidTokConfig(stride_t=stride_t, width=8, encoder_blocks=1, decoder_blocks=1)), folder / "tok")
    np.save(folder / "noise.npy", FRAMES)
    return reconstruct_file(
        ReconstructOptions(checkpoint=str(folder / "tok"), input=str(folder / "noise.npy"), output=str(folder / "out"))
    )


@pytest.mark.parametrize("stride_t", [1, 4])
def test_the_figures_are_those_of_the_frames(stride_t: int, tmp_path) -> None:
    figures = reconstruct(tmp_path, stride_t)
    decoded = to_frames(VidTokModel.from_pretrained(tmp_path / "tok").eval().reconstruct(to_video(FRAMES)[None])[0])
    pairs = list(zip(FRAMES, decoded, strict=True))
    assert figures["frames"] == 9
    # Rounding to bytes shifts a figure a little: they are of the floats before it.
    assert figures["psnr_db_mean_of_frames"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(*pair) for pair in pairs]), abs=0.01
    )
    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert figures["ssim_mean_of_frames"] == pytest.approx(
        np.mean([structural_similarity(*pair, **options) for pair in pairs]), abs=1e-3
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == figures
    assert probe(tmp_path / "out" / "side_by_side.mp4").width == 48


@pytest.mark.parametrize("stride_t", [1, 4])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_few_frames_at_a_time_change_no_figure(frames: int, stride_t: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, encode, seen = reconstruct(tmp_path, stride_t), VidTokModel.encode_chunk, []
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", frames * 16 * 24)
    monkeypatch.setattr(
        VidTokModel, "encode_chunk", lambda model, video, state: seen.append(video.shape[2]) or encode(model, video, state)
    )
    assert reconstruct(tmp_path, stride_t) == pytest.approx(whole, abs=1e-5)
    assert max(seen) <= max(frames, stride_t) + stride_t - 1 and sum(seen) == 9


def test_frames_that_fit_no_stride_are_reconstructed_at_their_size(tmp_path) -> None:
    odd = FRAMES[:7, :13, :22]
    save_model(VidTokModel(VidTokConfig(stride_t=4, width=8, encoder_blocks=1, decoder_blocks=1)), tmp_path / "tok")
    np.save(tmp_path / "odd.npy", odd)
    options = {"checkpoint": str(tmp_path / "tok"), "input": str(tmp_path / "odd.npy"), "output": str(tmp_path / "out")}
    assert reconstruct_file(ReconstructOptions(**options))["frames"] == 7
    assert probe(tmp_path / "out" / "side_by_side.mp4").width == 44


def test_a_tokenizer_without_a_codebook_has_no_code_figures(tmp_path) -> None:
    config = VidTokConfig(stride_t=1, width=8, encoder_blocks=1, decoder_blocks=1, quantizer="kl")
    save_model(VidTokModel(config), tmp_path / "tok")
    np.save(tmp_path / "noise.npy", FRAMES)
    options = {"checkpoint": str(tmp_path / "tok"), "input": str(tmp_path / "noise.npy"), "output": str(tmp_path / "out")}
    assert set(reconstruct_file(ReconstructOptions(**options))) == {"psnr_db_mean_of_frames", "ssim_mean_of_frames", "frames"}
