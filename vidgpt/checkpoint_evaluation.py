"""Evaluate a trained folder on a token dataset and write what was found."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidgpt.counts import TokenCounts
from vidgpt.evaluation import TokenReport, evaluate_rollouts, evaluate_tokens
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import EvaluateOptions
from vidgpt.pages import headline, write_evaluation_report
from vidgpt.rollout import check_model, stream_tokens
from vidgpt.sampling import SamplingOptions
from vidtok.card import Card, check_cards
from vidtok.data.options import how_to_lengthen
from vidtok.folders import OutputFolder, load_model, model_folder
from vidtok.run.sampler import spread
from vidtok.tokens import TokenDataset, longest_row

RECORD_FILE = "evaluation.json"
FILES = (
    *("metrics.json", "by_frame.csv", "by_position.csv", "report.html"),
    *(f"accuracy_by_{name}.png" for name in ("horizon", "frame", "position")),
    "changes_by_horizon.png",
)
_OURS = re.compile("|".join(map(re.escape, (*FILES, RECORD_FILE))))


def evaluate_checkpoint(options: EvaluateOptions) -> TokenReport:
    """Write metrics.json, the tables and the curves into options.output; gives the report.

    evaluation.json there names them, so that a later evaluation replaces them, and no other file.
    Raises ValueError when the tokens come from another tokenizer, or context leaves nothing of the window.
    """
    output = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    output.check(FILES)
    folder = model_folder(options.checkpoint, VidGPTConfig.model_type)
    model, card = load_model(VidGPTForCausalLM, folder), Card.load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_model(card, model.config, f"the checkpoint {options.checkpoint}")
    tokens = Card.load(options.tokens)
    if not model.config.num_actions:
        tokens = replace(tokens, num_actions=card.num_actions)  # nobody looks at them
    check_cards(card, f"the checkpoint {options.checkpoint}", tokens, f"the tokens {options.tokens}")
    layout = TokenLayout.from_config(model.config)
    longest = longest_row(options.tokens, options.split)
    window = min(model.config.window, longest)
    if not 1 <= options.context < window:
        raise ValueError(
            f"context={options.context} leaves nothing to predict: the model's window is {model.config.window} frames, the longest clip of "
            f"split {options.split!r} has {longest}; give a smaller context or longer clips"
        )
    clips = TokenDataset(options.tokens, options.split, window)
    left_out = _describe_short(clips, options.split)
    if left_out:
        print(f"{left_out}: encode longer ones, with {how_to_lengthen(tokens.data_name)}")
    print(
        f"evaluating {min(options.clips, len(clips))} clips of {window} frames teacher-forced, {min(options.rollout_clips, len(clips))} "
        f"free-running from {options.context} frames",
        flush=True,
    )
    report = _measure(model, layout, clips, _counts(options, layout), options)
    output.replace(FILES, asdict(options))
    report.write(output.path)
    rows = {"rows_count": len(clips.lengths), "rows_left_out_count": sum(length < window for length in clips.lengths)}
    (output.path / FILES[0]).write_text(json.dumps(report.metrics() | rows, indent=2, allow_nan=False) + "\n")
    page = write_evaluation_report(report, output.path, f"Tokens of {options.checkpoint}", asdict(options), left_out)
    print("\n".join(headline(report)))
    print(f"figures in {output.path / 'metrics.json'}, curves and tables in {page}")
    return report


def _describe_short(clips: TokenDataset, split: str) -> str:
    """Say how many rows are shorter than a clip, and nothing where none is."""
    short = sum(length < clips.window for length in clips.lengths)
    has, are = ("has", "is") if short == 1 else ("have", "are")
    rows = f"{short} of {len(clips.lengths)} rows of split {split!r}"
    return f"{rows} {has} fewer than {clips.window} latent frames and {are} left out" if short else ""


def _measure(
    model: VidGPTForCausalLM, layout: TokenLayout, clips: TokenDataset, counts: TokenCounts | None, options: EvaluateOptions
) -> TokenReport:
    sampling, done, size = SamplingOptions(**asdict(options.sampling)), 0, options.batch_size

    def generate(context: Tensor, future: int, actions: Tensor | None) -> Tensor:
        nonlocal done
        stream = stream_tokens(model, context, future, seed=options.seed, options=sampling, actions=actions, first_sequence=done)
        done += len(context)
        return torch.stack(list(stream), dim=1)

    with Progress(transient=True) as progress:
        scored, rolled = min(options.clips, len(clips)), min(options.rollout_clips, len(clips))
        forced, free = progress.add_task("teacher-forced", total=scored), progress.add_task("free-running", total=rolled)
        report = evaluate_tokens(
            model, layout, _batches(clips, scored, layout, size), counts, options.context, None,
            batch_size=size, progress=lambda count: progress.update(forced, completed=count),
        )  # fmt: skip
        if not rolled:
            return report
        rollout = evaluate_rollouts(
            layout, _batches(clips, rolled, layout, 2 * size), options.context, generate,
            batch_size=2 * size, progress=lambda count: progress.update(free, completed=count),
        )  # fmt: skip
    return replace(report, free_running=rollout)


def _counts(options: EvaluateOptions, layout: TokenLayout) -> TokenCounts | None:
    if not longest_row(options.tokens, "train", is_optional=True):
        print(f"{options.tokens} has no training split to count tokens of: the unigram baselines are left out", flush=True)
        return None
    counts = TokenCounts(layout.codebook_size, (layout.height, layout.width), layout.factors)
    for indices in TokenDataset(options.tokens, "train", 1).rows():
        counts.update(indices)
    return counts


def _batches(clips: TokenDataset, count: int, layout: TokenLayout, size: int) -> Any:
    chosen = spread(clips, count)
    for at in range(0, len(chosen), size):
        items = [chosen[index] for index in range(at, min(at + size, len(chosen)))]
        yield {
            "indices": torch.stack([item["indices"] for item in items]),
            "actions": torch.stack([item["actions"] for item in items]) if layout.num_actions else None,
        }
