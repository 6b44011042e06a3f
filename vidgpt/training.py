"""Training of the transformer: one visible loop."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgpt.config import DEFAULT_WINDOW, VidGPTConfig
from vidgpt.counts import TokenCounts
from vidgpt.evaluation import teacher_forced_scores
from vidgpt.layout import TokenLayout
from vidgpt.metrics import Baselines, TokenMeter, changed_tokens
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import TrainGPTOptions
from vidtok.card import Card
from vidtok.folders import copy_folder, save_model
from vidtok.run.sampler import spread
from vidtok.runner import Runner, build_optimizer
from vidtok.tokens import TokenDataset, longest_row


def train_gpt(options: TrainGPTOptions, model: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Train a transformer into options.run_dir, or continue the run that lies there; gives the run folder.

    model: values of the group; config: all of it, kept as config.yaml.
    """
    card = Card.load(options.tokens)
    model_config = config_for(card, _with_window(options, model), options.use_actions)
    layout = TokenLayout.from_config(model_config)
    with Runner(options, config, name="vidgpt-train", best="validation_loss") as runner:
        runner.check_data("tokens", f"{card.tokenizer_fingerprint} of {card.data_name} {card.manifest_hash}")
        clips = TokenDataset(options.tokens, "train", model_config.window)
        held_out = _held_out(runner, options, model_config)
        network: nn.Module = VidGPTForCausalLM(model_config)
        network, optimizer = runner.prepare(network, build_optimizer(network, options))
        if not runner.is_finished:
            _report(runner, network, optimizer, layout, model_config, options, clips, held_out)

        def compute_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            input_ids = layout.flatten(batch["indices"], batch["actions"] if options.use_actions else None)
            return model(input_ids, labels=layout.labels(input_ids)).loss, {}

        def evaluate() -> dict[str, float]:
            return evaluate_gpt(runner, runner.unwrap(network), layout, held_out, options)

        def save(folder: Path) -> None:
            save_model(runner.unwrap(network), folder)
            card.save(folder)
            _add_tokenizer(folder / "tokenizer", runner.path / "model" / "tokenizer", Path(options.tokens) / "tokenizer")

        for step, batches in runner.steps(clips):
            logs = runner.update(network, optimizer, batches, compute_loss)
            runner.after_step(step, logs, evaluate if held_out is not None else None, save)
    return Path(options.run_dir)


def config_for(card: Card, model: Mapping[str, Any], use_actions: bool = False) -> VidGPTConfig:
    """Join a preset with what the tokens' card decides. Raises ValueError for actions that were not recorded."""
    if use_actions and not card.num_actions:
        raise ValueError(
            "use_actions=true, but these tokens carry no actions: encode data that records them, or set use_actions=false"
        )
    return VidGPTConfig(
        **{**model, "factors": model.get("factors") or card.codebook_factors or None},
        codebook_size=card.codebook_size,
        grid_height=card.grid_height,
        grid_width=card.grid_width,
        num_actions=card.num_actions if use_actions else 0,
    )


@torch.no_grad()
def evaluate_gpt(
    runner: Runner, model: nn.Module, layout: TokenLayout, clips: TokenDataset | None, options: TrainGPTOptions
) -> dict[str, float]:
    """Give the teacher-forced loss (nats a token) and accuracies over held-out clips."""
    assert clips is not None
    meter = TokenMeter((layout.height, layout.width), layout.num_digits)
    for batch in runner.evaluation_batches(clips, options.evaluation_clips):
        actions = batch["actions"] if options.use_actions else None
        with runner.autocast():
            scores = teacher_forced_scores(model, layout, batch["indices"], actions)
        meter.update(scores, changed_tokens(batch["indices"]))
    figures = meter.summary()
    names = {
        "validation_loss": "cross_entropy_nats_per_token",
        "validation_top1_accuracy_fraction": "top1_accuracy_fraction",
        "validation_top1_accuracy_on_changed_tokens_fraction": "top1_accuracy_on_changed_tokens_fraction",
    }
    return {name: float(value) for name, key in names.items() if (value := figures[key]) is not None}


def _add_tokenizer(target: Path, former: Path, source: Path) -> None:
    """Put the tokenizer into a model folder: that of the model before it, which costs no disk, at first that of the tokens, if any."""
    if former.is_dir():
        shutil.copytree(former, target, copy_function=_link)
    elif source.is_dir():
        copy_folder(source, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A disk without hard links.
        shutil.copyfile(source, target)


def _with_window(options: TrainGPTOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the window where the user did not. Raises ValueError for one that no clip fills."""
    longest = longest_row(options.tokens, "train")
    if longest < 2:
        raise ValueError(
            f"the training clips of {options.tokens} have one latent frame, and nothing to predict: encode longer clips"
        )
    window = model.get("window") or min(DEFAULT_WINDOW, longest)
    if window > longest:
        raise ValueError(
            f"model.window={window} latent frames, but the longest training clip of {options.tokens} has {longest}: "
            f"use model.window={longest} or less, or encode longer clips"
        )
    return {**model, "window": window}


def _held_out(runner: Runner, options: TrainGPTOptions, config: VidGPTConfig) -> TokenDataset | None:
    """Open the held-out clips; those of a short video may be shorter than the window, and are used as they are."""
    longest = longest_row(options.tokens, "validation", is_optional=True)
    if longest < 2:
        runner.say("no held-out clips: the model cannot be evaluated while it trains; encode with a larger data.validation")
        return None
    if longest < config.window:
        runner.say(
            f"held-out clips are {longest} latent frames long, the window is {config.window}: they are evaluated at their length"
        )
    return TokenDataset(options.tokens, "validation", min(config.window, longest))


def _report(
    runner: Runner,
    model: nn.Module,
    optimizer: Any,
    layout: TokenLayout,
    config: VidGPTConfig,
    options: TrainGPTOptions,
    clips: TokenDataset,
    held_out: TokenDataset | None,
) -> None:
    """Print sizes and the losses to beat."""
    length = config.window * layout.tokens_per_frame
    width = config.hidden_size + int(config.intermediate_size or 0)
    tokens = length * options.batch_size
    # fp32 bytes: per layer about six activations of each width, and the logits with their gradient.
    activations = 4 * (6 * tokens * width * config.num_hidden_layers + 2 * min(tokens * layout.num_logits, config.loss_chunk))
    memory = activations + 16 * sum(parameter.numel() for parameter in model.parameters())
    runner.say(
        f"sequence: {layout.tokens_per_frame} tokens a frame ({layout.height}x{layout.width}{_digits(layout)} and a lead), window "
        f"{config.window} frames, {length} tokens; {len(clips)} training clips"
    )
    runner.report(model, optimizer, memory)
    unit = "nats a token" if layout.num_digits == 1 else "nats a token (the sum over its digits)"
    runner.say(f"validation_loss to beat, {unit}: uniform ln V = {math.log(layout.codebook_size):.3f}")
    for line in _baseline_lines(clips, held_out or clips, layout, options):
        runner.say(line)


def _digits(layout: TokenLayout) -> str:
    """Say how the digits of an id are laid out, where there are several."""
    if layout.num_digits == 1:
        return ""
    sizes = "x".join(map(str, layout.factors))
    return f" places of {layout.num_digits} digits ({sizes} values), predicted {'together' if layout.is_parallel else 'in turn'},"


def _baseline_lines(clips: TokenDataset, held_out: TokenDataset, layout: TokenLayout, options: TrainGPTOptions) -> list[str]:
    counts = TokenCounts(layout.codebook_size, (layout.height, layout.width), layout.factors)
    for indices in clips.rows():
        counts.update(indices)
    meters = {name: TokenMeter((layout.height, layout.width), layout.num_digits) for name in Baselines.names}
    baselines, chosen = Baselines(counts), spread(held_out, options.evaluation_clips)
    for index in range(len(chosen)):
        indices = chosen[index]["indices"][None]
        for name, scores in baselines.scores(indices).items():
            meters[name].update(scores, changed_tokens(indices))
    lines = []
    for name in ("unigram", "unigram_by_position", "copy_last_frame_smoothed"):
        figures = meters[name].summary()
        changed = figures["top1_accuracy_on_changed_tokens_fraction"] or 0.0
        lines.append(
            f"  {name.replace('_', ' ')}: {figures['cross_entropy_nats_per_token']:.3f}, accuracy {figures['top1_accuracy_fraction']:.3f}, "
            f"on changed tokens {changed:.3f}"
        )
    return lines
