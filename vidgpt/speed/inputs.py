"""What vidgpt-bench measures: a trained transformer or a preset with fresh weights, and the clips that it goes on from."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from vidgpt.checkpoint import load_checkpoint
from vidgpt.config import VidGPTConfig
from vidgpt.finetuning import config_for
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import BenchOptions
from vidgpt.rollout import Predictor
from vidtok.card import CARD_FILE, Card
from vidtok.run.sampler import spread
from vidtok.tokens import TokenDataset, longest_row

SPLIT = "validation"


@dataclass(frozen=True)
class Subject:
    """A transformer to measure. tokens: the data set it is measured on; predictor: where its tokenizer is there too."""

    model: VidGPTForCausalLM
    weights: str
    tokens: str | None
    predictor: Predictor | None = None


@dataclass(frozen=True)
class Clips:
    """Whole windows, context and future, of which each round takes other ones."""

    indices: Tensor  # (rounds, B, t, h, w)
    actions: Tensor | None  # (rounds, B, t)
    source: str
    is_real: bool

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Give the indices (B, t, h, w) of a round, and its actions (B, t) where there are any."""
        return self.indices[number], None if self.actions is None else self.actions[number]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor | None]]:
        """Give all rounds."""
        return [self.batch(number) for number in range(len(self.indices))]


def load_subject(options: BenchOptions) -> Subject:
    """Load or build the transformer, on CUDA when there is one; tells what is left out, and why.

    Raises FileNotFoundError or ValueError for a folder that cannot be loaded, a wrong preset, and tokens of another tokenizer.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.checkpoint is None:
        torch.manual_seed(0)
        model = VidGPTForCausalLM(_fresh_config(options)).eval().to(device)
        return Subject(model, "fresh, so its ids mean nothing", options.tokens)
    tokens = options.tokens or _trained_on(options.checkpoint)
    model = load_checkpoint(options.checkpoint, tokens)[0].to(device)
    return Subject(model, f"of {options.checkpoint}", tokens, _predictor(options.checkpoint) if tokens else None)


def load_clips(subject: Subject, options: BenchOptions) -> Clips:
    """Give held-out windows, evenly spread over the data set, or noise. Raises ValueError where no held-out clip is long enough."""
    layout, frames = subject.model.model.layout, options.context + options.future
    shape = (options.rounds, options.batch_size, frames)
    if subject.tokens is None:
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(layout.codebook_size, (*shape, layout.height, layout.width), generator=generator)
        actions = torch.randint(max(1, layout.num_actions), shape, generator=generator)
        return Clips(indices, actions if layout.num_actions else None, "noise", is_real=False)
    longest = longest_row(subject.tokens, SPLIT)
    if longest < frames:
        raise ValueError(
            f"context={options.context} and future={options.future} make clips of {frames} latent frames, the longest held-out one of "
            f"{subject.tokens} has {longest}: give smaller numbers, or tokens of longer clips"
        )
    windows = spread(TokenDataset(subject.tokens, SPLIT, frames), options.rounds * options.batch_size)
    items = [windows[number % len(windows)] for number in range(options.rounds * options.batch_size)]
    indices, actions = (torch.stack([item[key] for item in items]).unflatten(0, shape[:2]) for key in ("indices", "actions"))
    return Clips(indices, actions if layout.num_actions else None, f"held-out clips of {subject.tokens}", is_real=True)


def _fresh_config(options: BenchOptions) -> VidGPTConfig:
    frames = options.context + options.future
    sizes = {**options.model, "window": options.model.get("window") or frames}
    return VidGPTConfig(**sizes) if options.tokens is None else config_for(Card.load(options.tokens), sizes)


def _trained_on(checkpoint: str) -> str | None:
    """Name the token dataset that a run folder was trained on, where it is still there."""
    file = Path(checkpoint).expanduser() / "config.yaml"
    if not file.is_file():
        return None
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    tokens = values.get("tokens") if isinstance(values, dict) else None
    return tokens if isinstance(tokens, str) and (Path(tokens).expanduser() / CARD_FILE).is_file() else None


def _predictor(checkpoint: str) -> Predictor | None:
    try:
        return Predictor.from_pretrained(checkpoint)
    except ValueError as error:
        # The speed of a transformer needs no tokenizer.
        print(f"PSNR is left out: {error}", flush=True)
        return None
