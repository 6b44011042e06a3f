import json
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from tests.conftest import randomised
from vidtok import metrics, reconstruction
from vidtok.adapters import emu3
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.options import ReconstructOptions
from vidtok.reconstruction import reconstruct_file
from vidtok.tokenizer import Tokenizer
from vidtok.video import probe, read_frames, to_frames, to_video, write_video

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)


SMALL = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1}


def options(folder: Path, source: str = "noise.npy", output: str = "out", **keys: object) -> ReconstructOptions:
    paths = {"checkpoint": folder / "tok", "input": folder / source, "output": folder / output}
    return ReconstructOptions(**{name: str(path) for name, path in paths.items()}, **keys)  # type: ignore[arg-type]


def prepare(folder: Path, frames: np.ndarray = FRAMES, **config: object) -> VidTokModel:
    """Save a tokenizer, the same in every call, and frames to reconstruct."""
    torch.manual_seed(0)
    model = randomised(VidTokModel(VidTokConfig(**SMALL, **config)))
    save_model(model, folder / "tok")
    np.save(folder / "noise.npy", frames)
    return model


@pytest.mark.parametrize("stride_t", [1, 4])
def test_the_figures_are_those_of_the_frames(stride_t: int, tmp_path) -> None:
    model = prepare(tmp_path, stride_t=stride_t)
    figures = reconstruct_file(options(tmp_path))
    decoded = to_frames(model.reconstruct(to_video(FRAMES)[None])[0])
    pairs = list(zip(FRAMES, decoded, strict=True))
    assert figures["frames"] == 9
    # Rounding to bytes shifts a figure a little: they are of the floats before it.
    assert figures["psnr_db_mean_of_frames"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(*pair) for pair in pairs]), abs=0.01
    )
    ssim = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert figures["ssim_mean_of_frames"] == pytest.approx(
        np.mean([structural_similarity(*pair, **ssim) for pair in pairs]), abs=1e-3
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == figures
    both = read_frames(tmp_path / "out" / "side_by_side.mp4")
    assert both.shape == (9, 16, 48, 3)
    # A film stores colours at half resolution, so brightness is compared.
    shades = [film.mean(axis=3).ravel() for film in (both, np.concatenate([FRAMES, decoded], axis=2))]
    assert np.corrcoef(shades)[0, 1] > 0.8
    assert probe(tmp_path / "out" / "reconstruction.mp4").frames == 9


@pytest.mark.parametrize("config", [{"stride_t": 1}, {"stride_t": 4}, {"stride_t": 4, "quantizer": "kl"}], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_few_frames_at_a_time_change_no_figure(frames: int, config: dict, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, **config)
    whole, encode, seen = reconstruct_file(options(tmp_path)), reconstruction.encode_stream, []

    def watched(tokenizer: Tokenizer, pieces: Iterator[torch.Tensor], *cut: int | None) -> Iterator[torch.Tensor]:
        return encode(tokenizer, (seen.append(piece.shape[2]) or piece for piece in pieces), *cut)

    monkeypatch.setattr(reconstruction, "encode_stream", watched)
    assert reconstruct_file(options(tmp_path, chunk_frames=frames)) == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", frames * 16 * 24)
    assert reconstruct_file(options(tmp_path)) == pytest.approx(whole, abs=1e-5)
    parts = [*[frames] * (9 // frames), *[9 % frames] * (9 % frames > 0)]
    assert seen == parts * 2


def test_a_part_of_padding_alone_is_not_shown(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32}
    layers = {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [3]}
    save_model(Emu3VQVAE(Emu3VQVAEConfig(**sizes, **layers)), tmp_path / "emu3")
    np.save(tmp_path / "noise.npy", np.concatenate([FRAMES, FRAMES[:4]]))
    monkeypatch.setattr(emu3, "PIXELS_AT_ONCE", 16 * 24)
    chosen = {"tokenizer": {"name": "emu3", "path": str(tmp_path / "emu3")}, "output": str(tmp_path / "out")}
    assert reconstruct_file(ReconstructOptions(input=str(tmp_path / "noise.npy"), **chosen))["frames"] == 13
    assert probe(tmp_path / "out" / "reconstruction.mp4").frames == 13


def test_a_film_that_shows_no_frame_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.setattr(reconstruction, "iter_frames", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match=r"input=.*noise\.npy shows no frame: give a video with one or more"):
        reconstruct_file(options(tmp_path))


def test_a_failure_leaves_the_former_reconstruction(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    reconstruct_file(options(tmp_path, max_frames=5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {*reconstruction.FILES, "reconstruction.json"}

    def damaged(*_: object, **__: object) -> Iterator[np.ndarray]:
        yield from FRAMES[:4]
        raise ValueError("the film is damaged")

    monkeypatch.setattr(reconstruction, "iter_frames", damaged)
    with pytest.raises(ValueError, match="the film is damaged"):
        reconstruct_file(options(tmp_path, chunk_frames=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("quantizer", ["fsq", "kl"])
def test_frames_wait_for_their_reconstruction_and_no_longer(quantizer: str, tmp_path) -> None:
    model, most = prepare(tmp_path, stride_t=4, quantizer=quantizer), 0
    alive: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()

    def pieces() -> Iterator[np.ndarray]:
        for number in range(30):
            alive[number] = piece = FRAMES[:4].copy()
            yield piece

    asked = options(tmp_path, chunk_frames=4)
    for _ in reconstruction._reconstructed(model, pieces(), asked, reconstruction.Figures(model)):
        most = max(most, len(alive))
    assert most <= 3


def test_tiles_and_precision_are_those_of_the_tokenizer(tmp_path) -> None:
    prepare(tmp_path, stride_t=4, norm="layer")
    whole = reconstruct_file(options(tmp_path))
    assert reconstruct_file(options(tmp_path, tile=8)) == pytest.approx(whole, abs=1e-5)
    rough = reconstruct_file(options(tmp_path, precision="bf16"))
    assert rough != whole and rough["psnr_db_mean_of_frames"] == pytest.approx(whole["psnr_db_mean_of_frames"], abs=0.5)
    with pytest.raises(ValueError, match="precision=fp16 is not known: give auto, fp32 or bf16"):
        options(tmp_path, precision="fp16")


def test_frames_that_fit_no_stride_are_reconstructed_at_their_size(tmp_path) -> None:
    prepare(tmp_path, FRAMES[:7, :13, :22], stride_t=4)
    assert reconstruct_file(options(tmp_path))["frames"] == 7
    assert probe(tmp_path / "out" / "side_by_side.mp4").width == 44


def test_a_tokenizer_without_a_codebook_has_no_code_figures(tmp_path) -> None:
    prepare(tmp_path, stride_t=1, quantizer="kl")
    assert set(reconstruct_file(options(tmp_path))) == {"psnr_db_mean_of_frames", "ssim_mean_of_frames", "frames"}


@pytest.mark.parametrize("output", ["films", "films/../films"])
def test_the_input_is_not_written_over(output: str, tmp_path) -> None:
    prepare(tmp_path)
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / "reconstruction.mp4", FRAMES, 10)
    before = (tmp_path / "films" / "reconstruction.mp4").read_bytes()
    with pytest.raises(ValueError, match=r"^input=.* lies where output=.* is written: give another output folder"):
        reconstruct_file(options(tmp_path, "films/reconstruction.mp4", output))
    # Nor is what the command itself wrote, as an input of its own folder.
    reconstruct_file(options(tmp_path))
    with pytest.raises(ValueError, match="lies where output"):
        reconstruct_file(options(tmp_path, "out/side_by_side.mp4"))
    assert [path.name for path in (tmp_path / "films").iterdir()] == ["reconstruction.mp4"]
    assert (tmp_path / "films" / "reconstruction.mp4").read_bytes() == before


@pytest.mark.parametrize("name", [*reconstruction.FILES, "reconstruction.json"])
def test_only_what_the_command_wrote_is_written_over(name: str, tmp_path) -> None:
    prepare(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is there already, and no reconstruction of this folder wrote it"):
        reconstruct_file(options(tmp_path))
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(name, "mine")]
    (tmp_path / "out" / name).rename(tmp_path / "out" / "mine.txt")
    assert reconstruct_file(options(tmp_path, max_frames=5))["frames"] == 5
    assert reconstruct_file(options(tmp_path, max_frames=3))["frames"] == 3
    assert probe(tmp_path / "out" / "reconstruction.mp4").frames == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*reconstruction.FILES, "reconstruction.json", "mine.txt"}
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_frames_far_larger_than_those_of_training_are_named_where_they_are_known(tmp_path, capsys) -> None:
    prepare(tmp_path, np.zeros((2, 40, 24, 3), np.uint8), stride_t=1)
    run = tmp_path / "run"
    (tmp_path / "tok").rename(run.with_name("model"))
    run.mkdir()
    (tmp_path / "model").rename(run / "model")

    def said(checkpoint: Path, **keys: object) -> str:
        paths = {"input": str(tmp_path / "noise.npy"), "output": str(tmp_path / "out")}
        reconstruct_file(ReconstructOptions(checkpoint=str(checkpoint), **paths, **keys))  # type: ignore[arg-type]
        return capsys.readouterr().out

    assert "trained on" not in said(run)
    for text in ("data: [", "data: {size: large}", "data: {size: [1, 2, 3]}", "lr: 1"):
        (run / "config.yaml").write_text(text)
        assert "trained on" not in said(run)
    (run / "config.yaml").write_text("data: {size: [16, 24]}\n")
    note = "trained on frames of 16x24, these are 40x24: their quality may differ from training's, size=[16,24] gives what it knows\n"
    assert note in said(run) and note in said(run / "model")
    assert "trained on" not in said(run, size=[32, 24])
    (run / "config.yaml").write_text("data: {size: 8}\n")
    assert "trained on frames of 8x8, these are 40x24" in said(run)


def test_sizes_are_height_by_width(tmp_path, capsys) -> None:
    prepare(tmp_path, FRAMES[:2, :13, :22], stride_t=1)
    reconstruct_file(options(tmp_path))
    printed = capsys.readouterr().out
    assert "at most 257 frames of 13x22, size=[HEIGHT,WIDTH]" in printed and "so 13x22 is written as 14x22" in printed
    reconstruct_file(options(tmp_path, size=[12, 16]))
    assert "frames of 12x16, size=[HEIGHT,WIDTH] and max_frames=N make it faster, 13x22 scaled and cropped to 12x16" in (
        capsys.readouterr().out
    )
