"""The noise against SplitMix64 in plain integers, its law, and that it depends on its arguments alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vidgpt import noise
from vidgpt.noise import exponential_noise, race, sequence_keys

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(seed: int, count: int) -> list[int]:
    """The reference: state += gamma; give mix(state). Steele, Lea, Flood, OOPSLA 2014."""
    outputs = []
    for step in range(1, count + 1):
        word = (seed + GAMMA * step) & WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
        outputs.append(word ^ (word >> 31))
    return outputs


def expected_noise(key: int, position: int, digit: int, size: int) -> list[float]:
    stream = splitmix64(key + GAMMA * (256 * position + digit), 1)[0]
    return [-math.log(((word >> 12) + 0.5) / 2**52) for word in splitmix64(stream, size)]


def uniforms(seed: int, sequences: int, positions: int, size: int, digit: int = 0) -> Tensor:
    drawn = exponential_noise(sequence_keys(seed, sequences), torch.arange(positions).expand(sequences, -1), size, digit)
    return (-drawn.double()).exp()


def test_the_reference_gives_the_published_numbers() -> None:
    # The first outputs of the public-domain C code by Vigna, as printed in several standard libraries' tests.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("digit", [0, 1, 255])
def test_noise_is_splitmix64_in_int64(digit: int) -> None:
    keys, positions = sequence_keys(5, 2), torch.tensor([[0, 7, 999_999], [3, 0, 64]])
    drawn = exponential_noise(keys, positions, 6, digit)
    for row in range(2):
        for column in range(3):
            expected = expected_noise(int(keys[row]) & WORD, int(positions[row, column]), digit, 6)
            assert drawn[row, column].tolist() == pytest.approx(expected, rel=1e-6)


def kolmogorov(values: Tensor) -> float:
    """Give sqrt(n) times the largest distance of the empirical law from the uniform one; above 1.95 in 1 of 1000 cases."""
    ordered = values.flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype) / len(ordered)
    return float((steps - ordered).abs().max()) * len(ordered) ** 0.5


def test_noise_is_exponential() -> None:
    drawn = uniforms(0, sequences=4, positions=50, size=500)
    assert kolmogorov(drawn) < 1.95
    # By id, by position, by sequence: no part may be off while the whole is right.
    for axis in range(3):
        assert max(kolmogorov(part) for part in drawn.unbind(axis)[:50]) < 2.4
    assert kolmogorov(drawn**1.05) > 1.95


def correlation(first: Tensor, second: Tensor) -> float:
    """Give the correlation in units of its own spread under independence."""
    both = torch.stack([first.flatten(), second.flatten()])
    return abs(float(both.corrcoef()[0, 1])) * first.numel() ** 0.5


def test_neighbours_are_independent() -> None:
    drawn, other_digit = uniforms(1, 6, 200, 200), uniforms(1, 6, 200, 200, digit=1)
    other_seed = uniforms(2, 6, 200, 200)
    pairs = {
        "ids": (drawn[..., 1:], drawn[..., :-1]),
        "positions": (drawn[:, 1:], drawn[:, :-1]),
        "sequences": (drawn[1:], drawn[:-1]),
        "digits": (drawn, other_digit),
        "seeds": (drawn, other_seed),
        "position 1 digit 0 against position 0 digit 1": (drawn[:, 1:], other_digit[:, :-1]),
    }
    assert {name for name, pair in pairs.items() if correlation(*pair) > 4} == set()
    assert correlation(drawn, drawn) > 4


def test_first_ids_of_neighbouring_streams_are_pairwise_uniform() -> None:
    drawn = uniforms(3, 1, 40_001, 1)[0, :, 0]
    cells = (drawn[1:] * 8).long() * 8 + (drawn[:-1] * 8).long()
    expected = 40_000 / 64
    chi_square = ((torch.bincount(cells, minlength=64) - expected) ** 2 / expected).sum()
    assert float(chi_square) < 103.4  # the 99.9 % quantile for 63 degrees of freedom


def test_noise_depends_on_its_arguments_alone() -> None:
    keys = sequence_keys(7, 5)
    positions = torch.randint(0, 1000, (5, 9), generator=torch.Generator().manual_seed(0))
    whole = exponential_noise(keys, positions, 30, digit=2)
    torch.manual_seed(123)
    assert torch.equal(whole, exponential_noise(keys, positions, 30, digit=2))
    order = torch.tensor([3, 0, 4])
    assert torch.equal(whole[order][:, 5:], exponential_noise(keys[order], positions[order][:, 5:], 30, digit=2))
    assert torch.equal(whole[2:3, 4:5], exponential_noise(sequence_keys(7, 1, first=2), positions[2:3, 4:5], 30, digit=2))
    assert torch.equal(whole[..., :11], exponential_noise(keys, positions, 11, digit=2))
    assert torch.equal(whole, exponential_noise(keys, positions.int(), 30, digit=2))
    assert exponential_noise(keys, positions[:, :0], 30).shape == (5, 0, 30)


def test_narrow_positions_do_not_wrap_around() -> None:
    far = torch.tensor([[9_000_000]])
    assert torch.equal(exponential_noise(sequence_keys(0, 1), far.int(), 4), exponential_noise(sequence_keys(0, 1), far, 4))


def test_noise_is_never_zero_nor_infinite() -> None:
    extremes = noise._exponential(torch.tensor([0, -1, (1 << 63) - 1, -(1 << 63), (1 << 12) - 1, -(1 << 12)]))
    assert extremes.dtype == torch.float32
    assert float(extremes.min()) > 0
    assert float(extremes.max()) < 37
    assert torch.isfinite(extremes.log()).all()


def test_the_noise_of_2_to_the_53_steps_would_be_zero() -> None:
    # Why there are 2^52: the last of 2^53 middles has no double of its own and rounds to 1.
    assert float((torch.tensor(2**53 - 1).double() + 0.5) * 2.0**-53) == 1
    assert float((torch.tensor(2**52 - 1).double() + 0.5) * 2.0**-52) < 1


def starts(keys: Tensor, positions: Tensor, digit: int) -> Tensor:
    """Give where each stream begins on the one cycle of 2^64 states, in steps, as unsigned numbers without their lowest bit."""
    streams = noise._mix(keys[:, None] + noise._GAMMA * (256 * positions + digit + 1))
    inverse = pow(GAMMA, -1, 1 << 64)
    return noise._shift(streams * (inverse - (1 << 64) if inverse >> 63 else inverse), 1).flatten()


def test_streams_of_far_positions_and_large_vocabularies_do_not_overlap() -> None:
    keys = sequence_keys(0, 2)
    found = [starts(keys, torch.arange(1_000_000), 0)]
    found += [starts(keys, torch.arange(0, 1_000_000, 9973), digit) for digit in range(1, 256)]
    gaps = torch.cat(found).sort().values.diff()
    assert int(gaps.min()) > 1 << 17  # in halves: a vocabulary of 2^18 ids takes so many steps of its stream


def test_streams_without_their_own_mixing_would_overlap() -> None:
    positions = torch.arange(1000)
    counted = noise._shift(256 * positions, 1).sort().values.diff()
    assert int(counted.min()) < 1 << 17


def test_keys_differ_by_sequence_and_by_seed_and_repeat_exactly() -> None:
    keys = torch.cat([sequence_keys(seed, 300) for seed in range(-2, 8)])
    assert len(set(keys.tolist())) == 3000
    assert torch.equal(sequence_keys(3, 5, first=2), sequence_keys(3, 7)[2:])
    # Sums and strings put side by side would give the same key here.
    assert sequence_keys(1, 1, first=23)[0] != sequence_keys(12, 1, first=3)[0]
    assert sequence_keys(1, 1, first=2)[0] != sequence_keys(2, 1, first=1)[0]


SIZE = 3000


def rows(kind: str) -> Tensor:
    """Make logits (2, 20, SIZE)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 20, SIZE, generator=generator)
    if kind == "flat":
        return torch.zeros_like(logits)
    if kind == "few":
        return logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.999, float("-inf"))
    if kind == "one":
        return torch.full_like(logits, float("-inf")).scatter(2, torch.randint(SIZE, (2, 20, 1), generator=generator), 3.0)
    scale, offset = {"usual": (1.0, 0.0), "sharp": (8.0, -40.0), "far": (1.0, -2e4), "sure": (1e4, 0.0)}[kind]
    return logits * scale + offset


def race_of_all(logits: Tensor, keys: Tensor, positions: Tensor, digit: int) -> Tensor:
    return (logits - exponential_noise(keys, positions, logits.shape[-1], digit).log()).argmax(-1)


@pytest.mark.parametrize("kind", ["usual", "flat", "sharp", "far", "sure", "few", "one"])
def test_a_race_of_those_who_can_win_ends_as_that_of_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, keys = rows(kind), sequence_keys(4, 2)
    drawn, exponential = 0, noise._exponential

    def counted(bits: Tensor) -> Tensor:
        nonlocal drawn
        drawn += bits.numel()
        return exponential(bits)

    found = []
    for first in range(0, 100, 20):
        positions = torch.arange(first, first + 20).expand(2, -1)
        expected = race_of_all(logits, keys, positions, 3)
        with monkeypatch.context() as patch:
            patch.setattr(noise, "_exponential", counted)
            found.append(race(logits, keys, positions, 3))
        assert torch.equal(found[-1], expected)
    assert drawn < 0.07 * 5 * logits.numel()
    # Winners that are not among the likeliest, whose noise is drawn in any case.
    likeliest = logits.topk(noise.CERTAIN).indices
    others = [(ids[..., None] != likeliest).all(-1).sum() for ids in found]
    assert (sum(map(int, others)) > 20) == (kind in ("usual", "flat", "far"))


def test_a_race_leaves_no_one_out_whose_noise_is_extreme(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 1, SIZE), -30.0)
    logits[..., :100] = 0.0
    # All bits set is the least noise there is, which lifts a logit by 36.7.
    mix = noise._mix
    monkeypatch.setattr(noise, "_mix", lambda bits: torch.where(bits == lucky, -1, mix(bits.clone())))
    stream = int(mix(sequence_keys(0, 1)[:, None] + noise._GAMMA))
    steps = noise._GAMMA * torch.tensor(2501) + stream
    lucky = int(steps)
    assert race_of_all(logits, sequence_keys(0, 1), torch.zeros(1, 1, dtype=torch.long), 0) == 2500
    assert race(logits, sequence_keys(0, 1), torch.zeros(1, 1, dtype=torch.long), 0) == 2500


@pytest.mark.parametrize("name", ["CERTAIN", "LARGEST_GAIN"])
def test_the_bounds_of_a_race_decide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the second look nobody wins but the likeliest, and gains that are thought too small lose winners.
    logits, keys, positions = rows("usual"), sequence_keys(4, 2), torch.arange(20).expand(2, -1)
    monkeypatch.setattr(noise, name, {"CERTAIN": 1, "LARGEST_GAIN": 0.0}[name])
    is_equal = torch.equal(race(logits, keys, positions, 0), race_of_all(logits, keys, positions, 0))
    assert is_equal == (name == "CERTAIN")
