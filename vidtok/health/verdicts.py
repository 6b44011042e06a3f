"""When a figure of a tokenizer is good, worth a look or broken: one table of rules, which the report shows beside every verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vidtok.config import VidTokConfig
from vidtok.health.remedies import (
    fewer_channels,
    larger_codebook,
    own_patch_alone,
    rounding,
    smaller_codebook,
    smaller_patches,
)

Remedy = Callable[[VidTokConfig], str | None]
Status = Literal["good", "look at this", "broken", "not measured"]


@dataclass(frozen=True)
class Rule:
    """Bounds for one figure. A higher figure is better where good > broken, a lower one where good < broken.

    key: of metrics.json. number: its format; unit: what follows a value. broken: infinite where a figure alone never condemns.
    advice: what it may mean and what to do. keys: its end, with the words of those remedies that this tokenizer has not taken yet in {}.
    """

    key: str
    title: str
    number: str
    unit: str
    good: float
    broken: float
    advice: str
    keys: str = ""
    remedies: tuple[Remedy, ...] = ()

    def advise(self, config: VidTokConfig | None) -> str:
        """Give the advice for a tokenizer; None: one that is not trained here."""
        words = [] if config is None else [word for remedy in self.remedies if (word := remedy(config))]
        either = " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
        return self.advice + (self.keys.format(either) if words else "")

    def judge(self, value: float | None) -> Status:
        """Give the verdict; bounds themselves still count as the better side."""
        if value is None or math.isnan(value):
            return "not measured"
        sign = 1 if self.good > self.broken else -1
        if sign * value >= sign * self.good:
            return "good"
        return "look at this" if sign * value >= sign * self.broken else "broken"

    def words(self) -> str:
        """Say the rule."""
        better, worse = ("≥", "<") if self.good > self.broken else ("≤", ">")
        condemned = f", broken {worse} {self.number.format(self.broken)}" if math.isfinite(self.broken) else ""
        return f"good {better} {self.number.format(self.good)}{condemned}"

    def show(self, value: float | None) -> str:
        """Write a value of this figure with its unit."""
        return "–" if value is None or math.isnan(value) else self.number.format(value) + self.unit


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    rule: Rule
    value: float | None
    status: Status
    advice: str = ""


RULES = (
    Rule("psnr_db_mean_of_frames", "PSNR", "{:z.1f}", " dB", 28.0, 20.0, "train longer",
         ", or with {}", (larger_codebook, smaller_patches)),
    Rule("ssim_mean_of_frames", "SSIM", "{:z.2f}", "", 0.9, 0.6, "train longer",
         ", or with {}", (larger_codebook, smaller_patches)),
    Rule("psnr_db_moving_pixels", "PSNR of moving pixels", "{:z.1f}", " dB", 24.0, 15.0,
         "what moves is blurred or lost: train longer, or raise loss.motion_weight"),
    Rule("psnr_db_worst_tenth_below_mean", "worst below the mean", "{:z.1f}", " dB", 6.0, math.inf,
         "look at the worst clips: training has seen too little like them"),
    Rule("psnr_db_drop_over_frame_index", "early above late", "{:z.2f}", " dB", 1.0, 6.0,
         "errors add up over a clip: train with a larger clip_frames"),
    Rule("flicker_static_above_source_grey_levels_of_255", "flicker above source", "{:z.2f}", " of 255", 0.5, 5.0,
         "still places shimmer: train longer, or raise loss.temporal_weight"),
    Rule("codebook_used_of_attainable_fraction", "codes used", "{:z.0%}", "", 0.9, 0.1,
         "these clips are all alike, or the codebook collapses",
         ": a training with {} may help", (smaller_codebook, fewer_channels, rounding)),
    Rule("codebook_perplexity_of_size_fraction", "codebook perplexity", "{:z.1%}", " of size", 0.1, -math.inf,
         "few codes do most of the work: a still background does this, and so does a collapse"),
    Rule("changed_ids_static_fraction", "ids changing in place", "{:z.1%}", "", 0.02, 0.5,
         "still places get new ids, from noise or from their neighbours",
         ": a training with {} steadies them", (own_patch_alone, smaller_codebook)),
    Rule("chunk_max_abs_pixel_difference", "seam between chunks", "{:.2g}", " of ±1", 1e-3, math.inf,
         "this tokenizer starts anew in every chunk: encode clips whole"),
    Rule("chunk_changed_ids_fraction", "ids changed by chunks", "{:z.1%}", "", 1e-3, 0.05,
         "this tokenizer starts anew in every chunk: encode clips whole"),
    Rule("chunk_border_psnr_dip_db", "dip at chunk borders", "{:z.2f}", " dB", 0.1, 3.0,
         "encode clips whole, or in longer chunks"),
    Rule("tile_max_abs_pixel_difference", "seam between tiles", "{:.2g}", " of ±1", 1e-3, math.inf, "raise overlap"),
    Rule("tile_changed_ids_fraction", "ids changed by tiles", "{:z.1%}", "", 1e-3, 0.05, "raise overlap"),
)  # fmt: skip


def judge_all(figures: Mapping[str, object], config: VidTokConfig | None = None) -> list[Verdict]:
    """Give a verdict for every rule whose figure is there, in the order of RULES; a figure of None was not measured.

    config: of the tokenizer, which the advice goes by; None: another project's.
    """
    verdicts = []
    for rule in RULES:
        if rule.key in figures:
            value = figures[rule.key]
            assert value is None or isinstance(value, int | float)
            verdicts.append(Verdict(rule, value, rule.judge(value), rule.advise(config)))
    return verdicts


def overall(verdicts: list[Verdict]) -> str:
    """Say in a few words how many lines are good, worth a look and broken."""
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in ("good", "look at this", "broken")}
    return f"{counts['good']} good, {counts['look at this']} to look at, {counts['broken']} broken"
