"""Predictor: frames in, frames out. It joins tokenizer, transformer and a decoding plan; all state lives in one call."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Unpack, cast

import torch
from einops import repeat
from torch import Tensor

from vidgpt.checkpoint import check_fields, load_checkpoint
from vidgpt.config import VidGPTConfig
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import (
    LongOptions,
    RolloutKeys,
    check_future,
    check_guidance,
    stream_tokens,
    without_gradients,
)
from vidgpt.fused import FusedModel
from vidgpt.model import VidGPTForCausalLM
from vidtok.card import Card
from vidtok.folders import model_folder
from vidtok.run.processes import in_precision
from vidtok.tokenizer import Tokenizer, check_decoder, decode_stream, load_tokenizer
from vidtok.video import check_video


class Predictor:
    """A tokenizer and a transformer that belong together.

    dtype, use_compile: of the transformer's copy that decodes; see FusedModel.
    """

    def __init__(
        self,
        model: VidGPTForCausalLM,
        tokenizer: Tokenizer,
        card: Card,
        dtype: torch.dtype | None = None,
        use_compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.card = model.eval(), tokenizer, card
        self.layout = model.model.layout
        self.dtype, self.use_compile = dtype, use_compile
        self._fused: tuple[list[tuple[int, int]], FusedModel] | None = None

    @property
    def fused(self) -> FusedModel:
        """The transformer as decoding reads it: a copy, made anew when weights were changed or moved."""
        state = [(weight.data_ptr(), weight._version) for weight in self.model.parameters()]
        if self._fused is None or self._fused[0] != state:
            self._fused = state, FusedModel(self.model, self.dtype, self.use_compile)
        return self._fused[1]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        allow_torchscript: bool = False,
        decoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        use_compile: bool = False,
    ) -> "Predictor":
        """Load a run folder or model folder, onto CUDA when there is one.

        decoder: folder of a tokenizer with another decoder for the same tokens (train_only=decoder); None takes the model's own.
        allow_torchscript: may code of the folder be run, where its tokenizer is TorchScript? Nothing in the folder can say so.
        Raises ValueError when card, transformer and tokenizer of the folder do not belong together.
        """
        folder = model_folder(path, VidGPTConfig.model_type)
        model, card = load_checkpoint(folder)
        source = folder / "tokenizer" if decoder is None else Path(decoder)
        if decoder is None and not source.is_dir():
            raise ValueError(
                f"{folder} has no tokenizer/, so it can be evaluated on tokens but not decode frames: encode the tokens again with "
                "vidtok-encode, which puts the tokenizer beside them, and train on those"
            )
        own = load_tokenizer(source, allow_torchscript)
        if own.fingerprint() != card.tokenizer_fingerprint and own.encoder_fingerprint() != card.encoder_fingerprint:
            raise ValueError(
                f"{source} is tokenizer {own.fingerprint()}, but the transformer of {folder} was trained on tokens of "
                f"{card.tokenizer_fingerprint}: give that one, or one trained from it with train_only=decoder"
            )
        keys = ("codebook_size", "codebook_factors", "first_frames", "stride_t", "stride_s")
        check_fields(card, own, keys, f"{source} has", str(folder))
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(target), own.to(target), card, dtype, use_compile)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def history_frames(self) -> int:
        """Frames in front of a context to encode it with, 0 where the model knows the first frames of rows only.

        A context encoded without them says that the video begins there.
        """
        card = self.card
        is_cut = card.frames > card.rows * card.frames_of(self.model.config.window)
        return self.tokenizer.history_frames if is_cut else 0

    def check_window(
        self, context: int, future: int, decoding: DecodingOptions | None = None, long: LongOptions | None = None
    ) -> None:
        """Raise ValueError when a context and a future, in pixel frames, exceed what the model can do."""
        card, config = self.card, self.model.config
        given = card.frames_of(max(1, card.latent_frames_in(context)))
        window = card.frames_of(config.window)
        check_future(config, [given], future, decoding or DecodingOptions(), long or LongOptions(), window)

    def latent_frames(self, frames: int) -> int:
        """Give the latent frames that hold at least `frames` pixel frames of a future."""
        return -(-frames // self.card.stride_t)

    @torch.no_grad()
    def predict(
        self, video: Tensor | Sequence[Tensor], future: int, *, history: int = 0, **rollout: Unpack[RolloutKeys]
    ) -> Tensor:
        """Predict the next frames, greedily by default.

        video: (B, 3, T, H, W) in [-1, 1] at the card's frame size, T = history + first_frames + k * stride_t of the card, first_frames
        being 1 for our own tokenizers; or B clips (3, T, H, W) of different lengths. Gives (B * samples, 3, future, H, W) in [-1, 1],
        the samples of a clip one after the other.
        history: so many first frames, k * stride_t, are not context but the past it is encoded and shown with, as inside a longer
        video; history_frames of them are enough, where the video has them.
        rollout: seed, options, decoding, actions, samples and the other keywords of stream_tokens; actions are those of the latent
        frames of context and future.
        Raises ValueError, before any work, for another video, a context and future that exceed the window, an unknown plan, wrong
        actions, and a tokenizer without a decoder.
        """
        groups, rows = _groups(video, rollout.get("actions"))
        for group, own in zip(groups, rows, strict=True):
            self._check_request(group, future, history, own, rollout)
        encoded = [self.encode_after(group, history) for group in groups]
        context = [clip for _, clips in encoded for clip in clips]
        samples = rollout.get("samples", 1)
        stream = self.stream(context, self.latent_frames(future), **rollout)
        drawn = torch.stack(list(stream), dim=1).split([len(group) * samples for group in groups])
        given = [self.samples(torch.cat(parts, dim=1), samples) for parts in encoded]
        return torch.cat([self.show(before, after, future) for before, after in zip(given, drawn, strict=True)])

    def stream_frames(self, video: Tensor, future: int, *, history: int = 0, **rollout: Unpack[RolloutKeys]) -> Iterator[Tensor]:
        """Yield the frames that predict() gives, (B * samples, 3, n, H, W), as soon as they are known; memory does not grow with them.

        Closing the iterator ends the work. Tokenizers that decode whole clips alone yield all at the end. Raises ValueError as
        predict() does, when it is called.
        """
        self._check_request(video, future, history, cast("Tensor | None", rollout.get("actions")), rollout)

        def frames() -> Iterator[Tensor]:
            past, context = self.encode_after(video, history)
            latents = self.stream(context, self.latent_frames(future), **rollout)
            given = self.samples(torch.cat([past, context], dim=1), rollout.get("samples", 1))
            yield from self.show_stream(given, latents, future)

        return without_gradients(frames())

    def show_stream(self, given: Tensor, latents: Iterable[Tensor], future: int, context: int = 0) -> Iterator[Tensor]:
        """Yield the frames (B, 3, n, H, W) that show() gives, of indices `given` (B, t, h, w) and latent frames (B, h, w), as they come.

        context: so many of the frames that `given` stands for, the last ones, come first.
        """
        card = self.card
        before, left = card.frames_of(given.shape[1]) - context, context + future
        for part in decode_stream(self.tokenizer, chain([given], (frame[:, None] for frame in latents))):
            shown = part[:, :, before : before + left, : card.frame_height, : card.frame_width]
            before, left = max(0, before - part.shape[2]), left - shown.shape[2]
            if shown.shape[2]:
                yield shown

    def stream(self, context: Tensor | Sequence[Tensor], future: int, **rollout: Unpack[RolloutKeys]) -> Iterator[Tensor]:
        """Yield `future` latent frames (B * samples, h, w) after the indices `context`, each as it is ready; see stream_tokens."""
        return stream_tokens(self.fused, context, future, **rollout)

    def encode(self, video: Tensor) -> Tensor:
        """Give the indices (B, t, h, w) of clips (B, 3, T, H, W), computed in the precision of those that were trained on."""
        with in_precision(self.card.precision, self.device):
            return self.tokenizer.encode(video.to(self.device))

    def encode_after(self, video: Tensor, history: int) -> tuple[Tensor, Tensor]:
        """Give the indices of the first `history` frames, k * stride_t, of clips (B, 3, T, H, W), and those of the context behind."""
        past = history // self.card.stride_t
        indices = self.encode(video)
        return indices[:, :past], indices[:, past:]

    def show(self, given: Tensor, indices: Tensor, future: int) -> Tensor:
        """Give the frames (B, 3, future, H, W) that `indices` show after the indices `given`, both (B, t, h, w)."""
        begin = self.card.frames_of(given.shape[1])
        return self.decode(torch.cat([given, indices], dim=1))[:, :, begin : begin + future]

    def decode(self, indices: Tensor) -> Tensor:
        """Give the clips (B, 3, T, H, W) of indices (B, t, h, w), at the card's frame size."""
        card = self.card
        return self.tokenizer.decode(indices, (card.frames_of(indices.shape[1]), card.frame_height, card.frame_width))

    def samples(self, context: Tensor, samples: int) -> Tensor:
        """Repeat every clip `samples` times, clip-major."""
        return repeat(context, "b ... -> (b s) ...", s=samples)

    def _check_request(self, video: Tensor, future: int, history: int, actions: Tensor | None, rollout: RolloutKeys) -> None:
        """Raise ValueError for what would otherwise show only after the work is done, or not at all."""
        check_decoder(self.tokenizer)
        check_video(video)
        card = self.card
        if history not in range(0, video.shape[2], card.stride_t):
            raise ValueError(f"history={history} of {video.shape[2]} frames: give fewer, 0 or a multiple of {card.stride_t}")
        height, width = video.shape[3:]
        frames = video.shape[2] - history
        if (height, width) != (card.frame_height, card.frame_width):
            size = (card.frame_height, card.frame_width)
            raise ValueError(
                f"frames of {height}x{width} pixels came, this model was trained on {size[0]}x{size[1]}: resize them, for example with "
                f"read_video(path, size={size})"
            )
        whole = sorted({*self.tokenizer.valid_frames(frames)})
        if frames not in whole:
            raise ValueError(
                f"a context of {frames} frames ends inside a latent frame: use {' or '.join(map(str, whole))} frames"
            )
        plan = DecodingOptions.of(rollout.get("decoding", "raster"))
        self.check_window(frames, future, plan, rollout.get("long"))
        check_guidance(self.model.config, rollout.get("guidance", 1.0), plan)
        # Leads are made of actions, and refuse wrong ones.
        self.layout.leads(card.latent_frames_in(frames) + self.latent_frames(future), len(video), actions)


def _groups(
    video: Tensor | Sequence[Tensor], actions: Tensor | Sequence[Tensor] | None
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Give clips of one length each as a batch (B, 3, T, H, W) with its actions."""
    if isinstance(video, Tensor):
        assert actions is None or isinstance(actions, Tensor)
        return [video], [actions]
    if actions is not None and len(actions) != len(video):
        raise ValueError(f"actions of {len(actions)} clips came for {len(video)} clips: give one row of actions a clip")
    return [clip[None] for clip in video], [None] * len(video) if actions is None else [row[None] for row in actions]
