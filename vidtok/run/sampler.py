"""Which items and which random numbers a step sees, as pure functions of (seed, step): the position of a run is one integer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vidtok.run.interrupts import ignore_interrupt
from vidtok.run_options import RunOptions


class StepSampler(Sampler[list[int]]):
    """Yield one list of item indices a step, epoch after epoch without a seam.

    Every epoch is a permutation of its own, drawn from (seed, epoch); a batch may end one epoch and begin the next. With several
    processes rank r takes the r-th slice of the step's world_size * batch_size items. num_steps None: endless.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_items < 1:
            raise ValueError("The data set holds 0 items: training needs at least 1.")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, rank={rank} of {world_size}: need batch_size >= 1 and rank < world_size.")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            yield self.indices(step)
            step += 1

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("An endless StepSampler has no length.")
        return self.num_steps

    def indices(self, step: int) -> list[int]:
        """Give this rank's item indices of one step."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return [self._item(position) for position in range(first, first + self.batch_size)]

    def _item(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_items)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
        return int(self._order[offset])


class StepLoader:
    """Load this process's micro batches of each step, and say which items they hold.

    num_workers of the options: null is 0 on a CPU and 2 beside another device.
    """

    def __init__(self, dataset: Dataset[Any], options: RunOptions, device: torch.device, rank: int, world_size: int) -> None:
        self._dataset, self._options, self._device = dataset, options, device
        num_items = len(dataset)  # type: ignore[arg-type]
        self._sampler = StepSampler(num_items, options.batch_size, options.seed, rank=rank, world_size=world_size)

    def after(self, step: int, horizon: int | None) -> Iterator[list[Any]]:
        """Give the micro batches of every step after `step`, up to horizon; None: for ever."""
        count, sampler = self._options.gradient_accumulation, copy(self._sampler)
        sampler.start_step, sampler.num_steps = step * count, None if horizon is None else (horizon - step) * count
        automatic = 0 if self._device.type == "cpu" else 2
        num_workers = automatic if self._options.num_workers is None else self._options.num_workers
        loader = iter(build_loader(self._dataset, sampler, num_workers=num_workers, pin_memory=self._device.type == "cuda"))
        while True:
            yield [next(loader) for _ in range(count)]

    def describe(self, step: int) -> list[str]:
        """Name the clips of a step: by their numbers, and by what the data set's own `describe(index)` says, where it has one."""
        describe_clip = getattr(self._dataset, "describe", None)
        micro_steps = range((step - 1) * self._options.gradient_accumulation, step * self._options.gradient_accumulation)
        indices = [index for micro_step in micro_steps for index in self._sampler.indices(micro_step)]
        return [f"clip {index}" + (f" ({describe_clip(index)})" if describe_clip else "") for index in indices]


def build_loader(dataset: Dataset[Any], sampler: StepSampler, *, num_workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Load the sampler's batches, in its order, in this process (0) or in worker processes."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        # fork copies the locks of running threads (ffmpeg, Arrow) into the worker, where nobody frees them.
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=ignore_interrupt if num_workers else None,
        pin_memory=pin_memory,
    )


def spread(dataset: Dataset[Any], max_items: int) -> Subset[Any]:
    """Choose at most max_items items, evenly over the data set, always the same ones."""
    size = len(dataset)  # type: ignore[arg-type]
    return Subset(dataset, np.linspace(0, size - 1, min(size, max_items)).round().astype(int).tolist())


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's global generators from the three numbers."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed((int(words[0]) << 31) | (int(words[1]) >> 1))
