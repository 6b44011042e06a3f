"""Adversarial training beside the tokenizer's own loss: its arithmetic, and the discriminator's part of a training step.

Source: hinge loss arXiv:1705.02894; non-saturating loss arXiv:1406.2661; adaptive weight arXiv:2012.09841, section 3.2;
R1 arXiv:1801.04406; LeCam arXiv:2104.03310.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from vidtok.discriminator import PatchDiscriminator
from vidtok.options import GanOptions
from vidtok.run.processes import averaged
from vidtok.runner import Runner

LECAM_DECAY = 0.99


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Give what the discriminator minimises: scores of real patches below 1, and of reconstructed ones above -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def non_saturating_loss(fake: Tensor) -> Tensor:
    """Give what the tokenizer minimises: -log sigmoid of its patches' scores, whose gradient is largest where it is found out."""
    return F.softplus(-fake).mean()


def lecam_penalty(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Give the squared distance that scores have moved beyond the running mean of the other side."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


def r1_penalty(real: Tensor, video: Tensor) -> Tensor:
    """Give half the squared gradient of the scores with respect to real pixels, per patch, as the mean over clips.

    real: scores (B, N) of video (B, 3, T, H, W). Divided by N, so that a weight holds for every size of frame.
    """
    (gradient,) = torch.autograd.grad(real.sum(), video, create_graph=True)
    return 0.5 * gradient.square().sum() / real.numel()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, weight: Tensor, limit: float) -> Tensor:
    """Give how much larger the first loss's gradient at `weight` is than the second's, in [0, limit], in fp32.

    Of the gradients averaged over processes, so that all of them use the factor of the whole batch.
    """
    losses = (reconstruction_loss, adversarial_loss)
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0].float() for loss in losses]
    wanted, found = averaged(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (wanted / (found + 1e-8)).clamp(0, limit)


def ramp(step: int, options: GanOptions) -> float:
    """Give the share of its weight that the adversarial loss has at a step (from 1): 0 up to start + warmup_steps, then rising to 1."""
    return min(1.0, max(0.0, (step - options.start - options.warmup_steps) / options.ramp_steps))


def quality_warning(history: Sequence[tuple[int, float]], options: GanOptions) -> str | None:
    """Say, every `patience` evaluations, that all since reconstruct worse than the last one before the GAN began; else None.

    history: (step, PSNR in dB) of every evaluation so far.
    """
    began = options.start + options.warmup_steps
    before = [entry for entry in history if entry[0] <= began]
    if not before:
        return None
    step, reference = before[-1]
    since = [value for at, value in history if at > began]
    worse = next((number for number, value in enumerate(reversed(since)) if value >= reference), len(since))
    if not worse or worse % options.patience:
        return None
    return (
        f"gan: validation_psnr_db is {since[-1]:.2f}, below the {reference:.2f} of step {step} for {worse} evaluations since the GAN "
        "began: a temporary drop is normal; if it lasts, lower gan.weight or raise gan.lecam_weight (model/ keeps the best reconstruction)"
    )


class Adversary:
    """Hold the discriminator and its optimizer: the run's second trained part, called "discriminator"."""

    def __init__(self, runner: Runner, options: GanOptions) -> None:
        self.options, self._runner = options, runner
        self.discriminator = PatchDiscriminator(self.options.dimensions, self.options.width, self.options.layers)
        first, second = self.options.betas
        optimizer = AdamW(self.discriminator.parameters(), lr=self.options.lr, betas=(first, second), weight_decay=0.0)
        self._wrapped, self._optimizer = runner.prepare(self.discriminator, optimizer, name="discriminator")
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def generator_loss(
        self, video: Tensor, reconstruction: Tensor, reconstruction_loss: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give what it adds to the tokenizer's loss in the current step, and scalars to log; keeps the pair for its own turn.

        video, reconstruction: (B, 3, T, H, W). last_weight: of the decoder's last layer.
        """
        step = self._runner.step + 1
        if step > self.options.start:
            self._pairs.append((video, reconstruction.detach().float()))
        share = ramp(step, self.options)
        if not share:
            return video.new_zeros(()), {}
        with _held_still(self.discriminator):
            loss = non_saturating_loss(self.discriminator(reconstruction).float())
        logs = {"gan_loss": loss}
        weight = torch.tensor(share * self.options.weight, device=video.device)
        if self.options.is_adaptive:
            logs["gan_adaptive_weight"] = adaptive_weight(
                reconstruction_loss, loss, last_weight, self.options.max_adaptive_weight
            )
            weight = weight * logs["gan_adaptive_weight"]
        return weight * loss, logs | {"gan_weight": weight}

    def accumulate(self) -> dict[str, Tensor]:
        """Leave the discriminator's own gradient on the pairs of this step in its parameters; gives scalars to log.

        Nothing happens before gan.start.
        """
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return {}
        logs = self._runner.accumulate(self._wrapped, self._optimizer, pairs, self._discriminator_loss)
        return {f"discriminator_{name}": value for name, value in logs.items()}

    def watch(self, psnr: float) -> None:
        """Warn when an evaluation, whose PSNR in dB this is, is one of many that are worse than before the GAN began."""
        warning = quality_warning([*self._runner.curve("validation_psnr_db"), (self._runner.step, psnr)], self.options)
        if warning is not None:
            self._runner.say(warning)

    def describe(self) -> str:
        """Say what is about to happen, for the report before step 1."""
        options, count = self.options, sum(parameter.numel() for parameter in self.discriminator.parameters())
        enters = options.start + options.warmup_steps
        text = (
            f"gan: {options.dimensions}-D patch discriminator, parameters: {count:,}, lr {options.lr:.2e}; it trains after step "
            f"{options.start} and reaches the tokenizer after step {enters}, fully at {enters + options.ramp_steps}"
        )
        horizon, minutes = self._runner.planned_steps or self._runner.options.max_steps, self._runner.options.max_minutes
        if horizon is not None and horizon <= enters:
            return f"{text} (never: this run ends at {horizon})"
        is_open = minutes is not None and self._runner.planned_steps is None
        return text + (f" (never, should no more steps fit into {minutes} minutes)" if is_open else "")

    def _discriminator_loss(self, network: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        options, module = self.options, self.discriminator
        # One pass over both: a second one would meet buffers that the first has moved, and several processes allow one only.
        clips = torch.cat(pair).requires_grad_(options.r1_weight > 0)
        # A second derivative is too rough in 16 bits.
        with torch.autocast(clips.device.type, enabled=False) if options.r1_weight else nullcontext():
            real, fake = network(clips).float().chunk(2)
        loss = hinge = hinge_loss(real, fake)
        logs = {"hinge": hinge, "real_score": real.mean(), "fake_score": fake.mean()}
        if options.lecam_weight:
            logs["lecam"] = lecam_penalty(real, fake, module.real_mean.clone(), module.fake_mean.clone())
            loss = loss + options.lecam_weight * logs["lecam"]
            for mean, scores in ((module.real_mean, real), (module.fake_mean, fake)):
                mean.lerp_(averaged(scores.mean()), 1 - LECAM_DECAY)
        if options.r1_weight:
            logs["r1"] = r1_penalty(real, clips)
            loss = loss + options.r1_weight * logs["r1"]
        return loss, logs


@contextmanager
def _held_still(module: nn.Module) -> Iterator[None]:
    """Let a loss pass through a module that must not learn from it, nor move its buffers."""
    mode = module.training
    module.requires_grad_(False).eval()
    try:
        yield
    finally:
        module.requires_grad_(True).train(mode)
