"""Token metrics of a regime; nothing here knows of pixels, but for how many there are.

Every figure is a sum over tokens, kept in float64 by clip and (frame or place) and divided once at the end, so clips and
batches weigh by their token count. Separators and actions never enter: only picture tokens are scored. A token is one id of a
place, also where a model predicts it in several digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from vidgpt.baselines import Baselines
from vidgpt.calibration import BINS, Calibration, expected_calibration_error
from vidgpt.clip_sums import Bootstrap, ClipSums, Sums, weighted
from vidgpt.counts import TokenCounts
from vidgpt.scores import TokenScores, changed_tokens

__all__ = ["Baselines", "Bootstrap", "Figures", "RolloutMeter", "TokenCounts", "TokenMeter", "changed_tokens", "gap"]

Figures = dict[str, float | int | None]
CALIBRATION = f"expected_calibration_error_{BINS}_bins_fraction"
LOW, HIGH = "_ci95_low", "_ci95_high"
HELD_RESAMPLES = 1 << 18  # rows times resamples at once


def divided(part: Tensor, whole: Tensor) -> Tensor:
    """Divide; NaN (None in a row, null in JSON) where nothing was counted or a part of it is not known."""
    return torch.where(whole > 0, part / whole, math.nan)


def make_rows(
    sums: Sums,
    figures: Callable[[Sums], Sums],
    bounded: Sequence[str] = (),
    bootstrap: Bootstrap | None = None,
    episodes: Sequence[int] = (),
) -> list[Figures]:
    """Turn sums of each clip (clips, n, ...) into n rows of figures, with the bounds of the `bounded` ones where there is a bootstrap.

    episodes: that of each clip, for the bootstrap.
    """
    count = next(iter(sums.values())).shape[1]
    # So many rows at a time that their resamples stay small.
    step = count if bootstrap is None else max(1, HELD_RESAMPLES // bootstrap.resamples)
    rows = []
    for start in range(0, count, max(1, step)):
        part = {name: values[:, start : start + step] for name, values in sums.items()}
        found = figures(weighted(part))
        kept = [name for name in bounded if name in found]
        bounds = None
        if bootstrap is not None:
            alone = figures(part)  # of each clip
            known = torch.stack([~alone[name].isnan() for name in kept], dim=1)
            bounds = bootstrap.interval(episodes, partial(_resampled, part, figures, kept), known)
        if bounds is not None:
            for name, low, high in zip(kept, *bounds, strict=True):
                found |= {name + LOW: low, name + HIGH: high}
        rows += [
            {name: as_number(name, float(values[row])) for name, values in found.items()}
            for row in range(len(found["tokens_count"]))
        ]
    return rows


def _resampled(sums: Sums, figures: Callable[[Sums], Sums], names: Sequence[str], weights: Tensor) -> Tensor:
    """Give figures (R, names, n) of sums of each clip and weights (R, clips)."""
    found = figures(weighted(sums, weights))
    return torch.stack([found[name] for name in names], dim=1)


def rows_by_clip(sums: Sums, figures: Callable[[Sums], Sums]) -> list[Figures]:
    """Turn sums of each clip (clips,) into a row of figures a clip, with the tokens that changed: the weight of accuracy on these.

    Means over clips, weighted by their counts, are the figures of all clips. The perplexity, which has no such mean, and bits, which are
    nats, stay out.
    """

    def of_clips(part: Sums) -> Sums:
        found = figures(part) | {"changed_tokens_count": part["changed"]}
        return {name: found[name] for name in found if name not in ("perplexity_tokens", "cross_entropy_bits_per_token")}

    return make_rows({name: values[None] for name, values in sums.items()}, of_clips)


def as_number(name: str, value: float) -> float | int | None:
    """Give a figure as JSON has it: a count is whole, an unknown one is null."""
    if math.isnan(value):
        return None
    return int(value) if name.endswith("_count") else value


class TokenMeter:
    """Accumulate scores of clips whose past is the real one: teacher-forced, or temporally teacher-forced.

    pixels_per_frame: pixels that a latent frame after the first stands for, where they are known. has_generated: whether frames come
    too, which the model made itself from the real ones before.
    """

    bounded = (
        *("cross_entropy_nats_per_token", "top1_accuracy_fraction", "top5_accuracy_fraction", CALIBRATION),
        *("top1_accuracy_on_changed_tokens_fraction", "generated_accuracy_fraction", "changed_tokens_generated_fraction"),
    )

    def __init__(
        self, grid: tuple[int, int], num_digits: int = 1, pixels_per_frame: int | None = None, has_generated: bool = False
    ) -> None:
        self.tokens_per_frame, self.pixels_per_frame, self.has_generated = math.prod(grid), pixels_per_frame, has_generated
        self.width = grid[1]
        self.digits = [f"digit_{digit}" for digit in range(num_digits)] if num_digits > 1 else []
        fields = [f"{digit}_{field}" for digit in self.digits for field in ("nats", "top1")]
        made = ("generated_hits", "generated_changed") if has_generated else ()
        self.sums = ClipSums(("tokens", "nats", "top1", "top5", "changed", "changed_top1", *made, *fields), grid)
        self.calibration = Calibration(grid)

    def update(
        self,
        scores: TokenScores,
        changed: Tensor,
        first_frame: int = 1,
        generated: dict[str, Tensor] | None = None,
        episodes: Tensor | None = None,
    ) -> None:
        """Add scores of B clips; changed: bool (B, t, h, w), see changed_tokens; first_frame: the clip's frame they begin at.

        generated: where the model's own tokens are the real ones ("hits") and where they differ from the real frame before ("changed").
        episodes: as of ClipSums.add.
        """
        moved, unknown = changed.cpu().double(), torch.full_like(scores.nats, math.nan)
        digits = scores.digits or (TokenScores(unknown, unknown, unknown, confidence=unknown),) * len(self.digits)
        named = list(zip(self.digits, digits, strict=True))
        values = {
            "tokens": torch.ones_like(scores.nats),
            "nats": scores.nats,
            "top1": scores.top1,
            "top5": scores.top5,
            "changed": moved,
            "changed_top1": moved * scores.top1,
            **{f"generated_{name}": made for name, made in (generated or {}).items()},
            **{f"{name}_nats": digit.nats for name, digit in named},
            **{f"{name}_top1": digit.top1 for name, digit in named},
        }
        self.sums.add(first_frame, values, episodes)
        self.calibration.add(first_frame, scores.confidence, scores.top1)

    def summary(self, bootstrap: Bootstrap | None = None) -> Figures:
        """Give every figure under a key that names its unit; None where nothing was counted."""
        sums = self.sums.total() | self.calibration.total()
        (row,) = self._rows({name: values[:, None] for name, values in sums.items()}, bootstrap)
        nats, bits = (row[f"cross_entropy_{unit}_per_token"] for unit in ("nats", "bits"))
        sizes = {"frame": 1} | ({"pixel": self.pixels_per_frame} if self.pixels_per_frame else {})
        for unit, value in (("nats", nats), ("bits", bits)):
            for name, size in sizes.items():
                row[f"cross_entropy_{unit}_per_{name}"] = None if value is None else value * self.tokens_per_frame / size
        return row

    def by_frame(self, bootstrap: Bootstrap | None = None) -> list[Figures]:
        """Give one row a frame index."""
        rows = self._rows(self.sums.by_frame() | self.calibration.by_frame(), bootstrap)
        return [{"frame_index": frame} | row for frame, row in enumerate(rows) if row["tokens_count"]]

    def by_position(self, bootstrap: Bootstrap | None = None) -> list[Figures]:
        """Give one row a place of the grid; the calibration error without bounds, which would need all bins of every clip and place."""
        bins = expected_calibration_error(*self.calibration.by_place().values())
        rows = self._rows(self.sums.by_place(), bootstrap)
        places = [{"row": place // self.width, "column": place % self.width} for place in range(len(rows))]
        return [
            {**place, **row, CALIBRATION: as_number(CALIBRATION, float(error))}
            for place, row, error in zip(places, rows, bins, strict=True)
        ]

    def by_clip(self) -> list[Figures]:
        """Give one row a clip, in the order they came; no calibration error, which of a single clip is mostly chance."""
        return rows_by_clip(self.sums.total(), self.figures)

    def _rows(self, sums: Sums, bootstrap: Bootstrap | None) -> list[Figures]:
        return make_rows(sums, self.figures, self.bounded, bootstrap, self.sums.episodes)

    def figures(self, sums: Sums) -> Sums:
        """Turn sums (...) into figures (...), NaN where nothing was counted."""
        tokens, nats = sums["tokens"], divided(sums["nats"], sums["tokens"])
        found = {
            "tokens_count": tokens,
            "cross_entropy_nats_per_token": nats,
            "cross_entropy_bits_per_token": nats / math.log(2),
            # Beyond 700 nats exp overflows; no codebook has e^700 entries, the cap only keeps the JSON finite.
            "perplexity_tokens": nats.clamp(max=700.0).exp(),
            "top1_accuracy_fraction": divided(sums["top1"], tokens),
            "top5_accuracy_fraction": divided(sums["top5"], tokens),
            "top1_accuracy_on_changed_tokens_fraction": divided(sums["changed_top1"], sums["changed"]),
            "changed_tokens_fraction": divided(sums["changed"], tokens),
        }
        if "bin_count" in sums:
            found[CALIBRATION] = expected_calibration_error(*(sums[name] for name in Calibration.names))
        if self.has_generated:
            found["generated_accuracy_fraction"] = divided(sums["generated_hits"], tokens)
            found["changed_tokens_generated_fraction"] = divided(sums["generated_changed"], tokens)
        for name in self.digits:
            found[f"{name}_cross_entropy_nats_per_token"] = divided(sums[f"{name}_nats"], tokens)
            found[f"{name}_top1_accuracy_fraction"] = divided(sums[f"{name}_top1"], tokens)
        return found


def gap(meter: TokenMeter, law: TokenMeter, bootstrap: Bootstrap | None = None) -> Figures:
    """Give by how many nats a token a forecaster lies above the true law on the same tokens, with the bounds of the paired difference."""
    sums = {"tokens": meter.sums.total()["tokens"], "nats": meter.sums.total()["nats"] - law.sums.total()["nats"]}

    def figures(part: Sums) -> Sums:
        return {"tokens_count": part["tokens"], "gap_nats_per_token": divided(part["nats"], part["tokens"])}

    columns = {name: values[:, None] for name, values in sums.items()}
    (row,) = make_rows(columns, figures, ["gap_nats_per_token"], bootstrap, meter.sums.episodes)
    return {name: value for name, value in row.items() if name != "tokens_count"}


class RolloutMeter:
    """Compare free-running futures with the real ones, by horizon; a frame's horizon is 1 for the first predicted frame."""

    bounded = (
        *("top1_accuracy_fraction", "top1_accuracy_on_changed_tokens_fraction"),
        *("changed_tokens_real_fraction", "changed_tokens_generated_fraction"),
    )

    def __init__(self, grid: tuple[int, int]) -> None:
        fields = ("tokens", "hits", "copy_hits", "changed", "changed_hits", "changed_generated", "bits_real", "bits_generated")
        self.sums, self.width = ClipSums(fields, grid), grid[1]

    def update(self, generated: Tensor, real: Tensor, last: Tensor, episodes: Tensor | None = None) -> None:
        """Add generated and real frames (B, t, h, w) that follow the last given frame (B, h, w); episodes: as of ClipSums.add."""
        first = rearrange(last, "B h w -> B 1 h w")
        changes = changed_tokens(torch.cat([first, generated], dim=1))
        self._add(real, first, generated == real, changes, frame_surprise(generated), episodes)

    def update_uniform(self, codebook_size: int, real: Tensor, last: Tensor, episodes: Tensor | None = None) -> None:
        """Add frames of equally likely ids, of which nothing but expectations is needed; the entropy of a frame has none in closed form."""
        first, hits = rearrange(last, "B h w -> B 1 h w"), torch.full(real.shape, 1 / codebook_size, dtype=torch.float64)
        self._add(real, first, hits, 1 - hits, torch.full_like(hits, math.nan), episodes)

    def _add(
        self,
        real: Tensor,
        first: Tensor,
        hits: Tensor,
        changed_generated: Tensor,
        bits_generated: Tensor,
        episodes: Tensor | None,
    ) -> None:
        changed = changed_tokens(torch.cat([first, real], dim=1))
        values = {
            "tokens": torch.ones_like(real),
            "hits": hits,
            "copy_hits": real == first,
            "changed": changed,
            "changed_hits": hits * changed,
            "changed_generated": changed_generated,
            "bits_real": frame_surprise(real),
            "bits_generated": bits_generated,
        }
        self.sums.add(0, values, episodes)

    def summary(self, bootstrap: Bootstrap | None = None) -> Figures:
        """Give every figure under a key that names its unit; None where nothing was counted."""
        sums = {name: values[:, None] for name, values in self.sums.total().items()}
        return self._rows(sums, bootstrap)[0]

    def by_frame(self, bootstrap: Bootstrap | None = None) -> list[Figures]:
        """Give one row a horizon."""
        rows = self._rows(self.sums.by_frame(), bootstrap)
        return [{"horizon_frames": k + 1} | row for k, row in enumerate(rows) if row["tokens_count"]]

    def by_position(self, bootstrap: Bootstrap | None = None) -> list[Figures]:
        """Give one row a place of the grid; no entropy, which is of frames."""
        rows = self._rows(self.sums.by_place(), bootstrap)
        kept = [{name: value for name, value in row.items() if not name.startswith("frame_entropy")} for row in rows]
        return [{"row": place // self.width, "column": place % self.width} | row for place, row in enumerate(kept)]

    def by_clip(self) -> list[Figures]:
        """Give one row a clip, in the order they came."""
        return rows_by_clip(self.sums.total(), self._figures)

    def _rows(self, sums: Sums, bootstrap: Bootstrap | None) -> list[Figures]:
        return make_rows(sums, self._figures, self.bounded, bootstrap, self.sums.episodes)

    @staticmethod
    def _figures(sums: Sums) -> Sums:
        tokens = sums["tokens"]
        return {
            "tokens_count": tokens,
            "top1_accuracy_fraction": divided(sums["hits"], tokens),
            "top1_accuracy_on_changed_tokens_fraction": divided(sums["changed_hits"], sums["changed"]),
            "copy_last_given_frame_accuracy_fraction": divided(sums["copy_hits"], tokens),
            "changed_tokens_real_fraction": divided(sums["changed"], tokens),
            "changed_tokens_generated_fraction": divided(sums["changed_generated"], tokens),
            "frame_entropy_real_bits": divided(sums["bits_real"], tokens),
            "frame_entropy_generated_bits": divided(sums["bits_generated"], tokens),
        }


def frame_surprise(indices: Tensor) -> Tensor:
    """Give -log2 of how often each id of (B, t, h, w) stands in its own frame: float64, whose mean over a frame is its entropy.

    That is the entropy in bits of the histogram of a frame's ids, at most log2(h * w): 0 for one colour, high for noise.
    """
    flat = rearrange(indices, "B t h w -> (B t) (h w)")
    # Row by row, because a table of all pairs of places would hold (h w)^2 entries a frame.
    counts = [ids.unique(return_inverse=True, return_counts=True)[1:] for ids in flat]
    share = torch.stack([numbers[place] for place, numbers in counts]).double() / flat.shape[1]
    return -share.log2().view(indices.shape)
