"""Evaluate a trained folder on a token dataset and write what was found."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidgpt.evaluation import TokenReport, evaluate_tokens
from vidgpt.layout import TokenLayout
from vidgpt.metrics import TokenCounts
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import EvaluateOptions
from vidgpt.pages import write_evaluation_report
from vidgpt.rollout import stream_tokens
from vidgpt.sampling import SamplingOptions
from vidtok.card import Card, check_cards
from vidtok.folders import load_model, model_folder
from vidtok.tokens import TokenDataset


def evaluate_checkpoint(options: EvaluateOptions) -> TokenReport:
    """Write metrics.json, the tables and the curves into options.output; gives the report.

    Raises ValueError when the tokens come from another tokenizer, or context leaves nothing of the window.
    """
    folder = model_folder(options.checkpoint, VidGPTConfig.model_type)
    model, card = load_model(VidGPTForCausalLM, folder), Card.load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_cards(card, f"the checkpoint {options.checkpoint}", Card.load(options.tokens), f"the tokens {options.tokens}")
    layout, window = TokenLayout.from_config(model.config), model.config.window
    if not 1 <= options.context < window:
        raise ValueError(f"context={options.context} leaves nothing of the window of {window} frames: use 1 to {window - 1}")
    clips = TokenDataset(options.tokens, options.split, window)
    report = _measure(model, layout, clips, _counts(options, layout), options)
    report.write(options.output)
    page = write_evaluation_report(report, Path(options.output), f"Tokens of {options.checkpoint}", asdict(options))
    print(f"figures in {Path(options.output) / 'metrics.json'}, curves and tables in {page}")
    return report


def _measure(
    model: VidGPTForCausalLM, layout: TokenLayout, clips: TokenDataset, counts: TokenCounts, options: EvaluateOptions
) -> TokenReport:
    sampling = SamplingOptions(**asdict(options.sampling))

    def generate(context: Tensor, future: int, actions: Tensor | None) -> Tensor:
        return torch.stack(
            list(stream_tokens(model, context, future, seed=options.seed, options=sampling, actions=actions)), dim=1
        )

    with Progress(transient=True) as progress:
        forced = progress.add_task("teacher-forced", total=min(options.clips, len(clips)))
        report = evaluate_tokens(
            model, layout, _batches(clips, options.clips, layout, options.batch_size), counts, options.context, None,
            batch_size=options.batch_size, progress=lambda done: progress.update(forced, completed=done),
        )  # fmt: skip
        free = progress.add_task("free-running", total=min(options.rollout_clips, len(clips)))
        rollout = evaluate_tokens(
            model, layout, _batches(clips, options.rollout_clips, layout, options.rollout_clips), counts, options.context, generate,
            batch_size=options.rollout_clips, progress=lambda done: progress.update(free, completed=done),
        )  # fmt: skip
    return TokenReport(report.clips, options.context, report.teacher_forced, rollout.free_running)


def _counts(options: EvaluateOptions, layout: TokenLayout) -> TokenCounts:
    counts = TokenCounts(layout.codebook_size, (layout.height, layout.width))
    for indices in TokenDataset(options.tokens, "train", 1).rows():
        counts.update(indices)
    return counts


def _batches(clips: TokenDataset, count: int, layout: TokenLayout, size: int) -> Any:
    chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int).tolist()
    for at in range(0, len(chosen), size):
        items = [clips[index] for index in chosen[at : at + size]]
        yield {
            "indices": torch.stack([item["indices"] for item in items]),
            "actions": torch.stack([item["actions"] for item in items]) if layout.num_actions else None,
        }
