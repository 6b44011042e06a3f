"""Speed, memory and fidelity of the decoding plans side by side, transformers' generate first, and what transforms of weights cost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import LongOptions, check_future, unlike_training
from vidgpt.options import BenchOptions
from vidgpt.rollout import Predictor
from vidgpt.speed.inputs import Clips, Subject, load_clips, load_subject
from vidgpt.speed.timing import ARRAY_BYTES, MEBIBYTE, Runs, speed_row, timed, triad
from vidgpt.speed.transforms import Transforms, cross_entropy
from vidtok.folders import OutputFolder

RECORD_FILE = "bench.json"
TRANSFORMS = ("precision", "compile", "int8", "prune", "cache_dtype")
WIDTH = 118


def bench_gpt(options: BenchOptions) -> dict[str, Any]:
    """Measure the plans, print a table and write bench.json into options.output, over an earlier bench only; gives what was written.

    Raises FileNotFoundError or ValueError, before any work where it can: for what cannot be loaded, decoded or compiled.
    """
    folder = OutputFolder(Path(options.output), RECORD_FILE, re.compile(re.escape(RECORD_FILE)))
    folder.check((), checkpoint=options.checkpoint, tokens=options.tokens)
    plans = _plans(options)
    transforms = Transforms(**{name: getattr(options, name) for name in TRANSFORMS})
    with _threads(options.threads):
        subject = load_subject(options)
        if subject.model.model.layout.is_parallel and "transformers" in plans:
            print("transformers' generate is left out: it draws one id a place, and this model predicts several digits at once")
            del plans["transformers"]
        _check_window(options, subject.model.config.window)
        for plan in plans.values():
            check_future(subject.model.config, [options.context], options.future, plan, LongOptions())
            if options.checkpoint is not None and (told := unlike_training(subject.model.config, plan)):
                print(told)
        clips = load_clips(subject, options)
        result = _describe(options, subject, clips) | _measure(subject, clips, plans, transforms, options)
    result = folder.replace((), result)
    _print(result, folder.path / RECORD_FILE)
    return result


def _plans(options: BenchOptions) -> dict[str, DecodingOptions]:
    """Give the plans by name, transformers' generate first. Raises ValueError for an unknown one."""
    names = sorted(options.decoding, key=lambda name: name != "transformers")
    return {name: DecodingOptions.from_keys(name, options.diagonal, options.speculative) for name in names}


def _check_window(options: BenchOptions, window: int) -> None:
    """Raise ValueError, with advice that this command knows, for rollouts that leave the window."""
    if options.context + options.future > window:
        larger = ", or a larger model.window" if options.checkpoint is None else ""
        raise ValueError(
            f"context={options.context} and future={options.future} exceed the window of {window} latent frames: give fewer, together "
            f"{window} or less{larger}"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count or former)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _describe(options: BenchOptions, subject: Subject, clips: Clips) -> dict[str, Any]:
    """Give what no clock is needed for."""
    model, context = subject.model, options.context
    before, real = clips.indices[:, :, context - 1 : context], clips.indices[:, :, context:]
    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch_version": torch.__version__,
        "weights": subject.weights,
        "parameters": model.num_parameters(),
        "clips": clips.source,
        "copy_of_last_frame_accuracy_fraction": float((before == real).double().mean()) if clips.is_real else None,
        **{name: value for name, value in asdict(options).items() if name not in ("model", "output")},
    }


def _measure(
    subject: Subject, clips: Clips, plans: Mapping[str, DecodingOptions], transforms: Transforms, options: BenchOptions
) -> dict[str, Any]:
    """Time all rows in turn, round by round, each round on other clips; then compare what they gave."""
    fused, device = transforms.apply(subject.model), subject.model.device
    rows = {
        name: Runs(transforms.reference(subject.model) if name == "transformers" else fused, plan) for name, plan in plans.items()
    }
    others = {name: Runs(each.apply(subject.model), DecodingOptions()) for name, each in transforms.each().items()}
    if others:
        others = {"as it is": Runs(Transforms().apply(subject.model), DecodingOptions()), **others}
        if len(others) > 2:
            others["all of these"] = Runs(fused, DecodingOptions())
    stream, taken = triad(ARRAY_BYTES, device), []
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=1 + options.rounds)
        for runs in (*rows.values(), *others.values()):
            # What is compiled may be compiled again when sizes change.
            for number in range(1 + options.compile):
                _run(runs, clips, number % options.rounds, options)
            runs.forget()
        stream()
        for number in range(options.rounds):
            progress.advance(task)
            taken.append(timed(stream, device)[1])
            for runs in (*rows.values(), *others.values()):
                _run(runs, clips, number, options)
    bandwidth = 3 * ARRAY_BYTES / median(taken)
    base, fidelity = next(iter(rows.values())), _Fidelity(rows, clips, subject.predictor, options)
    return {
        "memory_bytes_per_second": bandwidth,
        "rows": [speed_row(runs, base, options.context, bandwidth) | fidelity.row(runs) for runs in rows.values()],
        "transforms": _transforms(others, clips, options, bandwidth),
    }


def _run(runs: Runs, clips: Clips, number: int, options: BenchOptions) -> None:
    indices, actions = clips.batch(number)
    runs.run(indices[:, : options.context], options.future, actions)


class _Fidelity:
    """Compare the ids of rows with raster's, and with the real ones where there are any."""

    def __init__(self, rows: Mapping[str, Runs], clips: Clips, predictor: Predictor | None, options: BenchOptions) -> None:
        self.raster = torch.stack(rows["raster"].ids) if "raster" in rows else None
        self.context, self.real = clips.indices.split([options.context, options.future], dim=2)
        self.is_real, self.predictor = clips.is_real, predictor
        self.shown: Tensor | None = None

    def row(self, runs: Runs) -> dict[str, float | None]:
        """Give shares of ids, and, of the decoded frames, the PSNR of the pooled error; None where there is nothing to compare with."""
        ids = torch.stack(runs.ids)
        return {
            "ids_equal_to_raster_fraction": None if self.raster is None else float((ids == self.raster).double().mean()),
            "token_accuracy_fraction": float((ids == self.real).double().mean()) if self.is_real else None,
            "psnr_db": self._psnr(ids),
        }

    @torch.no_grad()
    def _psnr(self, ids: Tensor) -> float | None:
        if self.predictor is None or not self.is_real:
            return None
        if self.shown is None:
            self.shown = self._show(self.real)
        error = float((self._show(ids) - self.shown).double().square().mean())
        return 10 * math.log10(4 / error) if error else None

    def _show(self, ids: Tensor) -> Tensor:
        """Give the frames (rounds, B, 3, T, H, W) that ids (rounds, B, t, h, w) show after the contexts."""
        assert self.predictor is not None
        predictor, future = self.predictor, ids.shape[2] * self.predictor.card.stride_t
        pairs = zip(self.context.to(predictor.device), ids.to(predictor.device), strict=True)
        return torch.stack([predictor.show(given, predicted, future).cpu() for given, predicted in pairs])


def _transforms(others: Mapping[str, Runs], clips: Clips, options: BenchOptions, bandwidth: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, runs in others.items():
        row = {"transform": name, **speed_row(runs, others["as it is"], options.context, bandwidth)}
        row["cross_entropy_nats_per_token"] = cross_entropy(runs.model, clips.batches)
        first = rows[0] if rows else row
        row["cross_entropy_change_nats_per_token"] = row["cross_entropy_nats_per_token"] - first["cross_entropy_nats_per_token"]
        rows.append(row)
    return rows


def _print(result: Mapping[str, Any], path: Path) -> None:
    batch, context, future = (result[name] for name in ("batch_size", "context", "future"))
    print(f"{result['device']}; {batch} x {future} latent frames after {context}, greedy, from {result['clips']}")
    print(f"weights: {result['weights']}; {result['parameters']:,} parameters, {result['precision']}")
    print(f"memory: {result['memory_bytes_per_second'] / 1e9:.1f} GB/s in a triad over 3 x {ARRAY_BYTES // MEBIBYTE} MiB")
    console = Console(width=max(WIDTH, Console().width))
    console.print(_table(result["rows"], "decoding", _PLAN_COLUMNS))
    print(
        "passes: forward passes a frame; accept: guesses kept; prefill: ms for the context; ms/f: to decode a frame; ratio: of tokens/s "
        "to the first row's; ±: between quartiles; read: bytes a second of weights and cache that decoding must read, as a share of the "
        "triad's; = raster, right: tokens that are raster's, the real ones; PSNR: against the real tokens, both decoded"
    )
    if any(row["share_of_memory_bandwidth"] > 1 for row in result["rows"]):
        print("more than 100 % read: weights and cache stay in the processor's own cache")
    if any(row["decoding"] == "transformers" for row in result["rows"]) and (
        result["compile"] or result["int8"] or result["cache_dtype"]
    ):
        print("transformers' generate runs as the library has it: neither compiled nor with int8")
    for line in (*_losses(result), *_warnings(result)):
        print(line)
    if result["transforms"]:
        console.print(_table(result["transforms"], "transform", _TRANSFORM_COLUMNS))
        print("each alone, decoding=raster; nats: teacher-forced cross-entropy a token, and its change")
        if result["prune"]:
            print("zeros are read and multiplied like other numbers: pruning costs nats and gains no time here")
    print(f"all figures are in {path}")


_PLAN_COLUMNS = {
    "tok/s": ("tokens_per_second", "{:.0f}"),
    "f/s": ("frames_per_second", "{:.2f}"),
    "passes": ("forward_passes_per_frame", "{:.1f}"),
    "accept": ("drafts_accepted_fraction", "{:.0%}"),
    "prefill": ("prefill_milliseconds", "{:.1f}"),
    "ms/f": ("decode_milliseconds_per_frame", "{:.1f}"),
    "ratio": ("speed_up", "{:.2f}"),
    "±": ("spread_of_quartiles", "{:.0%}"),
    "cache MiB": ("cache_mebibytes", "{:.1f}"),
    "read": ("share_of_memory_bandwidth", "{:.0%}"),
    "= raster": ("ids_equal_to_raster_fraction", "{:.1%}"),
    "right": ("token_accuracy_fraction", "{:.1%}"),
    "PSNR": ("psnr_db", "{:.2f}"),
}
_TRANSFORM_COLUMNS = {
    "tok/s": ("tokens_per_second", "{:.0f}"),
    "ratio": ("speed_up", "{:.2f}"),
    "±": ("spread_of_quartiles", "{:.0%}"),
    "weights MiB": ("weights_read_mebibytes", "{:.1f}"),
    "cache MiB": ("cache_mebibytes", "{:.1f}"),
    "nats": ("cross_entropy_nats_per_token", "{:.4f}"),
    "change": ("cross_entropy_change_nats_per_token", "{:+.4f}"),
}


def _table(rows: Sequence[Mapping[str, Any]], name: str, columns: Mapping[str, tuple[str, str]]) -> Table:
    """Lay out rows; a column in which no row has a figure is left out."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    shown = {heading: column for heading, column in columns.items() if any(row[column[0]] is not None for row in rows)}
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row[name], *("" if row[key] is None else form.format(row[key]) for key, form in shown.values()))
    return table


def _losses(result: Mapping[str, Any]) -> Iterator[str]:
    """Say what a plan that gives other ids than raster loses."""
    rows = {row["decoding"]: row for row in result["rows"]}
    if result["copy_of_last_frame_accuracy_fraction"] is None or not {"raster", "diagonal"} <= rows.keys():
        return
    diagonal, raster = rows["diagonal"], rows["raster"]
    lost = f"{100 * (diagonal['token_accuracy_fraction'] - raster['token_accuracy_fraction']):+.1f} points of tokens right"
    if diagonal["psnr_db"] is not None and raster["psnr_db"] is not None:
        lost += f", {diagonal['psnr_db'] - raster['psnr_db']:+.2f} dB"
    copied = result["copy_of_last_frame_accuracy_fraction"]
    yield f"diagonal against raster: {lost}; copies of the last given frame have {copied:.1%} right"


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    if result["copy_of_last_frame_accuracy_fraction"] is None:
        yield "noise is no video: speculative's acceptance and speed are of no meaning here; give tokens=DIR"
    elif result["checkpoint"] is None:
        yield "fresh weights know no video: speculative's acceptance and what is right are of no meaning here; give checkpoint=DIR"
