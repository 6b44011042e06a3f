"""Decoding plans: which positions run in each forward pass and which are committed. One file a plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vidgpt.decoding.diagonal import diagonal
from vidgpt.decoding.raster import raster
from vidgpt.decoding.reader import Reader
from vidgpt.decoding.reference import reference
from vidgpt.decoding.speculative import DRAFTS, speculative
from vidgpt.layout import TokenLayout
from vidgpt.masks import MaskRule, causal, diagonal_passes
from vidgpt.masks import diagonal as diagonal_rule
from vidgpt.options import DiagonalKeys, SpeculativeKeys

PLANS = ("raster", "speculative", "diagonal", "transformers")


@dataclass(frozen=True)
class DecodingOptions:
    """A decoding plan and its own options.

    window: how many tokens a row of `diagonal` is behind the one above. delay: how many passes a frame of it is behind the one before;
    0 waits until that is complete. draft, draft_length: see vidgpt.decoding.speculative.
    """

    plan: str = "raster"
    window: int = 1
    delay: int = 0
    draft: str = "auto"
    draft_length: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError on what no plan takes."""
        if self.plan not in PLANS:
            raise ValueError(f"decoding={self.plan!r} is not one of {', '.join(PLANS)}: choose one of these")
        if self.draft not in DRAFTS:
            raise ValueError(f"speculative.draft={self.draft!r} is not one of {', '.join(DRAFTS)}: choose one of these")
        least = {
            "diagonal.window": (self.window, 1),
            "diagonal.delay": (self.delay, 0),
            "speculative.draft_length": (self.draft_length, 0),
        }
        for name, (value, allowed) in least.items():
            if value < allowed:
                raise ValueError(f"{name}={value} is not allowed: give {allowed} or more")

    @classmethod
    def of(cls, plan: "str | DecodingOptions") -> "DecodingOptions":
        """Take a plan, or the name of one."""
        return cls(plan) if isinstance(plan, str) else plan

    @classmethod
    def from_keys(cls, plan: str, diagonal: DiagonalKeys, speculative: SpeculativeKeys) -> "DecodingOptions":
        """Take the keys of a command."""
        return cls(plan, diagonal.window, diagonal.delay, speculative.draft, speculative.draft_length)

    def frames(self, reader: Reader, leads: Tensor) -> Iterator[Tensor]:
        """Yield the picture slots (B, S) of each frame to come, whose leads (B, frames) are given, as it is ready."""
        return self._function()(reader, leads)

    def rule(self, layout: TokenLayout) -> MaskRule:
        """Give what a token sees: under a diagonal, less than all before it."""
        is_raster = self.plan != "diagonal" or (self.window >= layout.width * layout.slots_per_place and not self.delay)
        return causal if is_raster else diagonal_rule(layout, self.window, self.delay)

    def passes_per_frame(self, layout: TokenLayout, frames: int | None = None) -> float | None:
        """Give the forward passes a latent frame in closed form, the prefill's left out; None where they depend on the video.

        frames: latent frames drawn from one prefill, over which the mean is taken; None: each further one of many.
        """
        if self.plan == "speculative":
            return None
        if self.plan == "diagonal":
            each = diagonal_passes(layout, self.window, self.delay)
            # Nothing goes on beside the end of the last one.
            more = diagonal_passes(layout, self.window) - each
        else:
            # generate reads each lead in a pass of its own, but for the first, which it reads together with the prompt.
            is_generate = self.plan == "transformers"
            each, more = (layout.tokens_per_frame, -1) if is_generate else (layout.slots_per_frame, 0)
        return each if frames is None else each + more / frames

    def _function(self) -> Callable[[Reader, Tensor], Iterator[Tensor]]:
        functions: dict[str, Callable[[Reader, Tensor], Iterator[Tensor]]] = {
            "raster": raster,
            "speculative": partial(speculative, draft=self.draft, draft_length=self.draft_length),
            "diagonal": partial(diagonal, window=self.window, delay=self.delay),
            "transformers": reference,
        }
        return functions[self.plan]


__all__ = ["PLANS", "DecodingOptions", "Reader"]
