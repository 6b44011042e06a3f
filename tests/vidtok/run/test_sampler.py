"""The sampler is a pure function of (seed, step), and every epoch shows each item once."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from vidtok.run.sampler import StepSampler, build_loader, seed_everything, spread


def test_every_epoch_shows_each_item_once() -> None:
    items = [index for batch in islice(StepSampler(10, 3, seed=0), 20) for index in batch]
    assert [sorted(items[start : start + 10]) for start in range(0, 60, 10)] == [list(range(10))] * 6


def test_epochs_are_numpys_permutations_of_seed_and_epoch() -> None:
    items = [index for batch in islice(StepSampler(10, 4, seed=5), 5) for index in batch]
    expected = [np.random.default_rng((5, epoch)).permutation(10) for epoch in (0, 1)]
    assert items == np.concatenate(expected).tolist()


@pytest.mark.parametrize("start", [0, 1, 7, 23])
def test_starting_late_gives_what_going_on_would_have_given(start: int) -> None:
    straight = list(StepSampler(10, 3, seed=1, num_steps=30))
    assert list(StepSampler(10, 3, seed=1, start_step=start, num_steps=30 - start)) == straight[start:]


def test_the_order_of_questions_does_not_matter() -> None:
    sampler = StepSampler(10, 3, seed=1)
    forward = [sampler.indices(step) for step in range(12)]
    assert [sampler.indices(step) for step in reversed(range(12))] == forward[::-1]


def test_ranks_share_out_what_one_process_would_take() -> None:
    alone = StepSampler(10, 6, seed=2)
    ranks = [StepSampler(10, 3, seed=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(15):
        assert alone.indices(step) == ranks[0].indices(step) + ranks[1].indices(step)


def test_two_micro_batches_hold_what_one_big_batch_would() -> None:
    big, small = StepSampler(10, 6, seed=2), StepSampler(10, 3, seed=2)
    assert all(big.indices(step) == small.indices(2 * step) + small.indices(2 * step + 1) for step in range(15))


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(StepSampler(50, 50, seed=seed).indices(step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


def test_a_batch_larger_than_the_data_repeats_items_evenly() -> None:
    counts = Counter(StepSampler(3, 12, seed=0).indices(0))
    assert counts == {0: 4, 1: 4, 2: 4}


def test_the_length_is_the_number_of_steps() -> None:
    assert len(StepSampler(10, 3, seed=0, num_steps=7)) == 7
    with pytest.raises(TypeError, match="endless"):
        len(StepSampler(10, 3, seed=0))


@pytest.mark.parametrize("wrong", [{"num_items": 0}, {"batch_size": 0}, {"rank": 2, "world_size": 2}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|rank < world_size"):
        StepSampler(**({"num_items": 10, "batch_size": 3, "seed": 0} | wrong))


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index**2)


def test_the_loader_gives_the_samplers_items() -> None:
    sampler = StepSampler(10, 3, seed=0, num_steps=4)
    batches = list(build_loader(Squares(), sampler, num_workers=0, pin_memory=False))
    assert [batch.tolist() for batch in batches] == [[index**2 for index in sampler.indices(step)] for step in range(4)]


def test_worker_processes_change_nothing() -> None:
    # A dataset of torch's own: a spawned worker cannot import this test module by name.
    data, batches = TensorDataset(torch.arange(10)), []
    for workers in (0, 1):
        loader = build_loader(data, StepSampler(10, 3, seed=0, num_steps=4), num_workers=workers, pin_memory=False)
        batches.append([batch[0].tolist() for batch in loader])
    assert batches[0] == batches[1]


def test_a_spread_choice_reaches_from_the_first_item_to_the_last() -> None:
    assert [int(value) for value in spread(Squares(), 4)] == [0, 9, 36, 81]
    assert len(spread(Squares(), 100)) == 10


def test_random_numbers_follow_from_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[float, float]:
        seed_everything(seed, step, rank)
        return float(torch.rand(())), float(np.random.rand())

    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3) == draw(1, 2, 3)
