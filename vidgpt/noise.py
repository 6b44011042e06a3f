"""Random numbers that are a pure function of (seed, sequence, position, digit, id), computed where they are needed.

A draw at a position then depends on the distribution there and on nothing else: not on the batch, the device, or the order in which
a decoding plan visits positions. So a plan that guesses ahead can be checked against plain decoding id by id.
"""

import hashlib
import math

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


# The likeliest ids, whose noise `race` draws in any case, the most that noise adds to a logit, and ids that a processor's cache holds.
CERTAIN, LARGEST_GAIN, BLOCK = 64, 53 * math.log(2), 1 << 15


def sequence_keys(seed: int, count: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """Make the keys (count,), int64, of sequences first .. first + count - 1 of a seed."""
    # Hashed, because sums such as seed + number would collide between runs.
    digests = (hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest() for number in range(first, first + count))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64, device=device)


def exponential_noise(keys: Tensor, positions: Tensor, size: int, digit: int = 0) -> Tensor:
    """Draw Exp(1) for every id: (B, n, size), fp32, above 0.

    keys: (B,) of sequence_keys. positions: (B, n). digit: which digit of the id stands there, 0 .. 255.
    """
    steps = torch.arange(1, size + 1, device=keys.device)
    return _exponential(_mix(_streams(keys, positions, digit)[..., None] + _GAMMA * steps))


def race(logits: Tensor, keys: Tensor, positions: Tensor, digit: int = 0) -> Tensor:
    """Give the ids (B, n) of the largest logits - ln(noise), of logits (B, n, size), fp32: what the noise of all ids would give.

    Other arguments as of exponential_noise. The noise is drawn for the few ids alone that can win, which pays for a large vocabulary.
    """
    streams, ids = _streams(keys, positions, digit).flatten(), torch.arange(logits.shape[-1], device=logits.device)
    winners = [_race(row, stream, ids) for row, stream in zip(logits.flatten(0, 1), streams, strict=True)]
    return torch.stack(winners).view(positions.shape)


def _race(logits: Tensor, stream: Tensor, ids: Tensor) -> Tensor:
    """Give the winner of one row, logits (size,); ids: all of them."""
    likeliest = logits.topk(min(CERTAIN, len(logits))).indices
    best = (logits[likeliest] - _exponential(_mix(stream + _GAMMA * (likeliest + 1))).log()).max()
    # What fp32 may lose of a score; who is so near may win.
    least = best - (1e-3 + 1e-6 * float(logits[likeliest[0]].abs() + best.abs()))
    is_near = logits > least - LARGEST_GAIN
    near = logits
    if 4 * int(is_near.sum()) < len(ids):
        ids = is_near.nonzero().squeeze(1)
        near = logits[ids]
    found = []
    for part, scores in zip(ids.split(BLOCK), near.split(BLOCK), strict=True):
        bits = _mix(stream + _GAMMA * (part + 1))
        # To win, noise must be below exp(logit - best); it is above 1 - u, which is all that is computed for those who are far off.
        at_least = _shift(bits.bitwise_not(), 12).float().mul_(2.0**-52)
        can_win = (at_least <= (scores - least).exp_()).nonzero().squeeze(1)
        found.append((part[can_win], bits[can_win]))
    ids, bits = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not len(ids):  # a logit that is no number
        return logits.argmax()
    return ids[(logits[ids] - _exponential(bits).log()).argmax()]


def _streams(keys: Tensor, positions: Tensor, digit: int) -> Tensor:
    # SplitMix64 (Steele, Lea, Flood, 2014): a stream for every (key, position, digit), a step of it for every id; int64 wraps around.
    # Wide first: 32 bits would wrap around at other places.
    return _mix(keys[:, None] + _GAMMA * (256 * positions.long() + digit + 1))


def _exponential(bits: Tensor) -> Tensor:
    # The middle of one of 2^52 equal steps: never 0, never 1, so that no noise is 0 or infinite. Of 2^53 it would round to 1.
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -uniform.log().float()


def _mix(bits: Tensor) -> Tensor:
    """Mix in place, for which a processor's cache is large enough more often; gives bits."""
    shifted = torch.empty_like(bits)
    bits.bitwise_xor_(_shift(bits, 30, shifted)).mul_(_FIRST)
    bits.bitwise_xor_(_shift(bits, 27, shifted)).mul_(_SECOND)
    return bits.bitwise_xor_(_shift(bits, 31, shifted))


def _shift(bits: Tensor, by: int, out: Tensor | None = None) -> Tensor:
    """Shift to the right as unsigned, into `out`: int64's own shift repeats the sign."""
    return torch.bitwise_right_shift(bits, by, out=out).bitwise_and_((1 << (64 - by)) - 1)
