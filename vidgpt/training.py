"""Training of the transformer: one visible loop."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgpt.augmentation import corrupt_tokens, drop_actions
from vidgpt.config import VidGPTConfig
from vidgpt.counts import TokenCounts
from vidgpt.diagonal_training import diagonal_batch, is_diagonal_step
from vidgpt.evaluation import teacher_forced_scores
from vidgpt.finetuning import build_gpt
from vidgpt.layout import IGNORED, TokenLayout
from vidgpt.loss import place_cross_entropy
from vidgpt.metrics import Baselines, TokenMeter, changed_tokens
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import TrainGPTOptions
from vidgpt.training_pictures import drawing, load_decoder
from vidtok.card import Card
from vidtok.folders import copy_folder, save_model
from vidtok.model import VidTokModel
from vidtok.run.sampler import spread
from vidtok.runner import Runner, build_optimizer
from vidtok.tokens import TokenDataset, longest_row


def train_gpt(options: TrainGPTOptions, model: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Train a transformer into options.run_dir, or continue the run that lies there; gives the run folder.

    model: values of the group, with init_from only those that the user chose; config: all of it, kept as config.yaml.
    """
    card = Card.load(options.tokens)
    # With init_from, what the user did not choose is not the default.
    groups = {} if options.init_from else {"model": VidGPTConfig}
    with Runner(options, config, name="vidgpt-train", best=_deciding(options), groups=groups) as runner:
        runner.check_data("tokens", f"{card.tokenizer_fingerprint} of {card.data_name} {card.manifest_hash}")
        gpt = build_gpt(runner, options, card, model)
        model_config, layout = gpt.config, gpt.model.layout
        clips = TokenDataset(options.tokens, "train", model_config.window)
        held_out = _held_out(runner, options, model_config)
        decoder = _load_decoder(runner, options) if held_out is not None else None
        network, optimizer = runner.prepare(gpt, build_optimizer(gpt, options))
        if not runner.is_finished:
            _report(runner, network, optimizer, layout, model_config, options, clips, held_out)

        def compute_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            input_ids = layout.flatten(batch["indices"], batch["actions"] if options.use_actions else None)
            labels, read = layout.labels(input_ids), _augmented(layout, input_ids, options)
            drafts = _draft_labels(layout, labels) if model_config.draft_head else None
            if is_diagonal_step(options.seed, runner.step + 1, options.diagonal.share):
                given = diagonal_batch(model_config, read, labels, *_plan(options))
                if drafts is not None:
                    drafts = F.pad(drafts, (given.input_ids.shape[1] - drafts.shape[1], 0), value=IGNORED)
                found = model(**vars(given), draft_labels=drafts)
            else:
                found = model(read, labels=labels, draft_labels=drafts)
            if found.draft_loss is None or options.train_only:
                return found.loss if found.draft_loss is None else found.draft_loss, {}
            return found.loss + found.draft_loss, {"loss": found.loss, "draft_loss": found.draft_loss}

        def evaluate() -> dict[str, float]:
            figures = evaluate_gpt(runner, gpt, layout, held_out, options)
            if decoder is not None and held_out is not None:
                _show_picture(runner, decoder, gpt, card, held_out, options)
            return figures

        def save(folder: Path) -> None:
            save_model(runner.unwrap(network), folder)
            card.save(folder)
            _add_tokenizer(folder / "tokenizer", runner.path / "model" / "tokenizer", Path(options.tokens) / "tokenizer")

        for step, batches in runner.steps(clips):
            logs = runner.update(network, optimizer, batches, compute_loss)
            runner.after_step(step, logs, evaluate if held_out is not None else None, save)
    return Path(options.run_dir)


def _augmented(layout: TokenLayout, input_ids: Tensor, options: TrainGPTOptions) -> Tensor:
    """Give what is read of input_ids (B, L). The runner seeds every step, so the draws of a resumed run are those of a straight one."""
    if options.token_corruption:
        input_ids = corrupt_tokens(layout, input_ids, options.token_corruption)
    if options.action_dropout:
        input_ids = drop_actions(layout, input_ids, options.action_dropout)
    return input_ids


def _draft_labels(layout: TokenLayout, labels: Tensor, share_frames: bool = True) -> Tensor:
    """Give what the draft head learns: the labels (B, L) of a frame later, of every other frame, which others the step decides.

    Neighbouring frames teach much the same, and half of them are half the price.
    """
    size = layout.tokens_per_frame
    later = F.pad(labels[:, size:], (0, size), value=IGNORED)
    if not share_frames or labels.shape[1] < 3 * size:
        return later
    frames = torch.arange(labels.shape[1], device=labels.device) // size
    return later.masked_fill((frames + torch.randint(2, ()).item()) % 2 == 1, IGNORED)


@torch.no_grad()
def evaluate_gpt(
    runner: Runner, model: nn.Module, layout: TokenLayout, clips: TokenDataset | None, options: TrainGPTOptions
) -> dict[str, float]:
    """Give the teacher-forced loss (nats a token) and accuracies over held-out clips; where diagonal steps are trained, their loss too."""
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
    found = {name: float(value) for name, key in names.items() if (value := figures[key]) is not None}
    if options.train_only:
        found["validation_draft_loss"] = _draft_loss(runner, model, layout, clips, options)
    if options.diagonal.share:
        share, found["validation_diagonal_loss"] = options.diagonal.share, _diagonal_loss(runner, model, layout, clips, options)
        found[_deciding(options)] = (1 - share) * found["validation_loss"] + share * found["validation_diagonal_loss"]
    return found


def _load_decoder(runner: Runner, options: TrainGPTOptions) -> VidTokModel | None:
    # Only the main process draws.
    return load_decoder(options.tokens, runner.device, runner.say) if runner.is_main and not runner.is_finished else None


def _show_picture(
    runner: Runner, decoder: VidTokModel, model: VidGPTForCausalLM, card: Card, clips: TokenDataset, options: TrainGPTOptions
) -> None:
    """Keep the picture of the first held-out clip."""
    clip = next(iter(runner.evaluation_batches(clips, 1)))
    actions = clip["actions"] if options.use_actions else None
    draw = drawing(decoder, model, model.model.layout, card, clip["indices"], actions)
    runner.show("samples/real_over_likeliest", draw)


def _deciding(options: TrainGPTOptions) -> str:
    """Name the figure that picks model/: the loss of what the steps train, mixed as they are."""
    if options.train_only:
        return "validation_draft_loss"
    return "validation_mixed_loss" if options.diagonal.share else "validation_loss"


def _diagonal_loss(runner: Runner, model: nn.Module, layout: TokenLayout, clips: TokenDataset, options: TrainGPTOptions) -> float:
    """Give the loss of what validation_loss counts too, every token given only what diagonal decoding has drawn before it."""
    assert isinstance(model, VidGPTForCausalLM)
    total, count = 0.0, 0
    # Leads are no candidates, as in validation_loss.
    head = model.lm_head.weight[: sum(layout.factors)]
    for batch in runner.evaluation_batches(clips, options.evaluation_clips):
        input_ids = layout.flatten(batch["indices"], batch["actions"] if options.use_actions else None)
        labels = layout.labels(input_ids)
        labels[:, : layout.tokens_per_frame] = IGNORED
        with runner.autocast():
            laid_out = diagonal_batch(model.config, input_ids, labels, *_plan(options))
            read = model.model(laid_out.input_ids, laid_out.attention_mask, laid_out.position_ids).last_hidden_state
            loss = place_cross_entropy(read, head, laid_out.labels, layout, model.config.loss_chunk)
        total, count = total + float(loss) * len(input_ids), count + len(input_ids)
    return total / count


def _draft_loss(runner: Runner, model: nn.Module, layout: TokenLayout, clips: TokenDataset, options: TrainGPTOptions) -> float:
    """Give the loss of the draft head over all held-out frames but the first."""
    assert isinstance(model, VidGPTForCausalLM)
    total, count = 0.0, 0
    for batch in runner.evaluation_batches(clips, options.evaluation_clips):
        input_ids = layout.flatten(batch["indices"], batch["actions"] if options.use_actions else None)
        labels = _draft_labels(layout, layout.labels(input_ids), share_frames=False)
        with runner.autocast():
            loss = model.draft_loss(model.model(input_ids).last_hidden_state, labels)
        total, count = total + float(loss) * len(input_ids), count + len(input_ids)
    return total / count


def _plan(options: TrainGPTOptions) -> tuple[int, int]:
    return options.diagonal.window, options.diagonal.delay


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
