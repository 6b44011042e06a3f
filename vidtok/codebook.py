"""Is the codebook in use, and is it the same in every process: what training asks at its log steps."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from vidtok.digits import check_factors, unpack_digits
from vidtok.fingerprint import hash_weights
from vidtok.metrics import code_figures
from vidtok.quantizer import Quantizer
from vidtok.run.failure import TrainingError
from vidtok.run.processes import from_all

# Even use of a codebook by as many tokens as it has codes still leaves e**-1 of them unseen; at four times as many, 2 %.
TOKENS_PER_CODE = 4
HEALTHY_SHARE = 0.2

_REMEDIES = {
    "fsq": "fewer tokenizer.fsq_levels, or more unquantized_steps",
    "vq": "tokenizer.quantizer=fsq, a lower tokenizer.codebook_dim, or a higher tokenizer.dead_code_ratio",
    "simvq": "tokenizer.quantizer=fsq, a lower tokenizer.codebook_dim, or more unquantized_steps",
    "lfq": "tokenizer.quantizer=fsq, a higher tokenizer.entropy_weight, or a lower tokenizer.codebook_size",
    "bsq": "tokenizer.quantizer=fsq, a higher tokenizer.entropy_weight, or a lower tokenizer.codebook_size",
}


class CodebookMonitor:
    """Count the codes of the last window_tokens tokens of this process, codebook by codebook, on the device they come from.

    factors: the tokenizer's codebook_factors. quantizer: its kind, which decides what a warning recommends.
    Holds 4 bytes for each token of the window and each code, in every codebook. Raises ValueError for continuous latents.
    No checkpoint keeps it: nothing that trains reads it, every process has its own, and a resumed run's figures say of how many
    tokens they are.
    """

    def __init__(self, factors: Sequence[int], window_tokens: int = 1_000_000, quantizer: str = "vq") -> None:
        check_factors(factors)
        if window_tokens < 1:
            raise ValueError(f"got window_tokens={window_tokens}; a window holds at least one token: 1_000_000 is usual")
        self.factors, self.window_tokens, self.quantizer = list(factors), window_tokens, quantizer
        self.seen_tokens = 0
        self._window: Tensor | None = None  # (Q, window_tokens), the digits of token n at n % window_tokens; -1 before the first
        self._counts: list[Tensor] = []  # (factor,) of each codebook

    def update(self, indices: Tensor) -> None:
        """Add the quantizer's ids, of any shape; they are not checked, so that no step waits for the device."""
        digits = rearrange(unpack_digits(indices.detach(), self.factors), "... q -> q (...)").int()
        if self._window is None:
            self._window = digits.new_full((len(self.factors), self.window_tokens), -1)
            self._counts = [digits.new_zeros(factor) for factor in self.factors]
        number = min(digits.shape[1], self.window_tokens)
        self.seen_tokens += digits.shape[1]
        places = torch.arange(self.seen_tokens - number, self.seen_tokens, device=digits.device) % self.window_tokens
        for counts, row, new in zip(self._counts, self._window, digits[:, digits.shape[1] - number :], strict=True):
            old = row[places]
            counts.index_add_(0, old.clamp(min=0), -(old >= 0).int())
            counts.index_add_(0, new, torch.ones_like(new))
            row[places] = new

    def figures(self) -> dict[str, float]:
        """Give use over the window, with the number of the codebook at the end of each key where there are several."""
        figures: dict[str, float] = {"codebook_window_tokens": self._tokens}
        for number, counts in enumerate(self._counts):
            mark = f"_{number}" if len(self.factors) > 1 else ""
            use = code_figures(counts)
            for key in ("used_fraction", "perplexity_codes", "dead_codes"):
                figures[f"codebook_window_{key}{mark}"] = use[key]
        return figures

    def warning(self) -> str | None:
        """Say in one sentence which codebook is badly used and what helps, or nothing.

        Speaks once the window is full or has seen TOKENS_PER_CODE tokens a code, when fewer than HEALTHY_SHARE of the codes that as
        many evenly spread tokens would use are in use.
        """
        sentences = []
        for number, counts in enumerate(self._counts):
            if self._tokens < min(self.window_tokens, TOKENS_PER_CODE * len(counts)):
                continue
            used = int((counts > 0).sum())
            if used < HEALTHY_SHARE * len(counts) * -math.expm1(-self._tokens / len(counts)):
                name = f"codebook {number}" if len(self.factors) > 1 else "codebook"
                sentences.append(f"{name}: {used} of {len(counts)} codes used over the last {self._tokens:,} tokens")
        return f"{'; '.join(sentences)}: try {_REMEDIES[self.quantizer]}" if sentences else None

    @property
    def _tokens(self) -> int:
        return min(self.seen_tokens, self.window_tokens)


def codebook_hash(quantizer: Quantizer) -> str:
    """Give 16 hex digits that change with any bit of the quantizer's weights and statistics."""
    return hash_weights({}, quantizer.state_dict())


def check_same_codebook(quantizer: Quantizer) -> None:
    """Raise TrainingError, in every process, when the processes' codebooks are not the same bits. Every process must call it."""
    hashes = from_all(codebook_hash(quantizer))
    if len(set(hashes)) > 1:
        strangers = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
        raise TrainingError(
            f"the codebooks of processes 0 and {', '.join(map(str, strangers))} differ ({hashes[0]}, {hashes[strangers[0]]}), so their "
            "tokens mean different things: train on from an earlier checkpoint, in one process or with quantizer=fsq"
        )
