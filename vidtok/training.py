"""Training of the tokenizer: one visible loop."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset

from vidtok.config import VidTokConfig
from vidtok.data import ClipDataset, EpisodeSet, build_episodes
from vidtok.data.episodes import write_rejects
from vidtok.folders import save_model
from vidtok.losses import reconstruction_loss
from vidtok.metrics import CodeMeter, FrameMeter, psnr_by_frame
from vidtok.model import VidTokModel
from vidtok.options import TrainTokenizerOptions
from vidtok.runner import Runner, build_optimizer
from vidtok.video import to_frames, write_png


class GappedClips(Dataset[Tensor]):
    """Clips (C, T, H, W) whose frames are `gap` source frames apart."""

    def __init__(self, episodes: EpisodeSet, split: str, frames: int, gap: int) -> None:
        if gap < 1:
            raise ValueError(f"frame_gap={gap}: give 1 or more")
        self.clips = ClipDataset(episodes.split(split), 1 + (frames - 1) * gap)
        self.gap = gap

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        return self.clips[index]["video"][:, :: self.gap]


def train_tokenizer(
    options: TrainTokenizerOptions, data: Mapping[str, Any], tokenizer: Mapping[str, Any], config: Mapping[str, Any]
) -> Path:
    """Train a tokenizer into options.run_dir, or continue the run that lies there; gives the run folder.

    data, tokenizer: values of the groups; config: all of it, kept as config.yaml.
    """
    model_config = VidTokConfig(**tokenizer)
    _check_clip(options, model_config)
    with Runner(options, config, name="vidtok-train", best="validation_loss") as runner:
        episodes = build_episodes(data)
        runner.check_data("data", episodes.manifest_hash)
        _check_frame(episodes, model_config)
        write_rejects(runner.path / "rejects.csv", episodes.rejects)
        clips = GappedClips(episodes, "train", options.clip_frames, options.frame_gap)
        held_out = _held_out(runner, episodes, options)
        unquantized_steps = _unquantized_steps(runner, options)
        model: nn.Module = VidTokModel(model_config).to(memory_format=torch.channels_last)
        model, optimizer = runner.prepare(model, build_optimizer(model, options))
        if not runner.is_finished:
            _report(runner, model, optimizer, episodes, clips, model_config, options)

        def compute_loss(network: nn.Module, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # A run planned by minutes may be short too; its plan is kept, so a resumed run draws the same line.
            unquantized = min(unquantized_steps, (runner.planned_steps or 5 * unquantized_steps) // 5)
            output = network(video, is_quantized=runner.step >= unquantized)
            reconstruction = reconstruction_loss(output.reconstruction, video, options.loss)
            return reconstruction + output.quantizer_loss, {
                "reconstruction_loss": reconstruction,
                "quantizer_loss": output.quantizer_loss,
            }

        def evaluate() -> dict[str, float]:
            return evaluate_tokenizer(runner, runner.unwrap(model), held_out, options) if held_out is not None else {}

        for step, batches in runner.steps(clips):
            logs = runner.update(model, optimizer, batches, compute_loss)
            runner.after_step(
                step, logs, evaluate if held_out is not None else None, lambda folder: save_model(runner.unwrap(model), folder)
            )
    return Path(options.run_dir)


@torch.no_grad()
def evaluate_tokenizer(
    runner: Runner, model: nn.Module, clips: Dataset[Tensor], options: TrainTokenizerOptions
) -> dict[str, float]:
    """Give loss, PSNR and codebook health over held-out clips, and write real over reconstructed frames into samples/.

    The loss is infinite while the codebook is still empty, so that such a model is never the best one.
    """
    assert isinstance(model, VidTokModel)
    if not model.quantizer.is_filled:
        return {"validation_loss": math.inf}
    losses, codes, frames = [], CodeMeter(model.config.codebook_size), FrameMeter()
    picture: np.ndarray | None = None
    for video in runner.evaluation_batches(clips, options.evaluation_clips):
        indices = model.encode(video)
        codes.update(indices.cpu())
        reconstruction = model.decode(indices)
        losses.append(float(reconstruction_loss(reconstruction, video, options.loss)))
        frames.update(psnr_by_frame(reconstruction, video).cpu())
        if picture is None:
            picture = _picture(video[0], reconstruction[0])
    if picture is not None:
        write_png(runner.path / "samples" / f"step_{runner.step:06d}.png", picture)
    return {"validation_loss": float(np.mean(losses)), "validation_psnr_db": frames.mean(), **codes.summary()}


def _held_out(runner: Runner, episodes: EpisodeSet, options: TrainTokenizerOptions) -> GappedClips | None:
    needed = 1 + (options.clip_frames - 1) * options.frame_gap
    longest = max((len(episode.frames) for episode in episodes.split("validation")), default=0)
    if longest < needed:
        runner.say(
            f"no held-out clips: a clip needs {needed} frames and the longest held-out episode has {longest}, so the last model is kept, "
            "not the best; lower clip_frames or raise data.validation"
        )
        return None
    return GappedClips(episodes, "validation", options.clip_frames, options.frame_gap)


def _unquantized_steps(runner: Runner, options: TrainTokenizerOptions) -> int:
    """Leave a short run at least four fifths of its steps to train the quantizer."""
    wanted, steps = options.unquantized_steps, options.max_steps
    limit = wanted if steps is None else min(wanted, steps // 5)
    # A run continued for longer must not fall back to unquantised latents: its first limit stays.
    limit = min(limit, runner.first_value("unquantized_steps", limit))
    if limit < wanted and not runner.is_finished:
        runner.say(f"unquantized_steps={wanted} is cut to {limit}, a fifth of max_steps, so that the quantizer is trained too")
    return limit


def _picture(video: Tensor, reconstruction: Tensor) -> np.ndarray:
    rows = torch.stack([video[:, :8], reconstruction[:, :8]])
    return to_frames(rearrange(rows, "r c t h w -> c 1 (r h) (t w)").cpu())[0]


def _check_clip(options: TrainTokenizerOptions, config: VidTokConfig) -> None:
    if options.clip_frames < 1 or (options.clip_frames - 1) % config.stride_t:
        near = 1 + max(1, round((options.clip_frames - 1) / config.stride_t)) * config.stride_t
        raise ValueError(
            f"clip_frames={options.clip_frames} does not fit stride_t={config.stride_t} (1 + k * {config.stride_t}): use {near}"
        )


def _check_frame(episodes: EpisodeSet, config: VidTokConfig) -> None:
    height, width, stride = episodes.height, episodes.width, config.stride_s
    if height % stride or width % stride:
        near = [max(stride, round(side / stride) * stride) for side in (height, width)]
        raise ValueError(f"frames of {height}x{width} are no multiple of stride_s={stride}: use data.size=[{near[0]},{near[1]}]")


def _report(
    runner: Runner,
    model: nn.Module,
    optimizer: Any,
    episodes: EpisodeSet,
    clips: GappedClips,
    config: VidTokConfig,
    options: TrainTokenizerOptions,
) -> None:
    frames = sum(len(episode.frames) for episode in episodes.split("train"))
    grid = (episodes.height // config.stride_s, episodes.width // config.stride_s)
    values = config.width * (episodes.height // config.patch_s) * (episodes.width // config.patch_s)
    # About a dozen activations a block are kept for the backward pass; weights, gradients and AdamW's two moments are four copies.
    activations = 12 * 4 * values * (config.encoder_blocks + config.decoder_blocks) * options.batch_size * options.clip_frames
    memory = activations + 16 * sum(parameter.numel() for parameter in model.parameters())
    runner.say(
        f"data: {len(episodes.split('train'))} episodes, {frames} frames of {episodes.height}x{episodes.width} at {episodes.fps:g} fps, "
        f"{len(clips)} clips; held out: {len(episodes.split('validation'))} episodes"
    )
    runner.say(
        f"tokens: {grid[0]}x{grid[1]} = {grid[0] * grid[1]} a latent frame, codebook {config.codebook_size} ({config.quantizer}), "
        f"one latent frame for {config.stride_t} frames"
    )
    runner.report(model, optimizer, memory)
