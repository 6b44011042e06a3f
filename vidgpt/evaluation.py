"""Evaluate a transformer on token clips in three regimes that never share a figure; vidgpt.regimes says what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vidgpt.baselines import Baselines
from vidgpt.challenge import challenge_figures, is_scored
from vidgpt.counts import TokenCounts
from vidgpt.layout import TokenLayout
from vidgpt.metrics import RolloutMeter, TokenMeter
from vidgpt.regimes import ForcedFrames, teacher_forced_scores
from vidgpt.scores import TokenScores, changed_tokens
from vidgpt.token_report import TRUE_LAW, Setting, TokenReport

__all__ = ["Setting", "TokenReport", "add_forced", "evaluate_rollouts", "evaluate_tokens", "teacher_forced_scores"]

Generate = Callable[[Tensor, int, Tensor | None], Tensor]
Force = Callable[[Tensor, Tensor | None], ForcedFrames]
Progress = Callable[[int], None]
Batch = Mapping[str, Tensor | None]


def evaluate_tokens(
    model: nn.Module,
    layout: TokenLayout,
    clips: Iterable[Batch],
    train_counts: TokenCounts | None,
    context: int,
    generate: Generate | None,
    *,
    force: Force | None = None,
    setting: Setting | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> TokenReport:
    """Evaluate model(input_ids).logits (B, L, layout.num_logits), where logits at p predict p + 1, beside baselines of train_counts.

    train_counts: None leaves the unigram baselines out; a token then stays the same with the chance 1/2.
    clips: batches of "indices" (B, t, h, w) and "actions" (B, t) or None, t > context, t may differ between batches; "episodes" (B,) of
    the clips, see ClipSums.add, may stand beside them.
    context: given frames of the free-running regime. generate(indices (B, context, h, w), future, actions (B, t) or None) gives
    indices (B, future, h, w); None leaves that regime out. force(indices, actions) does the temporally teacher-forced part, see
    vidgpt.regimes.temporally_forced; None leaves it out. setting: what else is known. batch_size: clips a forward pass, which
    bounds memory. progress: called with the number of clips done so far. Raises ValueError on no clips, on too short ones, on wrong
    generated shapes and on counts of other digits than the layout's.
    """
    if context < 1 or batch_size < 1:
        raise ValueError(f"got context {context} and batch_size {batch_size}; both must be 1 or more: use at least 1")
    setting, grid = setting or Setting(), (layout.height, layout.width)
    baselines, names = make_baselines(layout, train_counts)
    known = () if setting.law is None else (TRUE_LAW,)
    meters = {name: TokenMeter(grid, layout.num_digits, setting.pixels_per_frame) for name in ("model", *names, *known)}
    held: list[Batch] = []
    with _evaluating(model):
        for piece in _small_batches(clips, context, batch_size):
            _score(meters, model, layout, baselines, setting, piece)
            if generate is not None or force is not None:
                held.append(piece.batch())
            if progress is not None:
                progress(meters["model"].sums.clips)
    if not (done := meters["model"].sums.clips):
        raise ValueError("got no clips; an evaluation needs at least one: check the split and the length of its clips")
    report = TokenReport(done, context, meters, setting=setting)
    if force is not None:
        report = add_forced(report, layout, held, force, batch_size=batch_size)
    if generate is None:
        return report
    return replace(report, free_running=evaluate_rollouts(layout, held, context, generate, train_counts, batch_size=batch_size))


def _score(
    meters: Mapping[str, TokenMeter],
    model: nn.Module,
    layout: TokenLayout,
    baselines: Baselines,
    setting: Setting,
    piece: _Piece,
) -> None:
    """Add a few clips to the teacher-forced meters: of the model, of each baseline and of the true law where it is known."""
    scores = {"model": _score_model(model, layout, piece.indices, piece.actions)} | baselines.scores(piece.indices)
    if setting.law is not None:
        scores[TRUE_LAW] = setting.law(piece.indices)
    for name, meter in meters.items():
        meter.update(scores[name], changed_tokens(piece.indices), episodes=piece.episodes)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def add_forced(
    report: TokenReport,
    layout: TokenLayout,
    clips: Iterable[Batch],
    force: Force,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> TokenReport:
    """Add the temporally teacher-forced regime to a report of the same clips; arguments and errors as in evaluate_tokens."""
    pixels = report.setting.pixels_per_frame
    meter = TokenMeter((layout.height, layout.width), layout.num_digits, pixels, has_generated=True)
    done, frames = 0, 0
    for piece in _small_batches(clips, 1, batch_size):
        forced, real = force(piece.indices, piece.actions), piece.indices.cpu()
        _check_numbers(forced.scores)
        made = forced.generated.cpu()
        own = {"hits": made == real[:, 1:], "changed": made != real[:, :-1]}
        meter.update(forced.scores, changed_tokens(real), generated=own, episodes=piece.episodes)
        done, frames = done + len(real), max(frames, real.shape[1])
        if progress is not None:
            progress(done)
    if done != report.clips:
        raise ValueError(f"got {done} clips for a report of {report.clips}: give all regimes the same clips, or leave one out")
    # No baseline looks inside its frame, so theirs are the figures of the other regime.
    others = {name: own for name, own in report.teacher_forced.items() if name not in ("model", TRUE_LAW)}
    challenge = challenge_figures(layout, meter, frames) if is_scored(layout) else None
    return replace(report, temporally_teacher_forced={"model": meter, **others}, challenge=challenge)


def evaluate_rollouts(
    layout: TokenLayout,
    clips: Iterable[Batch],
    context: int,
    generate: Generate,
    train_counts: TokenCounts | None = None,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, RolloutMeter]:
    """Evaluate the free-running regime alone, of the model and of each baseline; arguments and errors as in evaluate_tokens."""
    baselines, _ = make_baselines(layout, train_counts)
    names = [name for name in Baselines.rollout_names if train_counts is not None or not name.startswith("unigram")]
    meters, done = {name: RolloutMeter((layout.height, layout.width)) for name in ("model", *names)}, 0
    for piece in _small_batches(clips, context, batch_size):
        last, real = piece.indices[:, context - 1].cpu(), piece.indices[:, context:].cpu()
        meters["model"].update(_generate(generate, piece.indices, piece.actions, context), real, last, piece.episodes)
        guesses = baselines.rollouts(last, real.shape[1])
        for name in names:
            if name in guesses:
                meters[name].update(guesses[name], real, last, piece.episodes)
            else:
                meters[name].update_uniform(layout.codebook_size, real, last, piece.episodes)
        done += len(real)
        if progress is not None:
            progress(done)
    return meters


def make_baselines(layout: TokenLayout, train_counts: TokenCounts | None) -> tuple[Baselines, list[str]]:
    """Make the baselines of training counts, and name those that these can tell. Raises ValueError on counts of other digits."""
    names = [name for name in Baselines.names if train_counts is not None or not name.startswith("unigram")]
    train_counts = train_counts or TokenCounts(layout.codebook_size, (layout.height, layout.width), layout.factors)
    if train_counts.factors != layout.factors:
        raise ValueError(
            f"the counts are of digits {list(train_counts.factors)}, the model's are {list(layout.factors)}: "
            "count the training tokens with the factors of the model"
        )
    return Baselines(train_counts), names


@dataclass(frozen=True)
class _Piece:
    """A few clips."""

    indices: Tensor  # (B, t, h, w)
    actions: Tensor | None  # (B, t)
    episodes: Tensor | None  # (B,)

    def batch(self) -> Batch:
        """Give them as they came."""
        return {"indices": self.indices, "actions": self.actions, "episodes": self.episodes}


def _small_batches(clips: Iterable[Batch], context: int, batch_size: int) -> Iterator[_Piece]:
    """Cut batches into pieces of at most batch_size clips; raises ValueError on clips that leave nothing to predict."""
    for batch in clips:
        indices, others = batch["indices"], (batch.get("actions"), batch.get("episodes"))
        assert indices is not None
        if indices.shape[1] <= context:
            raise ValueError(
                f"got clips of {indices.shape[1]} frames; a context of {context} needs longer ones: "
                "lower context or take longer clips"
            )
        for start in range(0, len(indices), batch_size):
            part = slice(start, start + batch_size)
            actions, episodes = (None if values is None else values[part] for values in others)
            yield _Piece(indices[part], actions, episodes)


def _score_model(model: nn.Module, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> TokenScores:
    """Score clips where the model's weights are; raises ValueError when it gives no numbers."""
    device = next((weight.device for weight in model.parameters()), indices.device)
    scores = teacher_forced_scores(model, layout, indices.to(device), actions)
    _check_numbers(scores)
    return scores


def _check_numbers(scores: TokenScores) -> None:
    if not bool(scores.nats.isfinite().all()):
        raise ValueError(
            "the model gave logits that are no numbers; an average over them means nothing: "
            "use a checkpoint from before its loss broke"
        )


def _generate(generate: Generate, indices: Tensor, actions: Tensor | None, context: int) -> Tensor:
    """Give the generated future of clips (B, t, h, w); raises ValueError when it has another shape than the real one."""
    real = indices[:, context:]
    generated = generate(indices[:, :context], real.shape[1], actions).cpu()
    if generated.shape != real.shape:
        raise ValueError(
            f"generate gave indices of shape {tuple(generated.shape)}; the future is {tuple(real.shape)}: "
            "return the predicted frames alone"
        )
    return generated
