"""Ids and their digits against arithmetic, NumPy's mixed radix and the packing of vector-quantize-pytorch's FSQ."""

import math

import numpy as np
import pytest
import torch
from vector_quantize_pytorch import FSQ

from vidtok.digits import join_digits, split_digits

FACTORS = [[7], [3, 5], [8, 5, 5, 5], [2] * 18, [1, 4, 1, 2], [1 << 16] * 3]


@pytest.mark.parametrize("factors", FACTORS)
def test_joining_what_was_split_gives_the_same_ids(factors: list[int]) -> None:
    total = math.prod(factors)
    indices = torch.randint(0, total, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    indices[0, 0, 0, :2] = torch.tensor([0, total - 1])
    digits = split_digits(indices, factors)
    assert digits.shape == (2, 3, 4, 5, len(factors))
    assert digits.dtype == torch.int64
    assert torch.equal(join_digits(digits, factors), indices)


@pytest.mark.parametrize("factors", FACTORS)
def test_digits_are_numpys_mixed_radix_read_backwards(factors: list[int]) -> None:
    indices = np.random.default_rng(0).integers(0, math.prod(factors), 100)
    expected = np.stack(np.unravel_index(indices, factors[::-1])[::-1], axis=-1)
    assert np.array_equal(split_digits(torch.from_numpy(indices), factors).numpy(), expected)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4, 5]])
def test_digits_are_the_levels_of_the_librarys_fsq(levels: list[int]) -> None:
    fsq = FSQ(levels)
    indices = torch.arange(fsq.codebook_size)
    digits = split_digits(indices, levels)
    assert torch.equal(digits, fsq.indices_to_level_indices(indices).long())
    assert torch.equal(join_digits(digits, levels), indices)
    codes, packed = fsq(torch.randn(1, 50, len(levels), generator=torch.Generator().manual_seed(0)))
    halves = torch.tensor(levels) // 2
    assert torch.equal(join_digits((codes * halves + halves).round().long(), levels), packed.long())


def test_digit_zero_is_the_first_factor() -> None:
    assert split_digits(torch.tensor([1, 10, 100]), [10, 10, 10]).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert join_digits(torch.tensor([3, 2, 1]), [10, 10, 10]).item() == 123


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_narrow_integers_do_not_overflow(dtype: torch.dtype) -> None:
    digits = torch.tensor([[200, 200, 200]]).to(dtype)
    assert join_digits(digits, [256] * 3).item() == 200 * (1 + 256 + 65536)


def test_no_ids_have_no_digits() -> None:
    assert split_digits(torch.zeros(0, dtype=torch.int64), [3, 5]).shape == (0, 2)


def test_what_lies_outside_is_refused_with_what_came() -> None:
    with pytest.raises(ValueError, match=r"id 15 lies outside \[0, 15\)"):
        split_digits(torch.tensor([0, 15]), [3, 5])
    with pytest.raises(ValueError, match="id -1 lies outside"):
        split_digits(torch.tensor([-1, 3]), [3, 5])
    with pytest.raises(ValueError, match=r"digit 1 is 5, outside \[0, 5\)"):
        join_digits(torch.tensor([[0, 5]]), [3, 5])
    with pytest.raises(ValueError, match=r"shape .* 2 factors"):
        join_digits(torch.tensor([0, 1, 2]), [3, 5])
    with pytest.raises(ValueError, match="float32"):
        split_digits(torch.tensor([1.0]), [3, 5])
    for factors in ([], [0, 3], [1 << 31, 1 << 31]):
        with pytest.raises(ValueError, match="cannot number ids"):
            split_digits(torch.tensor([0]), factors)
