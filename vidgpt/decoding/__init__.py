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
    draft: str = "own"
    draft_length: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError on what no plan takes."""
        if self.plan not in PLANS:
            raise ValueError(f"decoding={self.plan!r} is not one of {', '.join(PLANS)}: choose one of these")
        if self.draft not in DRAFTS:
            raise ValueError(f"draft={self.draft!r} is not one of {', '.join(DRAFTS)}: choose one of these")
        if self.window < 1 or self.delay < 0 or self.draft_length < 0:
            raise ValueError(
                f"got window={self.window}, delay={self.delay} and draft_length={self.draft_length}: give a window of 1 or more, "
                "the others 0 or more"
            )

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

    def passes_per_frame(self, layout: TokenLayout) -> float | None:
        """Give the forward passes a latent frame in closed form; None where they depend on the video."""
        if self.plan == "diagonal":
            return diagonal_passes(layout, self.window, self.delay)
        return None if self.plan == "speculative" else layout.slots_per_frame

    def _function(self) -> Callable[[Reader, Tensor], Iterator[Tensor]]:
        functions: dict[str, Callable[[Reader, Tensor], Iterator[Tensor]]] = {
            "raster": raster,
            "speculative": partial(speculative, draft=self.draft, draft_length=self.draft_length),
            "diagonal": partial(diagonal, window=self.window, delay=self.delay),
            "transformers": reference,
        }
        return functions[self.plan]


__all__ = ["PLANS", "DecodingOptions", "Reader"]
