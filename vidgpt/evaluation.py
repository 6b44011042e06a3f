"""Evaluate a transformer on token clips: teacher-forced and free-running, two regimes that never share a figure.

Teacher-forced: every token after the first frame is predicted from the true tokens before it. Free-running: frames after a
given context are generated from the model's own tokens and compared with the real ones.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vidgpt.counts import TokenCounts
from vidgpt.layout import TokenLayout
from vidgpt.metrics import (
    Baselines,
    Figures,
    RolloutMeter,
    TokenMeter,
    TokenScores,
    changed_tokens,
    join_scores,
    score_logits,
)
from vidgpt.model import VidGPTForCausalLM

Generate = Callable[[Tensor, int, Tensor | None], Tensor]
Progress = Callable[[int], None]
Batch = Mapping[str, Tensor | None]
HELD_LOGITS = 1 << 25  # at once: 128 MB in fp32


@dataclass(frozen=True)
class TokenReport:
    """What was measured, by regime."""

    clips: int
    context: int  # given frames of a free-running clip
    teacher_forced: dict[str, TokenMeter]  # the model's and each baseline's
    free_running: RolloutMeter | None  # None where no generator was given

    def metrics(self) -> dict[str, Any]:
        """Give the contents of metrics.json: regime, then who predicts, then figures named with their units."""
        figures: dict[str, Any] = {
            "clips_count": self.clips,
            "teacher_forced": {name: meter.summary() for name, meter in self.teacher_forced.items()},
        }
        if self.free_running is not None:
            figures["free_running"] = {"context_frames_count": self.context, "model": self.free_running.summary()}
        return figures

    def by_frame(self) -> list[dict[str, Any]]:
        """Give one row for each regime, forecaster and frame; free-running rows have a horizon beside the frame index."""
        rows = _tagged({name: meter.by_frame() for name, meter in self.teacher_forced.items()}, "teacher_forced")
        if self.free_running is not None:
            for row in self.free_running.by_frame():
                frame = {"frame_index": self.context - 1 + int(row["horizon_frames"] or 0)}
                rows.append({"regime": "free_running", "forecaster": "model"} | frame | row)
        return rows

    def by_position(self) -> list[dict[str, Any]]:
        """Give one row for each regime, forecaster and place of the grid."""
        rows = _tagged({name: meter.by_position() for name, meter in self.teacher_forced.items()}, "teacher_forced")
        if self.free_running is not None:
            rows += _tagged({"model": self.free_running.by_position()}, "free_running")
        return rows

    def write(self, folder: str | Path) -> None:
        """Write metrics.json, by_frame.csv and by_position.csv into a folder, which is made where missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(self.metrics(), indent=2, allow_nan=False) + "\n")
        write_csv(folder / "by_frame.csv", self.by_frame())
        write_csv(folder / "by_position.csv", self.by_position())


def _tagged(tables: Mapping[str, list[Figures]], regime: str) -> list[dict[str, Any]]:
    """Put regime and forecaster in front of every row."""
    return [{"regime": regime, "forecaster": name} | row for name, rows in tables.items() for row in rows]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; columns are the union of their keys, a missing or undefined figure is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def evaluate_tokens(
    model: nn.Module,
    layout: TokenLayout,
    clips: Iterable[Batch],
    train_counts: TokenCounts | None,
    context: int,
    generate: Generate | None,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> TokenReport:
    """Evaluate model(input_ids).logits (B, L, layout.num_logits), where logits at p predict p + 1, beside baselines of train_counts.

    train_counts: None leaves the unigram baselines out; a token then stays the same with the chance 1/2.
    clips: batches of "indices" (B, t, h, w) and "actions" (B, t) or None, t > context, t may differ between batches.
    context: given frames of the free-running regime. generate(indices (B, context, h, w), future, actions (B, t) or None) gives
    indices (B, future, h, w); None leaves that regime out. batch_size: clips a forward pass, which bounds memory. progress:
    called with the number of clips done so far. Raises ValueError on no clips, on too short ones, on wrong generated shapes and on
    counts of other digits than the layout's.
    """
    if context < 1 or batch_size < 1:
        raise ValueError(f"got context {context} and batch_size {batch_size}; both must be 1 or more: use at least 1")
    grid = (layout.height, layout.width)
    names = [name for name in Baselines.names if train_counts is not None or not name.startswith("unigram")]
    train_counts = train_counts or TokenCounts(layout.codebook_size, grid, layout.factors)
    if train_counts.factors != layout.factors:
        raise ValueError(
            f"the counts are of digits {list(train_counts.factors)}, the model's are {list(layout.factors)}: "
            "count the training tokens with the factors of the model"
        )
    baselines = Baselines(train_counts)
    meters = {name: TokenMeter(grid, layout.num_digits) for name in ("model", *names)}
    rollout = None if generate is None else RolloutMeter(grid)
    done, was_training = 0, model.training
    model.eval()
    try:
        for indices, actions in _small_batches(clips, context, batch_size):
            scores = {"model": _score_model(model, layout, indices, actions)} | baselines.scores(indices)
            for name, meter in meters.items():
                meter.update(scores[name], changed_tokens(indices))
            if generate is not None and rollout is not None:
                _roll_out(rollout, generate, indices, actions, context)
            done += len(indices)
            if progress is not None:
                progress(done)
    finally:
        model.train(was_training)
    if not done:
        raise ValueError("got no clips; an evaluation needs at least one: check the split and the length of its clips")
    return TokenReport(done, context, meters, rollout)


def evaluate_rollouts(
    layout: TokenLayout,
    clips: Iterable[Batch],
    context: int,
    generate: Generate,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> RolloutMeter:
    """Evaluate the free-running regime alone; arguments and errors as in evaluate_tokens."""
    meter, done = RolloutMeter((layout.height, layout.width)), 0
    for indices, actions in _small_batches(clips, context, batch_size):
        _roll_out(meter, generate, indices, actions, context)
        done += len(indices)
        if progress is not None:
            progress(done)
    return meter


def _small_batches(clips: Iterable[Batch], context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut batches into pieces of at most batch_size clips; raises ValueError on clips that leave nothing to predict."""
    for batch in clips:
        indices, actions = batch["indices"], batch.get("actions")
        assert indices is not None
        if indices.shape[1] <= context:
            raise ValueError(
                f"got clips of {indices.shape[1]} frames; a context of {context} needs longer ones: "
                "lower context or take longer clips"
            )
        for start in range(0, len(indices), batch_size):
            piece = slice(start, start + batch_size)
            yield indices[piece], None if actions is None else actions[piece]


@torch.no_grad()
def teacher_forced_scores(model: nn.Module, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> TokenScores:
    """Score every token after the first frame, given all true tokens before it; leads are neither scored nor candidates.

    indices: (B, t, h, w), where the model's weights are; actions: (B, t) or None. Gives scores of shape (B, t - 1, h, w).
    """
    batch, frames, height, _ = indices.shape
    predict = _predictor(model, layout, layout.flatten(indices, actions))
    targets = rearrange(layout.split(indices[:, 1:]), "B t h w q -> q B (t h w)")
    # At most a frame at a time: the fp32 softmax of a whole clip would double the memory that its logits take.
    rows = max(1, min(layout.cells, HELD_LOGITS // (batch * layout.num_logits)))
    scores: dict[int, list[TokenScores]] = {digit: [] for digit in range(layout.num_digits)}
    for slot in range(layout.slots_per_place):
        positions = layout.positions_of(slot, frames)[layout.cells :].to(indices.device)
        for at in range(0, len(positions), rows):
            piece = slice(at, at + rows)
            logits = predict(positions[piece])
            for digit, due in zip(layout.due_digits(slot), layout.due_logits(logits, slot), strict=True):
                scores[digit].append(score_logits(due, targets[digit][:, piece]))
    return join_scores([_as_grid(pieces, height, frames - 1) for pieces in scores.values()])


def _predictor(model: nn.Module, layout: TokenLayout, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Give a function from positions (n,) of input_ids (B, L) to the logits (B, n, V) that predict them.

    Where there are more than HELD_LOGITS, they are computed when asked for.
    """
    if isinstance(model, VidGPTForCausalLM) and input_ids.numel() * layout.num_logits > HELD_LOGITS:
        network, hidden_states = model, model.model(input_ids).last_hidden_state
        return lambda positions: network.lm_head(hidden_states[:, positions - 1])
    logits = model(input_ids).logits
    return lambda positions: logits[:, positions - 1]


def _as_grid(pieces: list[TokenScores], height: int, frames: int) -> TokenScores:
    """Join scores (B, n) of successive places into one of (B, t, h, w)."""
    joined = [torch.cat([getattr(piece, name) for piece in pieces], dim=1) for name in ("nats", "top1", "top5")]
    nats, top1, top5 = (rearrange(part, "B (t h w) -> B t h w", t=frames, h=height) for part in joined)
    return TokenScores(nats, top1, top5)


def _score_model(model: nn.Module, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> TokenScores:
    """Score clips where the model's weights are; raises ValueError when it gives no numbers."""
    device = next((weight.device for weight in model.parameters()), indices.device)
    scores = teacher_forced_scores(model, layout, indices.to(device), actions)
    if not bool(scores.nats.isfinite().all()):
        raise ValueError(
            "the model gave logits that are no numbers; an average over them means nothing: "
            "use a checkpoint from before its loss broke"
        )
    return scores


def _roll_out(meter: RolloutMeter, generate: Generate, indices: Tensor, actions: Tensor | None, context: int) -> None:
    """Generate the future of clips (B, t, h, w) and compare it; raises ValueError when it has another shape."""
    real = indices[:, context:].cpu()
    generated = generate(indices[:, :context], real.shape[1], actions).cpu()
    if generated.shape != real.shape:
        raise ValueError(
            f"generate gave indices of shape {tuple(generated.shape)}; the future is {tuple(real.shape)}: "
            "return the predicted frames alone"
        )
    meter.update(generated, real, indices[:, context - 1].cpu())
