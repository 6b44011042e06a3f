"""Training of the tokenizer: one visible loop."""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset

from vidtok.adversarial import Adversary
from vidtok.codebook import CodebookMonitor, check_same_codebook
from vidtok.config import VidTokConfig
from vidtok.data import SOURCES, ClipDataset, EpisodeSet, build_episodes
from vidtok.data.episodes import write_rejects
from vidtok.finetuning import build_tokenizer, freeze_indices, last_weight
from vidtok.folders import save_model
from vidtok.losses import reconstruction_loss
from vidtok.metrics import CodeMeter, FrameMeter, psnr_by_frame
from vidtok.model import VidTokModel
from vidtok.options import LossOptions, TrainTokenizerOptions
from vidtok.perceptual import Lpips, load_lpips
from vidtok.runner import Runner, build_optimizer
from vidtok.video import to_frames


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

    def describe(self, index: int) -> str:
        """Say where a clip comes from, for an error's sentence."""
        episode, first = self.clips.locate(index)
        return f"{episode.source} at {episode.start + first / episode.fps:.2f} s"


def train_tokenizer(
    options: TrainTokenizerOptions, data: Mapping[str, Any], tokenizer: Mapping[str, Any], config: Mapping[str, Any]
) -> Path:
    """Train a tokenizer into options.run_dir, or continue the run that lies there; gives the run folder.

    data, tokenizer: values of the groups, of tokenizer with init_from only those that the user chose; config: all of it, kept as
    config.yaml.
    """
    lpips = _load_lpips(options.loss)
    # With init_from, what the user did not choose is not the default.
    groups: dict[str, type] = {} if options.init_from else {"tokenizer": VidTokConfig}
    groups |= {"data": SOURCES[data["name"]]} if data.get("name") in SOURCES else {}
    with Runner(options, config, name="vidtok-train", best="validation_loss", groups=groups) as runner:
        network = build_tokenizer(runner, options, tokenizer).to(memory_format=torch.channels_last)
        _check_clip(options, network.config)
        episodes = build_episodes(data)
        runner.check_data("data", episodes.manifest_hash)
        _check_frame(episodes, network.config)
        write_rejects(runner.path / "rejects.csv", episodes.rejects)
        clips = GappedClips(episodes, "train", options.clip_frames, options.frame_gap)
        held_out = _held_out(runner, episodes, options)
        model, optimizer = runner.prepare(network, build_optimizer(network, options))
        adversary = Adversary(runner, options.gan) if options.gan.weight else None
        objective = Objective(runner, options, network, lpips, adversary)
        if not runner.is_finished:
            _report(runner, network, optimizer, episodes, clips, options)
            objective.report()

        def evaluate() -> dict[str, float]:
            assert held_out is not None
            figures = evaluate_tokenizer(runner, network, held_out, options, objective.lpips)
            if adversary is not None and "validation_psnr_db" in figures:
                adversary.watch(figures["validation_psnr_db"])
            return figures

        for step, batches in runner.steps(clips):
            logs: dict[str, Any] = runner.accumulate(model, optimizer, batches, objective)
            if adversary is not None:
                logs |= adversary.accumulate()
            runner.apply()
            logs |= objective.codebook_figures(step)
            runner.after_step(step, logs, None if held_out is None else evaluate, lambda folder: save_model(network, folder))
    return Path(options.run_dir)


class Objective:
    """What the tokenizer minimises: reconstruction, the quantizer's own loss, and what an adversary adds."""

    def __init__(
        self,
        runner: Runner,
        options: TrainTokenizerOptions,
        network: VidTokModel,
        lpips: Lpips | None,
        adversary: Adversary | None,
    ) -> None:
        self._runner, self._options, self._network, self._adversary = runner, options, network, adversary
        self.lpips = None if lpips is None else lpips.to(runner.device)
        if lpips is not None:
            runner.check_data("the weights of LPIPS", lpips.checksum)
        self._unquantized_steps = _unquantized_steps(runner, options)
        self._quantised_from: int | None = runner.known_value("quantised_from")
        config = network.config
        self._monitor = CodebookMonitor(config.codebook_factors, quantizer=config.quantizer) if config.is_discrete else None
        if options.train_only == "decoder":
            freeze_indices(network)  # prepare has put all of it in training mode

    def __call__(self, model: nn.Module, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the loss of clips (B, 3, T, H, W), and its terms."""
        output = model(video, is_quantized=self._is_quantised())
        reconstruction, terms = reconstruction_loss(output.reconstruction, video, self._options.loss, self.lpips)
        logs = {f"{name}_loss": value for name, value in terms.items()} | {"reconstruction_loss": reconstruction}
        logs |= {f"quantizer_{name}": value for name, value in (output.quantizer_terms or {}).items()}
        logs["quantizer_loss"] = output.quantizer_loss
        loss = reconstruction + output.quantizer_loss
        if self._adversary is not None:
            added, more = self._adversary.generator_loss(video, output.reconstruction, reconstruction, last_weight(self._network))
            loss, logs = loss + added, logs | more
        if self._monitor is not None and output.indices is not None:
            self._monitor.update(output.indices)
        return loss, logs

    def _is_quantised(self) -> bool:
        """Tell whether this step rounds its latents; once a step did, every later one does, also of a run continued for longer."""
        if self._quantised_from is None:
            # A run planned by minutes may be short too.
            unquantized = min(self._unquantized_steps, (self._runner.planned_steps or 5 * self._unquantized_steps) // 5)
            if self._runner.step < unquantized:
                return False
            self._quantised_from = self._runner.first_value("quantised_from", self._runner.step)
        return self._runner.step >= self._quantised_from

    def codebook_figures(self, step: int) -> dict[str, float]:
        """Give how the codebook is used, at steps that are logged; every evaluate_every steps compare processes, and warn."""
        options = self._options
        if self._monitor is None:
            return {}
        if step % options.evaluate_every == 0:
            check_same_codebook(self._network.quantizer)
            warning = self._monitor.warning()
            if warning is not None:
                self._runner.say(warning)
        return self._monitor.figures() if step == 1 or step % options.log_every == 0 else {}

    def report(self) -> None:
        """Say, before step 1, what is not plain about this training."""
        if self.lpips is not None:
            self._runner.say(f"LPIPS: {self.lpips.name} of {self._options.loss.lpips_weights}, SHA-256 {self.lpips.checksum}")
        if self._options.train_only == "decoder":
            # A resumed run still has its random weights here.
            name = self._runner.first_value("encoder", self._network.encoder_fingerprint())
            self._runner.say(f"only the decoder trains: encoder and codebook stay {name}, and so do the tokens of every clip")
        if self._adversary is not None:
            self._runner.say(self._adversary.describe())


@torch.no_grad()
def evaluate_tokenizer(
    runner: Runner, model: VidTokModel, clips: Dataset[Tensor], options: TrainTokenizerOptions, lpips: Lpips | None = None
) -> dict[str, float]:
    """Give loss, PSNR and codebook health over held-out clips, and show real over reconstructed frames.

    The loss is of the reconstruction alone. While the codebook is still empty the figures are those of latents that are not rounded,
    under names of their own, and validation_loss is infinite: such a model is never the best.
    """
    is_filled = model.quantizer.is_filled
    codes = CodeMeter(model.codebook_factors) if model.quantizer.is_discrete and is_filled else None
    name_of = "validation_{}" if is_filled else "validation_unquantized_{}"
    losses, weights = defaultdict[str, list[float]](list), list[int]()
    frames, shown = FrameMeter(), None
    for video in runner.evaluation_batches(clips, options.evaluation_clips):
        if codes is None:
            reconstruction = model.decode_latents(model.encode_latents(video))
        else:
            indices = model.encode(video)
            codes.update(indices)
            reconstruction = model.decode(indices)
        loss, terms = reconstruction_loss(reconstruction, video, options.loss, lpips)
        for name, value in {"loss": loss, **{f"{name}_loss": term for name, term in terms.items()}}.items():
            losses[name_of.format(name)].append(float(value))
        weights.append(len(video))
        frames.update(psnr_by_frame(reconstruction, video).cpu())
        shown = (video[0], reconstruction[0]) if shown is None else shown
    if shown is not None:
        runner.show("samples/real_over_reconstruction", partial(_picture, *shown))
    # The last batch may be smaller: every clip counts alike.
    means = {name: float(np.average(values, weights=weights)) for name, values in losses.items()}
    figures = means | {name_of.format("psnr_db"): frames.mean()} | ({} if codes is None else codes.summary())
    return figures if is_filled else {"validation_loss": math.inf, **figures}


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
    """Leave a short run at least four fifths of its steps to train the quantizer; one that a tokenizer brought along is trained."""
    if options.init_from is not None:
        return 0
    wanted, steps = options.unquantized_steps, options.max_steps
    limit = wanted if steps is None else min(wanted, steps // 5)
    # A run continued for longer must not fall back to unquantised latents: its first limit stays.
    limit = min(limit, runner.first_value("unquantized_steps", limit))
    if limit < wanted and not runner.is_finished:
        runner.say(f"unquantized_steps={wanted} is cut to {limit}, a fifth of max_steps, so that the quantizer is trained too")
    return limit


def _load_lpips(options: LossOptions) -> Lpips | None:
    if options.lpips_weights is None or options.lpips_weight == 0:
        return None
    return load_lpips(options.lpips_weights, options.lpips_heads, options.lpips_sha256)


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
    model: VidTokModel,
    optimizer: Any,
    episodes: EpisodeSet,
    clips: GappedClips,
    options: TrainTokenizerOptions,
) -> None:
    config = model.config
    frames = sum(len(episode.frames) for episode in episodes.split("train"))
    grid = (episodes.height // config.stride_s, episodes.width // config.stride_s)
    values = config.width * (episodes.height // config.patch_s) * (episodes.width // config.patch_s)
    steps = options.batch_size * (1 + (options.clip_frames - 1) // config.stride_t)
    # About a dozen activations a block are kept for the backward pass; weights, gradients and AdamW's two moments are four copies.
    activations = 12 * 4 * values * (config.encoder_blocks + config.decoder_blocks) * steps
    memory = activations + 16 * sum(parameter.numel() for parameter in model.parameters())
    runner.say(
        f"data: {len(episodes.split('train'))} episodes, {frames} frames of {episodes.height}x{episodes.width} at {episodes.fps:g} fps, "
        f"{len(clips)} clips; held out: {len(episodes.split('validation'))} episodes"
    )
    kind = "tokens" if config.is_discrete else "latents"
    sizes = " x ".join(map(str, config.codebook_factors)) or f"none, {model.quantizer.channels_out} numbers"
    runner.say(
        f"{kind}: {grid[0]}x{grid[1]} = {grid[0] * grid[1]} a latent frame, codebook {sizes} ({config.quantizer}), "
        f"one latent frame for {config.stride_t} frames"
    )
    runner.report(model, optimizer, memory)
