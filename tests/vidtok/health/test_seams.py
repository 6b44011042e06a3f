"""Cutting a clip costs our tokenizer nothing, and what starts anew at a border is caught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from tests.conftest import randomised
from vidtok.config import VidTokConfig
from vidtok.digits import join_digits, split_digits
from vidtok.health.seams import Coder, SeamMeter, check_tile, chunk_steps, compare_chunks, compare_tiles
from vidtok.model import VidTokModel
from vidtok.padding import grid_for, valid_frames

LEVELS = [256, 256, 256]


class Pixels:
    """A tokenizer that loses nothing: the id of a place is the colour of its pixel."""

    first_frames = stride_t = stride_s = 1
    codebook_factors = LEVELS
    is_framewise = True

    def encode(self, video: Tensor) -> Tensor:
        return join_digits(((video + 1) * 127.5).round().long().movedim(1, -1), LEVELS)

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        return split_digits(indices, LEVELS).movedim(-1, 1) / 127.5 - 1

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_for(frames, height, width, 1, 1)

    def valid_frames(self, frames: int) -> tuple[int, int]:
        return valid_frames(frames, 1)


class Restarting(Pixels):
    """The first frame of whatever it decodes is 10 levels too bright."""

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        video = super().decode(indices).clone()
        video[:, :, 0] += 10 / 127.5
        return video


class Forgetful(Pixels):
    """It says that it can go on from chunk to chunk, and the first id of every chunk is another."""

    def encode(self, video: Tensor, chunk_frames: int | None = None) -> Tensor:  # type: ignore[override]
        indices = super().encode(video)
        indices[:, :: chunk_frames or len(indices[0])] ^= 1
        return indices

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None, chunk_frames: int | None = None) -> Tensor:  # type: ignore[override]
        return super().decode(indices)


def clips(frames: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(40, 200, (2, 3, frames, height, width), generator=generator) / 127.5 - 1


def chunk_figures(tokenizer: object, video: Tensor, chunk_frames: int | None = None) -> dict[str, float | None]:
    coder, meter = Coder(tokenizer), SeamMeter("chunk")
    steps = chunk_steps(coder, video.shape[2], chunk_frames)
    assert steps is not None
    compare_chunks(coder, video, steps, meter)
    return meter.figures()


def model(quantizer: str = "fsq", **options: object) -> VidTokModel:
    torch.manual_seed(0)
    return randomised(VidTokModel(VidTokConfig(quantizer=quantizer, width=8, encoder_blocks=1, decoder_blocks=1, **options)))


def test_cutting_what_loses_nothing_costs_nothing() -> None:
    figures = chunk_figures(Pixels(), clips(9))
    assert figures["chunk_max_abs_pixel_difference"] == figures["chunk_changed_ids_fraction"] == 0
    assert figures["chunk_border_psnr_dip_db"] == figures["chunk_border_step_above_whole_grey_levels_of_255"] == 0


@pytest.mark.parametrize("stride_t", [1, 4])
def test_our_tokenizer_has_no_seam_between_chunks(stride_t: int) -> None:
    figures = chunk_figures(model(stride_t=stride_t), clips(17))
    assert figures["chunk_max_abs_pixel_difference"] == pytest.approx(0, abs=1e-4)
    assert figures["chunk_changed_ids_fraction"] == 0
    assert figures["chunk_border_psnr_dip_db"] == pytest.approx(0, abs=1e-3)


def test_continuous_latents_are_compared_as_numbers() -> None:
    figures = chunk_figures(model("kl", stride_t=4), clips(9))
    assert figures["chunk_max_abs_latent_difference"] == pytest.approx(0, abs=1e-5)
    assert figures["chunk_max_abs_pixel_difference"] == pytest.approx(0, abs=1e-4)
    assert "chunk_changed_ids_fraction" not in figures


def test_a_tokenizer_that_starts_anew_is_caught_at_the_borders() -> None:
    figures = chunk_figures(Restarting(), clips(9), chunk_frames=3)
    assert figures["chunk_max_abs_pixel_difference"] == pytest.approx(10 / 127.5, abs=1e-6)
    # Beside the borders at 3 and 6 are frames 2, 3, 5 and 6; half of them fall from the cap of 100 dB to 28.1.
    assert figures["chunk_border_psnr_dip_db"] == pytest.approx(0.5 * (100 - 28.13), abs=0.01)
    assert figures["chunk_border_step_above_whole_grey_levels_of_255"] == pytest.approx(10, abs=1e-3)
    assert figures["chunk_changed_ids_fraction"] == 0


def test_ids_that_depend_on_the_cut_are_counted_and_do_not_pass_for_a_decoder_seam() -> None:
    figures = chunk_figures(Forgetful(), clips(8), chunk_frames=4)
    assert figures["chunk_changed_ids_fraction"] == pytest.approx(1 / 8)
    assert figures["chunk_max_abs_pixel_difference"] == 0
    assert figures["chunk_border_psnr_dip_db"] > 10


class Whole:
    """Our tokenizer as one that knows whole clips only."""

    is_framewise = False

    def __init__(self, tokenizer: VidTokModel) -> None:
        self.first_frames, self.stride_t, self.stride_s = 1, tokenizer.stride_t, tokenizer.stride_s
        self.encode = lambda video: tokenizer.encode(video)
        self.decode = lambda indices, size=None: tokenizer.decode(indices, size)
        self.grid_for, self.valid_frames = tokenizer.grid_for, tokenizer.valid_frames


def test_what_knows_whole_clips_only_is_compared_in_clips_of_at_least_two_latent_frames() -> None:
    figures = chunk_figures(Whole(model(stride_t=4)), clips(17))
    # 9 and then 8 frames are 3 + 3 latent frames, where 17 are 5.
    assert figures["chunk_changed_ids_fraction"] is None
    assert figures["chunk_max_abs_pixel_difference"] > 1e-3
    coder = Coder(Whole(model(stride_t=4)))
    assert chunk_steps(coder, 9, None) == chunk_steps(coder, 9, 4) == 2
    assert chunk_steps(coder, 5, None) is None
    assert chunk_steps(Coder(model(stride_t=4)), 5, None) == 1


class Streaming(Whole):
    """Our tokenizer as another project's that encodes piece by piece and says nothing of chunk_frames."""

    def __init__(self, tokenizer: VidTokModel) -> None:
        super().__init__(tokenizer)
        self.seen: list[int] = []
        self.tokenizer = tokenizer

    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        yield from self.tokenizer.stream_encode(self.seen.append(chunk.shape[2]) or chunk for chunk in chunks)


def test_what_encodes_in_pieces_is_given_pieces_of_one_clip() -> None:
    tokenizer = Streaming(model(stride_t=4))
    figures = chunk_figures(tokenizer, clips(17))
    assert tokenizer.seen == [5, 8, 4]
    assert figures["chunk_changed_ids_fraction"] == 0
    assert figures["chunk_max_abs_pixel_difference"] == pytest.approx(0, abs=1e-4)
    assert figures["chunk_border_psnr_dip_db"] == pytest.approx(0, abs=1e-3)


def test_every_clip_weighs_the_same_whatever_its_batch() -> None:
    coder, video = Coder(Restarting()), torch.cat([clips(9), clips(9).flip(0)[:1] * 0.5])
    together, apart = SeamMeter("chunk"), SeamMeter("chunk")
    compare_chunks(coder, video, 3, together)
    for part in video.split(2):
        compare_chunks(coder, part, 3, apart)
    assert apart.figures() == pytest.approx(together.figures(), abs=1e-5)


def test_chunks_lie_in_the_middle_where_nothing_is_said() -> None:
    coder = Coder(model(stride_t=4))
    assert chunk_steps(coder, 17, None) == 2
    assert coder.border_frames(2, 17) == [5, 13]
    assert chunk_steps(coder, 1, None) is None
    with pytest.raises(ValueError, match="chunk_frames=20 leaves no border in clips of 17 frames"):
        chunk_steps(coder, 17, 20)


def test_tiles_that_overlap_as_far_as_layers_look_leave_no_seam_and_bare_ones_do() -> None:
    coder, video = Coder(model(stride_t=1)), clips(2, 32, 32)
    exact, bare = SeamMeter("tile"), SeamMeter("tile")
    compare_tiles(coder, video, 16, None, exact)
    compare_tiles(coder, video, 16, 0, bare)
    assert exact.figures()["tile_max_abs_pixel_difference"] == pytest.approx(0, abs=1e-4)
    assert exact.figures()["tile_changed_ids_fraction"] == 0
    assert bare.figures()["tile_max_abs_pixel_difference"] > 1e-3
    assert exact.figures()["tile_psnr_dip_db"] == pytest.approx(0, abs=1e-3)


def test_tiles_that_cannot_be_tested_are_refused() -> None:
    with pytest.raises(ValueError, match="does not work in tiles"):
        check_tile(Coder(Pixels()), 16, 64, 64)
    with pytest.raises(ValueError, match="tile=64 leaves no border in frames of 64x64"):
        check_tile(Coder(model()), 64, 64, 64)
    check_tile(Coder(Pixels()), None, 64, 64)
