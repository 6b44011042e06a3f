"""Random numbers that are a pure function of (seed, sequence, position, digit, id), computed where they are needed.

A draw at a position then depends on the distribution there and on nothing else: not on the batch, the device, or the order in which
a decoding plan visits positions. So a plan that guesses ahead can be checked against plain decoding id by id.
"""

import hashlib

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sequence_keys(seed: int, count: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """Make the keys (count,), int64, of sequences first .. first + count - 1 of a seed."""
    # Hashed, because sums such as seed + number would collide between runs.
    digests = (hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest() for number in range(first, first + count))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64, device=device)


def exponential_noise(keys: Tensor, positions: Tensor, size: int, digit: int = 0) -> Tensor:
    """Draw Exp(1) for every id: (B, n, size), fp32, above 0.

    keys: (B,) of sequence_keys. positions: (B, n). digit: which digit of the id stands there, 0 .. 255.
    """
    # SplitMix64 (Steele, Lea, Flood, 2014): a stream for every (key, position, digit), a step of it for every id; int64 wraps around.
    # Wide first: 32 bits would wrap around at other places.
    streams = _mix(keys[:, None] + _GAMMA * (256 * positions.long() + digit + 1))
    steps = torch.arange(1, size + 1, device=keys.device)
    return _exponential(_mix(streams[..., None] + _GAMMA * steps))


def _exponential(bits: Tensor) -> Tensor:
    # The middle of one of 2^52 equal steps: never 0, never 1, so that no noise is 0 or infinite. Of 2^53 it would round to 1.
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -uniform.log().float()


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift to the right as unsigned: int64's own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
