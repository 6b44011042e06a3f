"""Options of the vidgpt commands. Light to import, so that `--help` stays fast."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from vidtok.options import EncodeOptions, TrainTokenizerOptions, check_at_least, check_precision
from vidtok.run_options import RunOptions, check_trackers


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless a value is a probability."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not allowed: give 0 (off) to 1")


@dataclass(frozen=True)
class DiagonalTrainingKeys:
    """Training for decoding=diagonal, in `share` of the steps; window, delay: as it will decode."""

    share: float = 0.0
    window: int = 1
    delay: int = 0

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_share("diagonal.share", self.share)
        if self.window < 1 or self.delay < 0:
            raise ValueError(
                f"diagonal.window={self.window} and diagonal.delay={self.delay} are not allowed: give a window of 1 or more and a delay "
                "of 0 or more"
            )


@dataclass(frozen=True)
class TrainGPTOptions(RunOptions):
    """Keys of vidgpt-train.

    tokens: a token dataset. use_actions: condition every frame on its recorded action. evaluation_clips: held-out windows.
    init_from: a transformer trained on tokens of the same tokenizer to start from; keys of model= that shape the network must then
    agree with it. diagonal: train what decoding=diagonal sees. token_corruption: probability that a token is replaced by a random one
    where it is read, not where it is predicted. action_dropout: probability that a clip is trained without its actions, which guidance
    needs. train_only=draft_head leaves the transformer of init_from as it is, and trains the head that guesses for decoding=speculative.
    """

    tokens: str = MISSING
    use_actions: bool = False
    evaluation_clips: int = 64
    init_from: str | None = None
    train_only: str | None = None
    diagonal: DiagonalTrainingKeys = field(default_factory=DiagonalTrainingKeys)
    token_corruption: float = 0.0
    action_dropout: float = 0.0
    model: Any = MISSING

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_at_least(self, evaluation_clips=1)
        check_trackers(self.trackers)
        if self.train_only not in (None, "draft_head"):
            raise ValueError(
                f"train_only={self.train_only} is not known: give draft_head, or null to train the whole transformer"
            )
        if self.train_only is not None and self.init_from is None:
            raise ValueError("train_only=draft_head keeps a transformer that is trained already: say which with init_from=DIR")
        if self.train_only is not None and self.diagonal.share:
            raise ValueError(
                "train_only=draft_head leaves the transformer as it is, and diagonal.share would train it: leave one of them out"
            )
        for name in ("token_corruption", "action_dropout"):
            check_share(name, getattr(self, name))
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

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        given = [key for key in changed_keys("sampling", self) if not key.startswith("sampling.temperature=")]
        if given and self.temperature == 0:
            raise ValueError(
                f"{given[0]} changes nothing at sampling.temperature=0, which takes the likeliest token: give a temperature above 0, or "
                "leave that key away"
            )


def changed_keys(group: str, keys: Any) -> list[str]:
    """Give group.key=value of every key of an options dataclass that is not at its default."""
    values = {option.name: getattr(keys, option.name) for option in fields(keys) if getattr(keys, option.name) != option.default}
    return [f"{group}.{name}={value}" for name, value in values.items()]


def check_keys_of_plans(plans: Sequence[str], **groups: Any) -> None:
    """Raise ValueError for a key of a decoding plan that was not chosen; groups: the keys of each plan that has any."""
    for plan, keys in groups.items():
        if plan not in plans and (given := changed_keys(plan, keys)):
            raise ValueError(
                f"{given[0]} is for decoding={plan}, and decoding={','.join(plans)} came: choose that, or leave the key away"
            )


@dataclass(frozen=True)
class DiagonalKeys:
    """Keys of decoding=diagonal; see vidgpt.decoding.DecodingOptions."""

    window: int = 1
    delay: int = 0


@dataclass(frozen=True)
class SpeculativeKeys:
    """Keys of decoding=speculative; see vidgpt.decoding.speculative."""

    draft: str = "auto"
    draft_length: int = 0


@dataclass(frozen=True)
class LongKeys:
    """Beyond the window: mode is stop, reprefill or window; drop frames at a time, 0 is half the window."""

    mode: str = "stop"
    drop: int = 0

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        if self.drop and self.mode != "reprefill":
            raise ValueError(
                f"long.drop={self.drop} is for long.mode=reprefill, and long.mode={self.mode} came: leave one of them away"
            )


@dataclass(frozen=True)
class PredictOptions:
    """Keys of vidgpt-predict.

    decoding: raster, speculative (the same ids, in fewer passes), diagonal (fewer still, other ids) or transformers (its generate).
    A key of another plan than the one chosen is refused.
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
        check_keys_of_plans([self.decoding], diagonal=self.diagonal, speculative=self.speculative)


@dataclass(frozen=True)
class EvaluateOptions:
    """Keys of vidgpt-evaluate.

    clips: windows of the split, spread evenly. temporally_forced: also let the model draw each of their frames from the real ones before
    it. context: latent frames given to the free-running part. rollout_clips: clips it predicts, 0 leaves that part out. resamples: of
    the episodes that clips were cut from, for confidence intervals.
    pixels: also decode the free-running part and compare frames, with those of data= (the keys of vidtok-encode) or, without it, with the
    tokenizer's reconstruction. samples: futures a clip, of which the mean and the best are told apart. optical_flow: false leaves
    out motion, warping error and interpolation along the flow, the slow ones. vmaf: needs the extra of that name.
    lpips_weights, lpips_heads, lpips_sha256: as loss.lpips_* of vidtok-train. fvd_detector: TorchScript file of a video network, with
    fvd_sha256, 8 digits or more; it runs what is in the file. shown_clips: in the report, the worst and the best.
    allow_torchscript: may the checkpoint's tokenizer run its code, where it is TorchScript?
    """

    checkpoint: str = MISSING
    tokens: str = MISSING
    output: str = MISSING
    split: str = "validation"
    clips: int = 64
    temporally_forced: bool = True
    rollout_clips: int = 64
    context: int = 8
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 0
    sampling: SamplingKeys = field(default_factory=lambda: SamplingKeys(temperature=0.0))
    pixels: bool = False
    samples: int = 1
    optical_flow: bool = True
    vmaf: bool = False
    lpips_weights: str | None = None
    lpips_heads: str | None = None
    lpips_sha256: str | None = None
    fvd_detector: str | None = None
    fvd_sha256: str | None = None
    shown_clips: int = 4
    allow_torchscript: bool = False
    data: Any = None

    def __post_init__(self) -> None:
        """Refuse what no evaluation can have."""
        check_at_least(self, clips=1, rollout_clips=0, context=1, batch_size=1, resamples=1, samples=1, shown_clips=0)
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples={self.samples} would all be one, because sampling.temperature=0 takes the likeliest token: give a "
                "sampling.temperature above 0, or samples=1"
            )
        names = ("vmaf", "lpips_weights", "fvd_detector", "data", "allow_torchscript")
        needing = [f"{name}=" for name in names if getattr(self, name)] + ["samples="] * (self.samples > 1)
        needing += ["optical_flow="] * (not self.optical_flow)
        if needing and not self.pixels:
            raise ValueError(f"{needing[0]} is for the comparison of frames: give pixels=true too, or leave it away")
        if self.pixels and not self.rollout_clips:
            raise ValueError(
                "pixels=true shows the free-running part, which rollout_clips=0 leaves out: give rollout_clips=1 or more"
            )
        if self.fvd_detector is not None and not self.fvd_sha256:
            raise ValueError(
                f"fvd_detector={self.fvd_detector} is a file whose code is run: give the checksum of the one you trust, fvd_sha256=..."
            )


@dataclass(frozen=True)
class VerifyOptions:
    """Keys of vidgpt-verify.

    device: cpu or cuda; null takes CUDA when there is one. frames: latent frames a clip, half of them given; at most the window.
    tokens: a token dataset to take clips of, null takes random ids. seed: of random ids, of where prefills are split and of samples.
    precision: fp32 or bf16, in which decoding computes; what it is compared with computes in fp32.
    """

    checkpoint: str = MISSING
    device: str | None = None
    tokens: str | None = None
    clips: int = 3
    frames: int = 4
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse what nothing can be seen on."""
        check_at_least(self, clips=1, frames=2)
        check_precision(self.precision, "fp32", "bf16")


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
        check_keys_of_plans(self.decoding, diagonal=self.diagonal, speculative=self.speculative)
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
    """Keys of vidgpt-demo: the keys of its stages under their names, and how many held-out clips the report shows and measures.

    protocol: values that no key of an experiment may contradict.
    """

    run_dir: str = "runs/demo"
    experiment: str | None = None
    budget: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
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
