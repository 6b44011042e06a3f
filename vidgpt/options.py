"""Options of the vidgpt commands. Light to import, so that `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vidtok.options import EncodeOptions, TrainTokenizerOptions, check_at_least
from vidtok.run_options import RunOptions


@dataclass(frozen=True)
class TrainGPTOptions(RunOptions):
    """Keys of vidgpt-train.

    tokens: a token dataset. use_actions: condition every frame on its recorded action. evaluation_clips: held-out windows.
    """

    tokens: str = MISSING
    use_actions: bool = False
    evaluation_clips: int = 64
    model: Any = MISSING

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_at_least(self, evaluation_clips=1)


@dataclass(frozen=True)
class SamplingKeys:
    """How to draw tokens; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class PredictOptions:
    """Keys of vidgpt-predict.

    context, future: frames at the model's rate. start: seconds into the input where the context begins; null takes the last frames.
    actions: a file with one action a latent frame (context and future), for models that know actions.
    allow_torchscript: may the checkpoint's tokenizer run its code, where it is TorchScript?
    decoder: a tokenizer trained with train_only=decoder from the checkpoint's, to decode with; null takes the checkpoint's own.
    """

    checkpoint: str = MISSING
    input: str = MISSING
    output: str = MISSING
    decoder: str | None = None
    context: int = 8
    future: int = 16
    samples: int = 1
    seed: int = 0
    decoding: str = "raster"
    start: float | None = None
    actions: str | None = None
    allow_torchscript: bool = False
    sampling: SamplingKeys = field(default_factory=SamplingKeys)

    def __post_init__(self) -> None:
        """Refuse what no prediction can have."""
        check_at_least(self, context=1, future=1, samples=1)


@dataclass(frozen=True)
class EvaluateOptions:
    """Keys of vidgpt-evaluate.

    clips: windows of the split, spread evenly. context: latent frames given to the free-running part. rollout_clips: clips it predicts,
    0 leaves that part out.
    """

    checkpoint: str = MISSING
    tokens: str = MISSING
    output: str = MISSING
    split: str = "validation"
    clips: int = 64
    rollout_clips: int = 16
    context: int = 8
    batch_size: int = 8
    seed: int = 0
    sampling: SamplingKeys = field(default_factory=lambda: SamplingKeys(temperature=0.0))

    def __post_init__(self) -> None:
        """Refuse what no evaluation can have."""
        check_at_least(self, clips=1, rollout_clips=0, context=1, batch_size=1)


@dataclass(frozen=True)
class DemoOptions:
    """Keys of vidgpt-demo: the keys of its stages under their names, and how many held-out clips the report shows and measures."""

    run_dir: str = "runs/demo"
    seed: int = 0
    context: int = 8
    future: int = 16
    pixel_clips: int = 16
    shown_clips: int = 4
    data: Any = MISSING
    tokenizer: Any = MISSING
    model: Any = MISSING
    tokenizer_training: TrainTokenizerOptions = field(default_factory=TrainTokenizerOptions)
    encoding: EncodeOptions = field(default_factory=EncodeOptions)
    gpt_training: TrainGPTOptions = field(default_factory=TrainGPTOptions)
    evaluation: EvaluateOptions = field(default_factory=EvaluateOptions)
