from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import randomised
from vidtok.config import VidTokConfig
from vidtok.model import VidTokModel
from vidtok.padding import grid_for, pad_clip, trim_clip, valid_frames
from vidtok.schema import config_dir
from vidtok.tiling import run_tiled


def tiny(**options: object) -> VidTokModel:
    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(**({"width": 8, "encoder_blocks": 1, "decoder_blocks": 1} | options)))
    return randomised(model)


@pytest.mark.parametrize(
    ("frames", "stride_t", "first", "expected"),
    [(1, 4, 1, (1, 1)), (17, 4, 1, (17, 17)), (18, 4, 1, (17, 21)), (3, 1, 1, (3, 3)), (3, 4, 4, (4, 4)), (9, 4, 4, (8, 12))],
)
def test_valid_frames_are_the_nearest_whole_ones(frames: int, stride_t: int, first: int, expected: tuple[int, int]) -> None:
    assert valid_frames(frames, stride_t, first) == expected


def test_the_grid_covers_a_clip_of_any_size() -> None:
    assert grid_for(18, 33, 64, stride_t=4, stride_s=8) == (6, 5, 8)
    assert grid_for(9, 16, 16, stride_t=4, stride_s=8, first_frames=4) == (3, 2, 2)
    with pytest.raises(ValueError, match="1 or more"):
        grid_for(0, 8, 8, 1, 8)
    with pytest.raises(ValueError, match="0x8"):
        grid_for(1, 0, 8, 1, 8)


def test_padding_repeats_the_last_frame_row_and_column() -> None:
    video = torch.rand(1, 3, 2, 3, 4)
    padded = pad_clip(video, 4, 5, 6)
    assert padded.shape == (1, 3, 4, 5, 6)
    assert torch.equal(trim_clip(padded, (2, 3, 4)), video)
    assert torch.equal(padded[:, :, 3], padded[:, :, 1])
    assert torch.equal(padded[..., 4, :], padded[..., 2, :]) and torch.equal(padded[..., 5], padded[..., 3])
    with pytest.raises(ValueError, match="larger size"):
        pad_clip(video, 1, 5, 6)
    with pytest.raises(ValueError, match="cannot be cut"):
        trim_clip(video, (3, 3, 4))


@pytest.mark.parametrize(("stride_t", "shape"), [(1, (3, 17, 30)), (2, (4, 20, 9)), (4, (6, 31, 16)), (4, (2, 8, 8))])
def test_a_clip_of_any_size_comes_back_in_its_size(stride_t: int, shape: tuple[int, int, int]) -> None:
    model = tiny(stride_t=stride_t)
    video = torch.rand(2, 3, *shape) * 2 - 1
    indices = model.encode(video)
    assert tuple(indices.shape[1:]) == model.grid_for(*shape)
    assert model.reconstruct(video).shape == video.shape
    padded = model.decode(indices)
    torch.testing.assert_close(padded[:, :, : shape[0], : shape[1], : shape[2]], model.reconstruct(video))


@pytest.mark.parametrize("stride_t", [2, 4])
def test_tokens_of_a_growing_video_do_not_change(stride_t: int) -> None:
    model, video = tiny(stride_t=stride_t), torch.rand(1, 3, 14, 16, 16) * 2 - 1
    whole = model.encode(video)
    for frames in range(1, 14):
        full = 1 + (frames - 1) // stride_t
        assert torch.equal(model.encode(video[:, :, :frames])[:, :full], whole[:, :full])


@pytest.mark.parametrize(
    "options", [{"stride_t": 1}, {"stride_t": 4, "encoder_kernel": 1}, {"patch_s": 8}, {"patching": "haar"}], ids=str
)
def test_tiles_with_the_default_overlap_are_exact(options: dict) -> None:
    model, video = tiny(**options), torch.rand(1, 3, 5, 96, 136) * 2 - 1
    torch.testing.assert_close(model.encode_latents(video, tile=24), model.encode_latents(video), atol=1e-5, rtol=0)
    indices = model.encode(video)
    torch.testing.assert_close(model.decode(indices, tile=32), model.decode(indices), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", sorted(Path(config_dir()).glob("tokenizer/*.yaml")), ids=lambda path: path.stem)
def test_tiles_and_chunks_of_every_preset_give_what_the_whole_gives(path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict) and values.pop("defaults")
    # One block a level: a deeper one's default overlap would take in the whole of so small a frame.
    model = tiny(**values | {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "vq_kmeans_init": False}).double()
    video = torch.rand(1, 3, 10, 90, 182, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_latents(video, chunk_frames=100)
    whole = model.decode_latents(latents, (10, 90, 182), chunk_frames=100)
    for cut in ({"tile": 16}, {"chunk_frames": 1}, {"tile": 24, "chunk_frames": 5}):
        torch.testing.assert_close(model.encode_latents(video, **cut), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode_latents(latents, (10, 90, 182), **cut), whole, atol=1e-5, rtol=0)
    seam = model.decode_latents(latents, (10, 90, 182), tile=16, overlap=0) - whole
    assert float(seam.abs().max()) > 1e-3


def test_a_smaller_overlap_leaves_a_seam_that_shrinks_with_it() -> None:
    model, video = tiny(stride_t=1), torch.rand(1, 3, 2, 128, 128) * 2 - 1
    indices = model.encode(video)
    whole = model.decode(indices)
    errors = [float((model.decode(indices, tile=32, overlap=overlap) - whole).abs().mean()) for overlap in (0, 16, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_blending_weights_sum_to_one() -> None:
    source = torch.rand(1, 2, 3, 7, 11)
    for tile, overlap, ramp in ((2, 1, 1), (3, 2, 1), (20, 5, 2), (1, 0, 0)):
        torch.testing.assert_close(run_tiled(lambda part: part, source, (7, 11), (1, 1), tile, overlap, ramp), source)


@pytest.mark.parametrize("tile", [8, 16, 32])
@pytest.mark.parametrize("overlap", [8, 16, 40, 64])
def test_tiles_of_any_overlap_share_every_place_fully(tile: int, overlap: int) -> None:
    model = tiny(stride_t=1, decoder_blocks=3)
    for _, parameter in model.decoder.named_parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.decoder.conv_out.bias, 0.5)
    indices = torch.zeros(1, 2, 9, 7, dtype=torch.long)
    torch.testing.assert_close(model.decode(indices, tile=tile, overlap=overlap), torch.full((1, 3, 2, 72, 56), 0.5))


def test_an_impossible_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="tile=4"):
        tiny().encode(torch.zeros(1, 3, 1, 32, 32), tile=4)
