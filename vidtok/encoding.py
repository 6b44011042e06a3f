"""Episodes to a token dataset, row by row, in an order that never changes, so that an interrupted run goes on where it stopped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from vidtok.card import Card
from vidtok.data import Episode, EpisodeSet, build_episodes
from vidtok.data.episodes import describe_short, write_rejects
from vidtok.data.options import how_to_lengthen
from vidtok.options import EncodeOptions
from vidtok.run.processes import in_precision, uses_bf16
from vidtok.tokenizer import Tokenizer, check_tiles, choose_tokenizer, encode_stream, encodes_in_pieces, save_tokenizer
from vidtok.tokens import TokenRow, TokenWriter
from vidtok.video import to_video

ROW_LATENT_FRAMES = 1024
# Of a tokenizer that must see a row's frames all at once.
ROW_LATENT_FRAMES_AT_ONCE = 17
FRAMES_READ_AT_ONCE = 64


@dataclass(frozen=True)
class Segment:
    """One row to be: frames [first, first + frames) of an episode."""

    episode: Episode
    first: int
    frames: int


def encode_dataset(options: EncodeOptions, data: Mapping[str, Any]) -> Path:
    """Encode a data source into options.output, or go on with the encoding that lies there; gives the folder.

    The tokenizer is written beside the tokens, so that a model trained on them can be made self-contained. Raises ValueError.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={output} cannot be a folder, because it is a file: give another output folder")
    tokenizer = choose_tokenizer(options.checkpoint, options.tokenizer)
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    check_tiles(tokenizer, options.tile)
    episodes = build_episodes(data)
    length, hop = clip_shape(tokenizer, options)
    card = _card(tokenizer, episodes, length, hop, "bf16" if uses_bf16(options.precision, tokenizer.device) else "fp32")
    segments = list(cut_segments(episodes, card))
    _say_short(episodes, card)
    with TokenWriter(output, card, options.rows_per_shard) as writer:
        write_rejects(output / "rejects.csv", episodes.rejects)
        if not (writer.card.complete and (output / "tokenizer").is_dir()):
            save_tokenizer(tokenizer, output / "tokenizer")
        if writer.rows_done:
            print(f"{output}: {writer.rows_done} of {len(segments)} rows are there already")
        with Progress(transient=True) as progress:
            task = progress.add_task("encoding", total=len(segments), completed=writer.rows_done)
            for segment in segments[writer.rows_done :]:
                writer.add(_row(tokenizer, segment, options))
                progress.advance(task)
        writer.finish()
    frames = sum(segment.frames for segment in segments)
    grid = f"{card.grid_height}x{card.grid_width}"
    print(
        f"{output}: {len(segments)} rows, {frames} frames, {grid} tokens a latent frame, {len(episodes.rejects)} files rejected"
        + (f", see {output / 'rejects.csv'}" if episodes.rejects else "")
    )
    return output


def clip_shape(tokenizer: Tokenizer, options: EncodeOptions) -> tuple[int, int]:
    """Give the frames of a row, and from one row's start to the next. Raises ValueError for what the tokenizer cannot encode."""
    latent_frames = ROW_LATENT_FRAMES if encodes_in_pieces(tokenizer) else ROW_LATENT_FRAMES_AT_ONCE
    length = options.clip_frames or tokenizer.first_frames + (latent_frames - 1) * tokenizer.stride_t
    whole = sorted({*tokenizer.valid_frames(length)})
    if length not in whole:
        raise ValueError(
            f"clip_frames={length} does not fit a tokenizer of stride_t={tokenizer.stride_t} whose first latent frame stands for "
            f"{tokenizer.first_frames}: use {' or '.join(map(str, whole))} frames"
        )
    return length, options.clip_hop or length


def cut_segments(episodes: EpisodeSet, card: Card) -> Iterator[Segment]:
    """Cut every episode into rows of two or more whole latent frames; what is left at its end, too short for them, is dropped."""
    for episode in episodes.episodes:
        for first in range(0, len(episode.frames), card.clip_hop):
            latent_frames = card.latent_frames_in(min(card.clip_frames, len(episode.frames) - first))
            # One latent frame alone has nothing to predict.
            if latent_frames > 1:
                yield Segment(episode, first, card.frames_of(latent_frames))


def _say_short(episodes: EpisodeSet, card: Card) -> None:
    """Print a line for each split with episodes that give no row."""
    needed = card.frames_of(2)
    for split, name in (("train", "training"), ("validation", "held-out")):
        chosen = episodes.split(split)
        left_out = describe_short(chosen, needed, f"{name} ")
        if left_out:
            are_ends = any(episode.start > 0 for episode in chosen if len(episode.frames) < needed)
            longer = how_to_lengthen(episodes.name, are_ends)
            print(f"{left_out}, because a row needs two latent frames of this tokenizer: give {longer}", flush=True)


def _row(tokenizer: Tokenizer, segment: Segment, options: EncodeOptions) -> TokenRow:
    episode, end = segment.episode, segment.first + segment.frames
    count = options.chunk_frames or FRAMES_READ_AT_ONCE

    def pieces() -> Iterator[Tensor]:
        for at in range(segment.first, end, count):
            yield to_video(episode.frames[at : min(at + count, end)])[None].to(tokenizer.device)

    with in_precision(options.precision, tokenizer.device):
        indices = torch.cat(list(encode_stream(tokenizer, pieces(), options.chunk_frames, options.tile)), dim=1)
    actions = None if episode.actions is None else torch.as_tensor(episode.actions[segment.first : end])
    return TokenRow(
        source=episode.source,
        start=episode.start + segment.first / episode.fps,
        split=episode.split,
        frames=segment.frames,
        indices=indices[0].cpu(),
        actions=actions if tokenizer.stride_t == 1 else None,
    )


def _card(tokenizer: Tokenizer, episodes: EpisodeSet, length: int, hop: int, precision: str) -> Card:
    if tokenizer.codebook_size < 1:
        raise ValueError("this tokenizer has continuous latents and no ids: give one with a codebook, such as quantizer=fsq")
    height, width, stride = episodes.height, episodes.width, tokenizer.stride_s
    _, h, w = tokenizer.grid_for(tokenizer.first_frames, height, width)
    if (h * stride, w * stride) != (height, width):
        print(
            f"frames of {height}x{width} are padded to {h * stride}x{w * stride}, which tokens of {stride}x{stride} pixels need"
        )
    return Card(
        tokenizer_fingerprint=tokenizer.fingerprint(),
        encoder_fingerprint=tokenizer.encoder_fingerprint(),
        codebook_size=tokenizer.codebook_size,
        codebook_factors=tokenizer.codebook_factors,
        grid_height=h,
        grid_width=w,
        first_frames=tokenizer.first_frames,
        stride_t=tokenizer.stride_t,
        stride_s=stride,
        fps=episodes.fps,
        frame_height=height,
        frame_width=width,
        is_stretched=episodes.is_stretched,
        # An action belongs to one frame; where a token spans several there is no single one.
        num_actions=episodes.num_actions if tokenizer.stride_t == 1 else 0,
        data_name=episodes.name,
        manifest_hash=episodes.manifest_hash,
        clip_frames=length,
        clip_hop=hop,
        precision=precision,
    )
