"""What cutting costs: a clip coded in chunks or tiles against the same clip coded whole."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidtok.metrics import psnr_by_frame
from vidtok.temporal_metrics import GREY_LEVELS

Cut = Mapping[str, int | None]  # chunk_frames, or tile and overlap, for tokenizers whose methods take them


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
    dips: list[float] = field(default_factory=list)  # a number a batch
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
        self.dips.append(float((psnr_by_frame(whole, source) - psnr_by_frame(cut, source))[:, beside].mean()))
        wrong = [_step_error(video, source, borders) for video in (cut, whole)]
        self.steps.append(wrong[0] - wrong[1])

    def add_frames(self, cut: Tensor, whole: Tensor, source: Tensor) -> None:
        """Compare all frames."""
        self.frame_dips.append(float((psnr_by_frame(whole, source) - psnr_by_frame(cut, source)).mean()))

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

    Raises ValueError when chunk_frames was given and leaves no border.
    """
    latents = coder.tokenizer.grid_for(frames, coder.tokenizer.stride_s, coder.tokenizer.stride_s)[0]
    if chunk_frames is None:
        return latents // 2 or None
    steps = max(1, chunk_frames // coder.tokenizer.stride_t)
    if steps >= latents:
        raise ValueError(
            f"chunk_frames={chunk_frames} leaves no border in clips of {frames} frames: "
            "give less than the clip or a larger clip_frames"
        )
    return steps


def compare_chunks(coder: Coder, video: Tensor, steps: int, meter: SeamMeter) -> None:
    """Code clips in chunks of `steps` latent frames and whole, and add what differs.

    A tokenizer whose encode takes chunk_frames carries its state over; any other is given every chunk as a clip of its own.
    """
    stride_t, frames = coder.tokenizer.stride_t, video.shape[2]
    if not coder.can("chunk_frames"):
        _compare_windows(coder, video, steps, meter)
        return
    # Left to itself a tokenizer may cut a long clip: more frames than there are keep it whole.
    whole, cut = _compare(coder, video, {"chunk_frames": frames * stride_t}, {"chunk_frames": steps * stride_t}, meter)
    meter.add_borders(cut, whole, video, coder.border_frames(steps, frames), stride_t)


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
    """Raise ValueError when tiles were asked for and the tokenizer has none, or frames of this size fit into one."""
    if tile is not None and not coder.can("tile"):
        raise ValueError(f"tile={tile} was asked for, and this tokenizer does not work in tiles: leave tile=null")
    if tile is not None and tile >= max(height, width):
        raise ValueError(f"tile={tile} leaves no border in frames of {height}x{width}: give less, or larger frames by data.size")


def compare_tiles(coder: Coder, video: Tensor, tile: int, overlap: int | None, meter: SeamMeter) -> None:
    """Code clips in tiles and whole, and add what differs."""
    whole, cut = _compare(coder, video, {}, {"tile": tile, "overlap": overlap}, meter)
    meter.add_frames(cut, whole, video)


def _compare(coder: Coder, video: Tensor, uncut: Cut, cut: Cut, meter: SeamMeter) -> tuple[Tensor, Tensor]:
    """Code clips both ways, add the codes and what each decoder makes of the same ones; gives both reconstructions end to end."""
    codes, cut_codes = coder.encode(video, uncut), coder.encode(video, cut)
    whole, end_to_end = coder.decode(codes, video, uncut), coder.decode(cut_codes, video, cut)
    meter.add_codes(cut_codes, codes)
    meter.add_pixels(end_to_end if torch.equal(cut_codes, codes) else coder.decode(codes, video, cut), whole)
    return whole, end_to_end


def _step_error(video: Tensor, source: Tensor, borders: list[int]) -> float:
    """Give mean |d r - d s| in grey levels of 255 over the steps into the frames `borders`."""
    before = [at - 1 for at in borders]
    steps = (video[:, :, borders] - video[:, :, before]) - (source[:, :, borders] - source[:, :, before])
    return GREY_LEVELS * float(steps.abs().mean())
