"""What every tokenizer of another project shares: padding, ranges, eval mode, its name and its folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vidtok.digits import check_indices
from vidtok.fingerprint import hash_weights
from vidtok.padding import grid_for, pad_clip, trim_clip, valid_frames
from vidtok.run.checkpoints import write_text
from vidtok.video import check_video

# Pixels that a picture network works on at a time: 256 channels of them are half a gigabyte.
PIXELS_AT_ONCE = 1 << 19
# What a config says about where it comes from, not about the network.
_ORIGIN_KEYS = {"transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}


@dataclass(frozen=True)
class Options:
    """Options of a network: all of them, for config.json, and those that differ from the defaults of its class.

    Only the latter go into its name: a newer library with one option more must not rename it.
    """

    values: Mapping[str, Any]
    telling: Mapping[str, Any]


class ForeignTokenizer(nn.Module):
    """A frozen tokenizer of another project, in fp32 also under autocast: its nearest codes are found by matrix products.

    A family gives the sizes, `_encode` and `_decode`, which get clips and ids whose sizes fit. has_decoder: False where
    the library has no way back to pixels, so decode raises ValueError.
    """

    first_frames = 1
    has_decoder = True

    def __init__(self, options: Options, stride_t: int, stride_s: int, codebook_size: int) -> None:
        super().__init__()
        self.values, self.telling = dict(options.values), dict(options.telling)
        self.stride_t, self.stride_s, self.codebook_size = stride_t, stride_s, codebook_size

    @property
    def codebook_factors(self) -> list[int]:
        """One codebook."""
        return [self.codebook_size]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def is_framewise(self) -> bool:
        """Whether each frame is coded by itself; without a word from the family it is not taken for granted."""
        return False

    @property
    def history_frames(self) -> int:
        """Frames in front of a clip that its ids depend on: how far a network looks is not known, so two steps of time."""
        return 0 if self.is_framewise else 2 * self.stride_t

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: batch norms must use the statistics they were trained with."""
        return super().train(False)

    def valid_frames(self, frames: int) -> tuple[int, int]:
        """Give the nearest frame counts that need no padding: at most, and at least, `frames`."""
        return valid_frames(frames, self.stride_t, self.first_frames)

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Give the latent grid (t, h, w) of a clip of any size."""
        return grid_for(frames, height, width, self.stride_t, self.stride_s, self.first_frames)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Give the ids (B, t, h, w), int64, of clips (B, 3, T, H, W) in [-1, 1] of any size; see VidTokModel.encode."""
        check_video(video)
        with self._in_fp32():
            return self._checked(self._encode(self._padded(video, whole=True).to(self.device)))

    @torch.no_grad()
    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        """Give the clips (B, 3, T, H, W) in [-1, 1], fp32, of ids (B, t, h, w). size: (T, H, W) that was encoded, cuts the padding off.

        Raises ValueError on ids outside the codebook, on what are no ids, and where the library has no decoder.
        """
        self.check_decoder()
        check_indices(indices)
        with self._in_fp32():
            video = self._decode(self._checked(indices.to(self.device).long()))
        return trim_clip(video.float().clamp(-1, 1), size)

    def check_decoder(self) -> None:
        """Raise ValueError where ids cannot be shown."""
        if not self.has_decoder:
            raise ValueError(
                f"a tokenizer of type {self.values.get('model_type')!r} has no decoder in transformers: its tokens can be trained on and "
                "evaluated, but not shown as frames; encode with tokenizer=emu3 or tokenizer=janus to see them"
            )

    def reconstruct(self, video: Tensor) -> Tensor:
        """Give decode(encode(video)), of the video's size."""
        return self.decode(self.encode(video), (video.shape[2], video.shape[3], video.shape[4]))

    def encoder_fingerprint(self) -> str:
        """Give the fingerprint: nobody here changes a part of another project's weights."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Give 16 hex digits of SHA-256 over the options that tell it from its class's defaults and every weight's name and fp32 bytes."""
        return hash_weights(self.telling, self.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: this tokenizer alone, whatever larger model it came from, for its own class too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name.removeprefix("network."): tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps(self.values, indent=2, sort_keys=True) + "\n")

    def _in_fp32(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _encode(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def _padded(self, video: Tensor, whole: bool) -> Tensor:
        """Pad the sides, and where `whole` the frames as well."""
        frames, height, width = video.shape[2:]
        _, h, w = self.grid_for(frames, height, width)
        return pad_clip(video, self.valid_frames(frames)[1] if whole else frames, h * self.stride_s, w * self.stride_s)

    def _checked(self, indices: Tensor) -> Tensor:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"id {low if low < 0 else high} lies outside the codebook of {self.codebook_size}: these ids belong to another tokenizer, "
                "or its codebook size is given wrongly"
            )
        return indices


class PictureTokenizer(ForeignTokenizer):
    """A tokenizer of single pictures: every frame by itself, so stride_t is 1. A family gives `_ids` and `_pictures`."""

    def __init__(self, options: Options, stride_s: int, codebook_size: int) -> None:
        super().__init__(options, 1, stride_s, codebook_size)

    @property
    def is_framewise(self) -> bool:
        """Whether each frame is coded by itself."""
        return True

    def _encode(self, video: Tensor) -> Tensor:
        pictures = rearrange(video, "B C T H W -> (B T) C H W")
        return rearrange(a_few_at_a_time(self._ids, pictures), "(B t) h w -> B t h w", B=len(video)).long()

    def _decode(self, indices: Tensor) -> Tensor:
        ids = rearrange(indices, "B t h w -> (B t) h w")
        pictures = a_few_at_a_time(self._pictures, ids, pixels=self.stride_s**2)
        return rearrange(pictures, "(B T) C H W -> B C T H W", B=len(indices))

    def _ids(self, pictures: Tensor) -> Tensor:
        """Give the ids (N, h, w) of pictures (N, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def _pictures(self, ids: Tensor) -> Tensor:
        """Give the pictures (N, 3, H, W) of ids (N, h, w)."""
        raise NotImplementedError


def options_of(config: PreTrainedConfig) -> Options:
    """Read what a config says about the network."""
    values = {key: value for key, value in config.to_dict().items() if not key.startswith("_") and key not in _ORIGIN_KEYS}
    usual = type(config)().to_dict()
    telling = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    return Options({**values, "model_type": config.model_type}, {**telling, "model_type": config.model_type})


def a_few_at_a_time(work: Callable[..., Tensor], *inputs: Tensor, pixels: int = 1) -> Tensor:
    """Give work(*inputs), inputs (N, ..., h, w), computed some N at a time, so that memory does not grow with a clip's length.

    pixels: how many pixels stand behind one place of the inputs.
    """
    size = inputs[0].shape[-1] * inputs[0].shape[-2] * pixels
    count = max(1, PIXELS_AT_ONCE // size)
    return torch.cat([work(*parts) for parts in zip(*(tensor.split(count) for tensor in inputs), strict=True)])
