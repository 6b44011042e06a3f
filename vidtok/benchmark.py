"""Speed, arithmetic and memory of a tokenizer, its variants side by side, against the rate at which the machine convolves."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vidtok.compiling import compiling
from vidtok.config import VidTokConfig
from vidtok.folders import OutputFolder, load_model
from vidtok.health.seams import Coder
from vidtok.measuring import Call, convolution_flops, convolutions, count_flops, measure, peak_bytes, speed_up, spread
from vidtok.model import VidTokModel
from vidtok.options import BenchTokenizerOptions
from vidtok.run.processes import DTYPES

PARTS = ("encode", "decode")
RECORD_FILE = "bench.json"
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Variant:
    """How the same weights are run. channels_last: the memory layout of the convolutions' weights."""

    precision: str
    channels_last: bool
    compile: bool

    @property
    def name(self) -> str:
        """Words for a table."""
        return f"{self.precision} {'NHWC' if self.channels_last else 'NCHW'}" + " compiled" * self.compile


def variants(options: BenchTokenizerOptions) -> list[Variant]:
    """Give the variant that the keys name, then, for each key in `compare`, one that differs from it in that key alone."""
    base = Variant(options.precision, options.channels_last, options.compile)
    others = {
        "precision": replace(base, precision="bf16" if base.precision == "fp32" else "fp32"),
        "channels_last": replace(base, channels_last=not base.channels_last),
        "compile": replace(base, compile=not base.compile),
    }
    return [base, *(others[key] for key in dict.fromkeys(options.compare))]


def bench_tokenizer(options: BenchTokenizerOptions) -> dict[str, Any]:
    """Measure a tokenizer, print a table and write bench.json into options.output, over an earlier bench only; gives what was written.

    Raises FileNotFoundError or ValueError for a tokenizer that cannot be loaded, built or compiled.
    """
    folder = OutputFolder(Path(options.output), RECORD_FILE, re.compile(re.escape(RECORD_FILE)))
    folder.check(())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(options).to(device)
    weights = "random" if options.checkpoint is None else "trained"
    if not model.quantizer.is_filled:
        weights += ", codebook of noise"
        _fill_codebook(model)
    video = _noise((options.batch_size, 3, options.frames, *options.size)).to(device)
    compared = variants(options)
    result = {"weights": weights, **_describe(options, model, video)}
    flops = {part: result[f"{part}_flops_per_frame"] for part in PARTS}
    with compiling("tokenizer"):
        result |= _time(model, video, compared, options.repeats, flops)
    result = folder.replace((), result)
    _print(result, folder.path / RECORD_FILE)
    return result


def _load(options: BenchTokenizerOptions) -> VidTokModel:
    if options.checkpoint is not None:
        return load_model(VidTokModel, options.checkpoint)
    torch.manual_seed(0)
    return VidTokModel(VidTokConfig(**options.tokenizer)).eval()


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0)) * 2 - 1


def _fill_codebook(model: VidTokModel) -> None:
    """Give a codebook that is made from data something to be made from: an untrained one has no codes to encode with."""
    side = 16 * model.config.stride_s
    with torch.no_grad():
        model.train()(_noise((4, 3, 1 + model.config.stride_t, side, side)).to(model.device))
    model.eval()


def _prepared(model: VidTokModel, variant: Variant) -> VidTokModel:
    """Copy the model, because two layouts of its weights cannot be held at once."""
    own = copy.deepcopy(model).to(memory_format=torch.channels_last if variant.channels_last else torch.contiguous_format)
    if variant.compile:
        own.encoder.compile()
        own.decoder.compile()
    return own


def _calls(model: VidTokModel, precision: str, video: Tensor) -> dict[str, Call]:
    coder = Coder(model)

    def encode() -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return coder.encode(video)

    codes = encode()

    def decode() -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return coder.decode(codes, video)

    return {"encode": encode, "decode": decode}


def _describe(options: BenchTokenizerOptions, model: VidTokModel, video: Tensor) -> dict[str, Any]:
    """Give what no clock is needed for."""
    calls, known = _calls(model, "fp32", video), [video, *model.parameters(), *model.buffers()]
    frames = options.batch_size * options.frames
    cuda = video.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(video.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch_version": torch.__version__,
        **{name: getattr(options, name) for name in ("batch_size", "frames", "size", "repeats")},
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()},
        **{f"{part}_flops_per_frame": count_flops(call) / frames for part, call in calls.items()},
        **{f"{part}_fp32_peak_tensors_mebibytes": peak_bytes(call, known) / MEBIBYTE for part, call in calls.items()},
    }


def _time(
    model: VidTokModel, video: Tensor, compared: Sequence[Variant], repeats: int, flops: Mapping[str, float]
) -> dict[str, Any]:
    """Give the figures of all variants and the rate of the machine's convolution, measured in turn; flops: of a frame, by part."""
    frames = video.shape[0] * video.shape[2]
    calls: dict[Any, Call] = {
        (variant, part): call
        for variant in compared
        for part, call in _calls(_prepared(model, variant), variant.precision, video).items()
    }
    machine = {
        (precision, layout): call
        for precision in dict.fromkeys(variant.precision for variant in compared)
        for layout, call in convolutions(DTYPES[precision], video.device).items()
    }
    seconds = measure(calls | machine, repeats, video.device)
    # Of the two memory layouts the faster one is what the machine can do.
    best = {name[0]: seconds[name] for name in sorted(machine, key=lambda name: median(seconds[name]), reverse=True)}
    large = convolution_flops(video.device)
    rows = []
    for variant in compared:
        row = {"variant": variant.name, **asdict(variant)}
        for part in PARTS:
            taken = seconds[variant, part]
            row[f"{part}_frames_per_second"] = frames / median(taken)
            row[f"{part}_spread_of_quartiles"] = spread(taken)
            row[f"{part}_speed_up"] = speed_up(seconds[compared[0], part], taken)
            row[f"{part}_share_of_convolution_rate"] = frames * flops[part] / large * speed_up(best[variant.precision], taken)
        rows.append(row)
    return {"convolution_flops_per_second": {name: large / median(taken) for name, taken in best.items()}, "rows": rows}


def _print(result: Mapping[str, Any], path: Path) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for part in PARTS:
        for heading in (f"{part} f/s", "±", "ratio", "conv"):
            table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        cells = [row["variant"]]
        for part in PARTS:
            cells += [f"{row[f'{part}_frames_per_second']:.1f}", f"{row[f'{part}_spread_of_quartiles']:.0%}"]
            cells += [f"{row[f'{part}_speed_up']:.2f}", f"{row[f'{part}_share_of_convolution_rate']:.0%}"]
        table.add_row(*cells)
    parameters = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items() if count)
    height, width = result["size"]
    print(f"{result['device']}; {result['batch_size']} x {result['frames']} frames of {height}x{width}")
    print(f"weights: {result['weights']}; parameters: {parameters}")
    for part in PARTS:
        peak = result[f"{part}_fp32_peak_tensors_mebibytes"]
        print(f"{part}: {result[f'{part}_flops_per_frame'] / 1e6:.1f} MFLOP a frame, {peak:.1f} MiB of tensors at most in fp32")
    rates = [f"{rate / 1e9:.1f} GFLOP/s in {precision}" for precision, rate in result["convolution_flops_per_second"].items()]
    print(f"a large 3x3 convolution of this machine: {', '.join(rates)}")
    Console().print(table)
    print(
        "f/s: frames a second; ±: between quartiles; ratio: to the first row; conv: share of the convolution's rate; NHWC: channels_last"
    )
    print(f"all figures are in {path}")
