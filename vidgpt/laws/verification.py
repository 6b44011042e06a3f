"""Check on a trained folder that every way of decoding computes what the model says; see vidgpt.laws.invariants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vidgpt.checkpoint import load_checkpoint
from vidgpt.fused import FusedModel
from vidgpt.laws import invariants as laws
from vidgpt.laws.comparing import Finding
from vidgpt.laws.forced import ROUNDINGS, Subject
from vidgpt.laws.rollouts import guidance, reprefill, samples
from vidgpt.laws.sampled_law import speculative_law
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import VerifyOptions
from vidtok.run.processes import DTYPES
from vidtok.run.sampler import spread
from vidtok.tokens import TokenDataset, longest_row

LAWS: tuple[Callable[[Subject], Finding], ...] = (
    laws.cached,
    laws.prefill_splits,
    laws.batch_rows,
    laws.ragged_rows,
    laws.speculative_logits,
    laws.speculative_greedy,
    laws.speculative_sampled,
    speculative_law,
    laws.wide_diagonal,
    laws.narrow_diagonal,
    laws.transformers_generate,
    laws.beyond_window,
    reprefill,
    samples,
    guidance,
    laws.stale_slots,
    laws.overwriting,
    laws.saved_and_loaded,
    laws.legal_ids,
    laws.seeds,
)


def verify_checkpoint(options: VerifyOptions) -> bool:
    """Print a line for each law; gives whether all are kept.

    Raises ValueError when the tokens do not belong to the checkpoint, or a device is not there.
    """
    model, _ = load_checkpoint(options.checkpoint, options.tokens)
    subject = make_subject(model.to(_device(options.device)), options)
    source = "random ids" if options.tokens is None else f"tokens of {options.tokens}"
    clips = f"{subject.batch} clips of {subject.frames} frames, {subject.context} given"
    print(f"{options.checkpoint} on {model.device}, {options.precision}: {clips}, {source}", flush=True)
    if not subject.is_fp32:
        print(
            f"{options.precision} puts the uncached model's own logits up to {subject.rounding:.1e} of their spread off fp32's; allowed is "
            f"{ROUNDINGS} times that, and ids are compared where the best two are farther apart",
            flush=True,
        )
    findings = []
    for law in LAWS:
        findings.append(law(subject))
        print(findings[-1], flush=True)
    kept, broken = (sum(finding.is_kept is which for finding in findings) for which in (True, False))
    print(f"{kept} laws hold, {broken} do not, {len(findings) - kept - broken} are not applicable")
    return not broken


def make_subject(model: VidGPTForCausalLM, options: VerifyOptions) -> Subject:
    """Choose the clips."""
    frames, config = min(options.frames, model.config.window), model.config
    if options.tokens is not None:
        indices, actions = _recorded(str(options.tokens), options.clips, frames)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.clips, frames, config.grid_height, config.grid_width)
        indices = torch.randint(0, config.codebook_size, shape, generator=generator)
        actions = torch.randint(0, max(1, config.num_actions), shape[:2], generator=generator)
    given = actions.to(model.device) if config.num_actions else None
    fused = FusedModel(model, DTYPES[options.precision])
    return Subject(model, fused, indices.to(model.device), given, max(1, frames // 2), options.seed)


def _recorded(path: str, count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Give indices (B, T, h, w) and actions (B, T) of clips of the dataset, spread evenly over its validation split, or else all."""
    split = "validation" if longest_row(path, "validation", is_optional=True) >= frames else "train"
    clips = TokenDataset(path, split, frames)
    items = [clips[index] for index in spread(clips, count).indices]
    return torch.stack([item["indices"] for item in items]), torch.stack([item["actions"] for item in items])


def _device(name: str | None) -> torch.device:
    """Raises ValueError when there is no such device."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} is not there: give cpu, cuda or cuda:NUMBER, or leave it away") from error
