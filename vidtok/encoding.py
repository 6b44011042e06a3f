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
from vidtok.data.episodes import write_rejects
from vidtok.folders import copy_folder, load_model, model_folder
from vidtok.model import VidTokModel
from vidtok.options import EncodeOptions
from vidtok.tokens import TokenRow, TokenWriter
from vidtok.video import to_video

ROW_FRAMES = 1024
ROW_LATENT_STEPS = 16


@dataclass(frozen=True)
class Segment:
    """One row to be: frames [first, first + frames) of an episode."""

    episode: Episode
    first: int
    frames: int


def encode_dataset(options: EncodeOptions, data: Mapping[str, Any]) -> Path:
    """Encode a data source into options.output, or go on with the encoding that lies there; gives the folder.

    The tokenizer is copied beside the tokens, so that a model trained on them can be made self-contained. Raises ValueError.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={output} cannot be a folder, because it is a file: give another output folder")
    folder = model_folder(options.checkpoint, VidTokModel.config_class.model_type)
    tokenizer = load_model(VidTokModel, folder)
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    episodes = build_episodes(data)
    length, hop = clip_shape(tokenizer.config.stride_t, options)
    card = _card(tokenizer, episodes, length, hop)
    segments = list(cut_segments(episodes, tokenizer.config.stride_t, length, hop))
    with TokenWriter(output, card, options.rows_per_shard) as writer:
        write_rejects(output / "rejects.csv", episodes.rejects)
        copy_folder(folder, output / "tokenizer")
        if writer.rows_done:
            print(f"{output}: {writer.rows_done} of {len(segments)} rows are there already")
        with Progress(transient=True) as progress:
            task = progress.add_task("encoding", total=len(segments), completed=writer.rows_done)
            for segment in segments[writer.rows_done :]:
                writer.add(_row(tokenizer, segment, options.batch_frames))
                progress.advance(task)
        writer.finish()
    frames = sum(segment.frames for segment in segments)
    grid = f"{card.grid_height}x{card.grid_width}"
    print(
        f"{output}: {len(segments)} rows, {frames} frames, {grid} tokens a latent frame, {len(episodes.rejects)} files rejected"
        + (f", see {output / 'rejects.csv'}" if episodes.rejects else "")
    )
    return output


def clip_shape(stride_t: int, options: EncodeOptions) -> tuple[int, int]:
    """Give the frames of a row, and from one row's start to the next. Raises ValueError for what stride_t cannot encode."""
    length = options.clip_frames or (ROW_FRAMES if stride_t == 1 else 1 + ROW_LATENT_STEPS * stride_t)
    hop = options.clip_hop or length
    if length < 1 or hop < 1 or (length - 1) % stride_t:
        raise ValueError(
            f"clip_frames={length} and clip_hop={hop} do not fit stride_t={stride_t}: use 1 + k * {stride_t} frames, hop 1 or more"
        )
    return length, hop


def cut_segments(episodes: EpisodeSet, stride_t: int, length: int, hop: int) -> Iterator[Segment]:
    """Cut every episode into rows of 1 + k * stride_t frames; what is left at its end, too short for a step of time, is dropped."""
    for episode in episodes.episodes:
        for first in range(0, len(episode.frames), hop):
            frames = min(length, len(episode.frames) - first)
            frames = 1 + (frames - 1) // stride_t * stride_t
            # A row needs two latent frames: one alone has nothing to predict.
            if frames > stride_t and (first == 0 or frames > 1):
                yield Segment(episode, first, frames)


def _row(tokenizer: VidTokModel, segment: Segment, batch_frames: int) -> TokenRow:
    stride_t, episode = tokenizer.config.stride_t, segment.episode
    step = batch_frames if stride_t == 1 else segment.frames
    parts: list[Tensor] = []
    for at in range(segment.first, segment.first + segment.frames, step):
        end = min(at + step, segment.first + segment.frames)
        video = to_video(episode.frames[at:end])[None].to(tokenizer.device)
        parts.append(tokenizer.encode(video)[0].cpu())
    actions = (
        None if episode.actions is None else torch.as_tensor(episode.actions[segment.first : segment.first + segment.frames])
    )
    return TokenRow(
        source=episode.source,
        start=episode.start + segment.first / episode.fps,
        split=episode.split,
        frames=segment.frames,
        indices=torch.cat(parts),
        actions=actions if stride_t == 1 else None,
    )


def _card(tokenizer: VidTokModel, episodes: EpisodeSet, length: int, hop: int) -> Card:
    config = tokenizer.config
    height, width, stride = episodes.height, episodes.width, config.stride_s
    if height % stride or width % stride:
        raise ValueError(
            f"frames of {height}x{width} are no multiple of the tokenizer's stride_s={stride}: set data.size to a multiple"
        )
    return Card(
        tokenizer_fingerprint=tokenizer.fingerprint(),
        codebook_size=config.codebook_size,
        grid_height=height // stride,
        grid_width=width // stride,
        stride_t=config.stride_t,
        stride_s=stride,
        fps=episodes.fps,
        frame_height=height,
        frame_width=width,
        # An action belongs to one frame; where a token spans several there is no single one.
        num_actions=episodes.num_actions if config.stride_t == 1 else 0,
        data_name=episodes.name,
        manifest_hash=episodes.manifest_hash,
        clip_frames=length,
        clip_hop=hop,
    )
