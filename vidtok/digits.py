"""One integer a place and its digits: how an id over several codebooks, or over the levels of one, is packed.

Little-endian: id = d0 + f0 * (d1 + f1 * (d2 + ...)), so digit 0 is the first FSQ level or the coarsest residual codebook.
Travels with exported transformers (vidgpt.exporting), so it imports torch alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_CODEBOOK = 1 << 24  # entries of one codebook: what can still be counted, and what is a table
MAX_IDS = 1 << 62


def split_digits(indices: Tensor, factors: Sequence[int]) -> Tensor:
    """Split ids (...) into their digits (..., Q), Q = len(factors), digit q in [0, factors[q]).

    Gives int64. Raises ValueError for impossible factors, and for ids that are no integers or lie outside [0, product of factors).
    """
    check_factors(factors)
    indices, total = _integers(indices, "ids"), math.prod(factors)
    outside = (indices < 0) | (indices >= total)
    if outside.any():
        raise ValueError(
            f"id {int(indices[outside][0])} lies outside [0, {total}): use the factors {list(factors)} with the tokenizer they are of"
        )
    return unpack_digits(indices, factors)


def join_digits(digits: Tensor, factors: Sequence[int]) -> Tensor:
    """Join digits (..., Q) into ids (...), int64: the inverse of split_digits.

    Raises ValueError for impossible factors, and when a digit is missing, is no integer or lies outside its factor.
    """
    check_factors(factors)
    digits = _integers(digits, "digits")
    if not digits.ndim or digits.shape[-1] != len(factors):
        raise ValueError(
            f"digits have shape {tuple(digits.shape)}, but there are {len(factors)} factors: the last axis must hold one digit for each"
        )
    outside = torch.stack([(digits[..., q] < 0) | (digits[..., q] >= factor) for q, factor in enumerate(factors)], dim=-1)
    if outside.any():
        place = int(outside.nonzero()[0, -1])
        raise ValueError(
            f"digit {place} is {int(digits[outside][0])}, outside [0, {factors[place]}): use the factors {list(factors)} with "
            "the digits they are of"
        )
    return pack_digits(digits, factors)


def unpack_digits(indices: Tensor, factors: Sequence[int]) -> Tensor:
    """Do as split_digits for int64 ids known to be inside, without a look at them, for which a GPU would be waited for."""
    digits = []
    for factor in factors:
        digits.append(indices % factor)
        indices = indices // factor
    return torch.stack(digits, dim=-1)


def pack_digits(digits: Tensor, factors: Sequence[int]) -> Tensor:
    """Do as join_digits for int64 digits known to be inside, without a look at them."""
    packed = torch.zeros_like(digits[..., 0])
    for digit, factor in zip(reversed(digits.unbind(-1)), reversed(factors), strict=True):
        packed = packed * factor + digit
    return packed


def check_indices(indices: Tensor) -> None:
    """Raise ValueError unless these may be ids of a clip: integers (B, t, h, w)."""
    if indices.ndim != 4 or not indices.numel():
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}, not (B, t, h, w) of 1 or more each: give ids as encode does"
        )
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"indices are {indices.dtype}, but ids are whole numbers: give int64, or latents to decode_latents")


def check_factors(factors: Sequence[int]) -> None:
    """Raise ValueError unless the factors are 1 or more and their ids fit into an int64."""
    if not factors or min(factors) < 1 or math.prod(factors) >= MAX_IDS:
        raise ValueError(
            f"factors={list(factors)} cannot number ids: give one or more integers from 1 up, with a product below 2**62"
        )


def _integers(values: Tensor, name: str) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"got {name} of type {values.dtype}; they are integers: convert them before")
    return values.long()
