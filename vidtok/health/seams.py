"""What cutting costs: a clip coded in chunks or tiles against the same clip coded whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from vidtok.metrics import psnr_by_frame
from vidtok.padding import trim_clip
from vidtok.temporal_metrics import GREY_LEVELS
from vidtok.tokenizer import check_tiles, decode_stream, encode_stream, encodes_in_pieces

Cut = Mapping[str, int | None]  # chunk_frames, or tile and overlap, for tokenizers whose methods take them
Way = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # encode(video), decode(codes, video)


class Coder:
    """A tokenizer as the health report uses it: codes are ids, or latents where there is no codebook."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        quantizer = getattr(tokenizer, "quantizer", None)
        self.is_discrete = bool(getattr(quantizer, "is_discrete", True))
        self._encode = tokenizer.encode if self.is_discrete else tokenizer.encode_latents
        self._decode = tokenizer.decode if self.is_discrete else tokenizer.decode_latents

    def encode(self, video: Tensor, cut: Cut | None = None) -> Tensor:
        """Give ids (B, t, h, w) or latents (B, D, t, h, w)."""
        return self._encode(video, **(cut or {}))

    def decode(self, codes: Tensor, video: Tensor, cut: Cut | None = None) -> Tensor:
        """Give a reconstruction of video's shape, fp32 on video's device."""
        frames, height, width = video.shape[2:]
        return self._decode(codes, (frames, height, width), **(cut or {})).to(video.device, torch.float32)

    def can(self, name: str) -> bool:
        """Tell whether encode and decode take the keyword."""
        return all(name in inspect.signature(call).parameters for call in (self._encode, self._decode))

    @property
    def goes_on(self) -> bool:
        """Tell whether it can be given a clip in chunks, as a clip."""
        return self.can("chunk_frames") or encodes_in_pieces(self.tokenizer)

    def way(self, cut: Cut | None = None) -> Way:
        """Give encode and decode with a cut."""
        return partial(self.encode, cut=cut), partial(self.decode, cut=cut)

    def border_frames(self, steps: int, frames: int) -> list[int]:
        """Give the first pixel frame of every chunk but the first; steps: latent frames a chunk."""
        first = self.tokenizer.first_frames + (steps - 1) * self.tokenizer.stride_t
        return list(range(first, frames, steps * self.tokenizer.stride_t))


@dataclass
class SeamMeter:
    """Compare a cut coding with the whole one, over any number of clips.

    max_abs_pixel_difference: in [-1, 1]. Where the tokenizer cuts by itself both decode the same codes, so that an id which float
    rounding tips over counts as a changed id and does not hide what the decoder does. changed_ids: share; None where the cut grid is
    another one. psnr_dip_db: whole minus cut, end to end, mean over all frames; border_: over those beside borders (one before, one
    latent frame after).
    border_step: mean |d r - d s| over the pixels of the steps across borders, in grey levels of 255, cut minus whole; d is a step
    from a frame to the next, r the reconstruction, s the source.
    """

    prefix: str  # of the keys
    max_abs: float | None = None
    latent_max_abs: float | None = None
    ids: int = 0
    changed: int = 0
    dips: list[float] = field(default_factory=list)  # a number a clip
    steps: list[float] = field(default_factory=list)
    frame_dips: list[float] = field(default_factory=list)

    def add_pixels(self, cut: Tensor, whole: Tensor) -> None:
        """Compare two reconstructions."""
        self.max_abs = max(self.max_abs or 0.0, float((cut - whole).abs().max()))

    def add_codes(self, cut: Tensor, whole: Tensor) -> None:
        """Compare ids or latents; other shapes than the whole's cannot be compared."""
        if cut.shape != whole.shape:
            return
        if whole.is_floating_point():
            self.latent_max_abs = max(self.latent_max_abs or 0.0, float((cut - whole).abs().max()))
        else:
            self.ids += whole.numel()
            self.changed += int((cut != whole).sum())

    def add_borders(self, cut: Tensor, whole: Tensor, source: Tensor, borders: list[int], reach: int) -> None:
        """Compare frames beside borders; reach: frames after a border that count as beside it."""
        frames = source.shape[2]
        beside = sorted({frame for at in borders for frame in range(at - 1, min(at + reach, frames))})
        self.dips += (psnr_by_frame(whole, source) - psnr_by_frame(cut, source))[:, beside].mean(dim=1).tolist()
        self.steps += (_step_error(cut, source, borders) - _step_error(whole, source, borders)).tolist()

    def add_frames(self, cut: Tensor, whole: Tensor, source: Tensor) -> None:
        """Compare all frames."""
        self.frame_dips += (psnr_by_frame(whole, source) - psnr_by_frame(cut, source)).mean(dim=1).tolist()

    def figures(self) -> dict[str, float | None]:
        """Give what was measured; None where a comparison that belongs to the report was not possible."""
        named: dict[str, float | None] = {"max_abs_pixel_difference": self.max_abs}
        if self.latent_max_abs is None:
            named["changed_ids_fraction"] = self.changed / self.ids if self.ids else None
        else:
            named["max_abs_latent_difference"] = self.latent_max_abs
        averaged = {
            "border_psnr_dip_db": self.dips,
            "border_step_above_whole_grey_levels_of_255": self.steps,
            "psnr_dip_db": self.frame_dips,
        }
        named |= {name: sum(values) / len(values) for name, values in averaged.items() if values}
        return {f"{self.prefix}_{name}": value for name, value in named.items()}


def chunk_steps(coder: Coder, frames: int, chunk_frames: int | None) -> int | None:
    """Give the latent frames of a chunk: half the clip where chunk_frames is None; None where a clip has no border.

    At least two where every chunk is a clip of its own: one alone would be a picture. Raises ValueError when chunk_frames was given
    and leaves no border.
    """
    tokenizer = coder.tokenizer
    latents = tokenizer.grid_for(frames, tokenizer.stride_s, tokenizer.stride_s)[0]
    steps = max(1 if coder.goes_on else 2, latents // 2 if chunk_frames is None else chunk_frames // tokenizer.stride_t)
    if steps < latents:
        return steps
    if chunk_frames is None:
        return None
    raise ValueError(
        f"chunk_frames={chunk_frames} leaves no border in clips of {frames} frames: give less than the clip or a larger clip_frames"
    )


def compare_chunks(coder: Coder, video: Tensor, steps: int, meter: SeamMeter) -> None:
    """Code clips in chunks of `steps` latent frames and whole, and add what differs.

    The commands cut a clip as its tokenizer can; where it cannot, they cut a film into clips, and so does this.
    """
    tokenizer, frames = coder.tokenizer, video.shape[2]
    if not coder.goes_on:
        _compare_windows(coder, video, steps, meter)
        return
    borders = coder.border_frames(steps, frames)
    if coder.can("chunk_frames"):
        # Left to itself a tokenizer may cut a long clip: more frames than there are keep it whole.
        uncut, cut_up = (coder.way({"chunk_frames": count * tokenizer.stride_t}) for count in (frames, steps))
    else:
        uncut, cut_up = coder.way(), _pieces(coder, borders, steps)
    whole, cut = _compare(video, uncut, cut_up, meter)
    meter.add_borders(cut, whole, video, borders, tokenizer.stride_t)


def _pieces(coder: Coder, borders: list[int], steps: int) -> Way:
    """Give the way of the commands: a clip that comes piece by piece."""

    def encode(video: Tensor) -> Tensor:
        return torch.cat(list(encode_stream(coder.tokenizer, video.tensor_split(borders, dim=2))), dim=1)

    def decode(codes: Tensor, video: Tensor) -> Tensor:
        decoded = torch.cat(list(decode_stream(coder.tokenizer, codes.split(steps, dim=1))), dim=2)
        return trim_clip(decoded, (video.shape[2], video.shape[3], video.shape[4])).to(video)

    return encode, decode


def _compare_windows(coder: Coder, video: Tensor, steps: int, meter: SeamMeter) -> None:
    window = coder.border_frames(steps, video.shape[2])[0]
    codes = coder.encode(video)
    whole = coder.decode(codes, video)
    parts = [(coder.encode(part), part) for part in video.split(window, dim=2)]
    cut = torch.cat([coder.decode(ids, part) for ids, part in parts], dim=2)
    meter.add_codes(torch.cat([ids for ids, _ in parts], dim=-3), codes)
    meter.add_pixels(cut, whole)
    borders = list(range(window, video.shape[2], window))
    meter.add_borders(cut, whole, video, borders, coder.tokenizer.stride_t)


def check_tile(coder: Coder, tile: int | None, height: int, width: int) -> None:
    """Raise ValueError as check_tiles does, and when frames of this size fit into one tile."""
    check_tiles(coder.tokenizer, tile)
    if tile is not None and tile >= max(height, width):
        raise ValueError(f"tile={tile} leaves no border in frames of {height}x{width}: give less, or larger frames by data.size")


def compare_tiles(coder: Coder, video: Tensor, tile: int, overlap: int | None, meter: SeamMeter) -> None:
    """Code clips in tiles and whole, and add what differs."""
    whole, cut = _compare(video, coder.way(), coder.way({"tile": tile, "overlap": overlap}), meter)
    meter.add_frames(cut, whole, video)


def _compare(video: Tensor, uncut: Way, cut: Way, meter: SeamMeter) -> tuple[Tensor, Tensor]:
    """Code clips both ways, add the codes and what each decoder makes of the same ones; gives both reconstructions end to end."""
    codes, cut_codes = uncut[0](video), cut[0](video)
    whole, end_to_end = uncut[1](codes, video), cut[1](cut_codes, video)
    meter.add_codes(cut_codes, codes)
    meter.add_pixels(end_to_end if torch.equal(cut_codes, codes) else cut[1](codes, video), whole)
    return whole, end_to_end


def _step_error(video: Tensor, source: Tensor, borders: list[int]) -> Tensor:
    """Give mean |d r - d s| (B,) in grey levels of 255 over the steps into the frames `borders`."""
    before = [at - 1 for at in borders]
    steps = (video[:, :, borders] - video[:, :, before]) - (source[:, :, borders] - source[:, :, before])
    return GREY_LEVELS * reduce(steps.abs(), "B C T H W -> B", "mean")
