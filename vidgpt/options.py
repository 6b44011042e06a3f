"""Options of the vidgpt commands. Light to import, so that `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vidtok.options import EncodeOptions, TrainTokenizerOptions, check_at_least, check_precision
from vidtok.run_options import RunOptions


@dataclass(frozen=True)
class TrainGPTOptions(RunOptions):
    """Keys of vidgpt-train.

    tokens: a token dataset. use_actions: condition every frame on its recorded action. evaluation_clips: held-out windows.
    init_from: a transformer trained on tokens of the same tokenizer to start from; keys of model= that shape the network must then
    agree with it. diagonal_share: share of the steps that train what decoding=diagonal with this diagonal.window and diagonal.delay
    sees. token_corruption: probability that a token is replaced by a random one where it is read, not where it is predicted.
    action_dropout: probability that a clip is trained without its actions, which guidance needs.
    """

    tokens: str = MISSING
    use_actions: bool = False
    evaluation_clips: int = 64
    init_from: str | None = None
    diagonal_share: float = 0.0
    diagonal_window: int = 1
    diagonal_delay: int = 0
    token_corruption: float = 0.0
    action_dropout: float = 0.0
    model: Any = MISSING

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_at_least(self, evaluation_clips=1, diagonal_window=1, diagonal_delay=0)
        for name in ("diagonal_share", "token_corruption", "action_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give 0 (off) to 1")
        if self.action_dropout and not self.use_actions:
            raise ValueError(f"action_dropout={self.action_dropout} has no actions to leave out: give use_actions=true too")


@dataclass(frozen=True)
class SamplingKeys:
    """How to draw tokens; temperature 0 takes the likeliest; frame_factor multiplies it with every frame drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frame_factor: float = 1.0


@dataclass(frozen=True)
class DiagonalKeys:
    """Keys of decoding=diagonal; see vidgpt.decoding.DecodingOptions."""

    window: int = 1
    delay: int = 0


@dataclass(frozen=True)
class SpeculativeKeys:
    """Keys of decoding=speculative; see vidgpt.decoding.speculative."""

    draft: str = "own"
    draft_length: int = 0


@dataclass(frozen=True)
class LongKeys:
    """Beyond the window: mode is stop, reprefill or window; drop frames at a time, 0 is half the window."""

    mode: str = "stop"
    drop: int = 0


@dataclass(frozen=True)
class PredictOptions:
    """Keys of vidgpt-predict.

    decoding: raster, speculative (the same ids, in fewer passes), diagonal (fewer still, other ids) or transformers (its generate).
    guidance: above 1, follow the actions more than the model does by itself. precision: fp32 or bf16. compile: use torch.compile.
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
    diagonal: DiagonalKeys = field(default_factory=DiagonalKeys)
    speculative: SpeculativeKeys = field(default_factory=SpeculativeKeys)
    long: LongKeys = field(default_factory=LongKeys)
    guidance: float = 1.0
    precision: str = "fp32"
    compile: bool = False
    start: float | None = None
    actions: str | None = None
    allow_torchscript: bool = False
    sampling: SamplingKeys = field(default_factory=SamplingKeys)

    def __post_init__(self) -> None:
        """Refuse what no prediction can have."""
        check_at_least(self, context=1, future=1, samples=1)
        check_precision(self.precision, "fp32", "bf16")


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
class VerifyOptions:
    """Keys of vidgpt-verify.

    device: cpu or cuda; null takes CUDA when there is one. frames: latent frames a clip, half of them given; at most the window.
    tokens: a token dataset to take clips of, null takes random ids. seed: of random ids, of where prefills are split and of samples.
    """

    checkpoint: str = MISSING
    device: str | None = None
    tokens: str | None = None
    clips: int = 3
    frames: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what nothing can be seen on."""
        check_at_least(self, clips=1, frames=2)


@dataclass(frozen=True)
class BenchOptions:
    """Keys of vidgpt-bench.

    checkpoint: a trained transformer; or else model, a preset, which is measured with fresh weights. tokens: token dataset of whose
    held-out clips windows are predicted; null takes those that the checkpoint was trained on, where they are still there, else noise.
    decoding: plans, a row each. batch_size, context, future: latent frames of the clips, new ones every round. threads: null takes
    torch's own number.
    precision (fp32 or bf16), compile, int8 (weights), prune (share of weights set to zero), cache_dtype (null or int8): how it runs.
    """

    checkpoint: str | None = None
    model: Any = None
    tokens: str | None = None
    output: str = "runs/bench"
    decoding: list[str] = field(default_factory=lambda: ["transformers", "raster", "speculative", "diagonal"])
    diagonal: DiagonalKeys = field(default_factory=DiagonalKeys)
    speculative: SpeculativeKeys = field(default_factory=SpeculativeKeys)
    batch_size: int = 1
    context: int = 8
    future: int = 16
    rounds: int = 5
    threads: int | None = None
    precision: str = "fp32"
    compile: bool = False
    int8: bool = False
    prune: float = 0.0
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_at_least(self, batch_size=1, context=1, future=1, rounds=1, threads=1)
        if (self.checkpoint is None) == (self.model is None):
            found = "neither" if self.checkpoint is None else "both"
            raise ValueError(f"{found} of checkpoint and model is given: give checkpoint=DIR or model=small, one of the two")
        if not self.decoding or len(set(self.decoding)) < len(self.decoding):
            raise ValueError(
                f"decoding={list(self.decoding)} must name each plan once: for example decoding=[transformers,raster]"
            )
        check_precision(self.precision, "fp32", "bf16")
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune={self.prune} is not allowed: give 0 (off) or the share of weights to set to zero, below 1")
        if self.cache_dtype not in (None, "int8"):
            raise ValueError(f"cache_dtype={self.cache_dtype} is not known: give int8, or null to keep the cache as the weights")


@dataclass(frozen=True)
class ExportOptions:
    """Keys of vidgpt-export."""

    checkpoint: str = MISSING
    output: str = MISSING


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
