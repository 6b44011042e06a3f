"""A cache that is told positions, under random schedules, against a plain dictionary of (row, position).

After every step, what may be read is what the dictionary holds, bit for bit, and everything else is filled with NaN, so that a stale or
empty slot that is read anywhere shows. Caches broken on purpose fail the same schedules.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import Tensor

from vidgpt.cache import EMPTY, SlotCache

LAYERS, HEADS, DIM = 3, 2, 4
States = list[tuple[Tensor, Tensor]]  # of every layer: keys and values (heads, dim) of one token


class PassFailed(Exception):
    pass


class Plain:
    """What a SlotCache promises, a row a dictionary; position p takes the place of the one a round before."""

    def __init__(self, num_slots: int, sinks: int, rows: int) -> None:
        self.num_slots, self.sinks = num_slots, sinks
        self.rows: list[dict[int, States]] = [{} for _ in range(rows)]

    def slot(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % (self.num_slots - self.sinks)

    def drop(self, row: int, position: int) -> None:
        """Lose what stands where a position is written."""
        for other in [other for other in self.rows[row] if self.slot(other) == self.slot(position)]:
            del self.rows[row][other]

    def keep(self, is_kept) -> None:
        self.rows = [{p: states for p, states in held.items() if is_kept(row, p)} for row, held in enumerate(self.rows)]


class Schedule:
    """Does the same random steps to a SlotCache and to a Plain one, and compares them."""

    def __init__(self, cache_class: type[SlotCache], seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, self.num_slots = self.random.randint(1, 3), self.random.randint(5, 9)
        sinks = self.random.randint(0, 2)
        self.cache = cache_class(LAYERS, self.num_slots, sink_slots=sinks)
        self.plain = Plain(self.num_slots, sinks, rows)
        # Half of the schedules stay within the slots, the others go round.
        self.highest = self.random.choice([self.num_slots - 1, 4 * self.num_slots])
        self.end = 0

    def states(self, rows: int, count: int) -> list[tuple[Tensor, Tensor]]:
        shape = (2, rows, HEADS, count, DIM)
        return [tuple(torch.randn(shape, generator=self.generator).unbind()) for _ in range(LAYERS)]

    def run(self, steps: int) -> None:
        self.append()
        for _ in range(steps):
            weights = {
                self.write: 8,
                self.fail: 2,
                self.forget: 2,
                self.evict: 1,
                self.rewind: 1,
                self.select: 1,
                self.repeat: 1,
                self.reset: 0.3,
            }
            self.random.choices(list(weights), list(weights.values()))[0]()
            self.compare()
            self.poison()

    def append(self) -> None:
        """Read some tokens without saying where, sometimes taking a few back."""
        count = self.random.randint(0, self.num_slots - 1)
        states = self.states(len(self.plain.rows), count)
        for layer, (keys, values) in enumerate(states):
            self.cache.update(keys, values, layer)
        kept = self.random.randint(0, count)
        self.cache.rewind(kept)
        for row, held in enumerate(self.plain.rows):
            held.update({p: [(keys[row, :, p], values[row, :, p]) for keys, values in states] for p in range(kept)})
        self.end = kept

    def positions(self, count: int) -> list[int]:
        """Choose positions of one row whose slots differ: any that could still be there, and the next ones."""
        newest = min(self.end + 2, self.highest)
        candidates = list(range(max(0, newest - self.num_slots), newest + 1))
        self.random.shuffle(candidates)
        chosen = {self.plain.slot(position): position for position in candidates}
        return sorted(self.random.sample(list(chosen.values()), min(count, len(chosen))))

    def plan(self) -> Tensor:
        """Choose positions (B or 1, n)."""
        alike = self.random.random() < 0.4
        rows, count = 1 if alike else len(self.plain.rows), self.random.randint(1, 4)
        lists = [self.positions(count) for _ in range(rows)]
        return torch.tensor([some[: min(map(len, lists))] for some in lists])

    def write(self, failing_layer: int = LAYERS) -> None:
        positions = self.plan()
        rows, count = len(self.plain.rows), positions.shape[1]
        self.end = max(self.end, int(positions.max()) + 1)
        states, everyone = self.states(rows, count), positions.expand(rows, -1)
        for row in range(rows):
            for position in everyone[row].tolist():
                self.plain.drop(row, position)
        with suppress(PassFailed), self.cache.writing(positions, self.end + self.random.randint(0, 3)) as in_slots:
            read = []
            for layer, (keys, values) in enumerate(states):
                if layer == failing_layer:
                    raise PassFailed
                read.append(self.cache.update(keys, values, layer))
            for row in range(rows):
                for column in range(count):
                    found = [(keys[row, :, column], values[row, :, column]) for keys, values in states]
                    self.plain.rows[row][int(everyone[row, column])] = found
            assert {keys.shape[2] for keys, _ in read} == {in_slots.shape[1]}
            self.compare_slots(in_slots, read)

    def fail(self) -> None:
        self.write(failing_layer=self.random.randint(0, LAYERS - 1))

    def bounds(self) -> Tensor:
        rows = self.random.choice([1, len(self.plain.rows)])
        return torch.tensor([self.random.randint(0, self.end) for _ in range(rows)])

    def forget(self) -> None:
        first = self.bounds()
        self.cache.forget(first)
        self.plain.keep(lambda row, position: position < first.expand(len(self.plain.rows))[row])

    def evict(self) -> None:
        last = self.bounds()
        self.cache.evict(last)
        self.plain.keep(lambda row, p: p < self.plain.sinks or p >= last.expand(len(self.plain.rows))[row])

    def rewind(self) -> None:
        length = self.random.randint(0, self.end)
        self.compare()  # from here on the cache is told its positions
        self.cache.rewind(length)
        self.plain.keep(lambda row, position: position < length)

    def select(self) -> None:
        rows = [self.random.randrange(len(self.plain.rows)) for _ in range(self.random.randint(1, 3))]
        self.random.choice([self.cache.reorder_cache, self.cache.batch_select_indices])(torch.tensor(rows))
        self.plain.rows = [dict(self.plain.rows[row]) for row in rows]

    def repeat(self) -> None:
        count = 1 if len(self.plain.rows) > 3 else 2
        self.random.choice([self.cache.repeat_rows, self.cache.batch_repeat_interleave])(count)
        self.plain.rows = [dict(held) for held in self.plain.rows for _ in range(count)]

    def reset(self) -> None:
        self.cache.reset()
        self.plain.rows, self.end = [{} for _ in self.plain.rows], 0
        self.append()

    def compare(self) -> None:
        """Look with a pass of no tokens."""
        nothing = torch.zeros(1, 0, dtype=torch.long)
        with self.cache.writing(nothing, 0) as in_slots:
            states = self.states(len(self.plain.rows), 0)
            read = [self.cache.update(keys, values, layer) for layer, (keys, values) in enumerate(states)]
        self.compare_slots(in_slots, read)

    def compare_slots(self, in_slots: Tensor, read: list[tuple[Tensor, Tensor]]) -> None:
        in_slots = in_slots.expand(len(self.plain.rows), -1)
        for row, held in enumerate(self.plain.rows):
            slots = (in_slots[row] != EMPTY).nonzero().flatten().tolist()
            assert sorted(in_slots[row, slots].tolist()) == sorted(held)
            for layer, (keys, values) in enumerate(read):
                for slot in slots:
                    key, value = held[int(in_slots[row, slot])][layer]
                    assert torch.equal(keys[row, :, slot], key)
                    assert torch.equal(values[row, :, slot], value)
                if held:
                    self.compare_attention(
                        keys[row], values[row], in_slots[row] != EMPTY, [both[layer] for both in held.values()]
                    )

    def compare_attention(self, keys: Tensor, values: Tensor, is_read: Tensor, held: States) -> None:
        query = torch.linspace(-1, 1, DIM)
        mixed = attend(query, keys, values, is_read)
        plain_keys, plain_values = (torch.stack(states, dim=1) for states in zip(*held, strict=True))
        torch.testing.assert_close(mixed, (plain_keys @ query).softmax(-1)[:, None] @ plain_values)

    def poison(self) -> None:
        """Fill all slots that nobody may read."""
        is_held = torch.zeros(len(self.plain.rows), self.num_slots, dtype=torch.bool)
        for row, held in enumerate(self.plain.rows):
            is_held[row, [self.plain.slot(position) for position in held]] = True
        for layer in self.cache.layers:
            layer.keys.masked_fill_(~is_held[:, None, :, None], float("nan"))
            layer.values.masked_fill_(~is_held[:, None, :, None], float("nan"))


def attend(query: Tensor, keys: Tensor, values: Tensor, is_read: Tensor) -> Tensor:
    """Give (heads, 1, dim): attention of one query over slots (heads, slots, dim), in which NaN shows where it is read."""
    scores = (keys @ query).masked_fill(~is_read, float("-inf"))
    return scores.softmax(-1)[:, None] @ values.masked_fill(~is_read[None, :, None], 0)


@pytest.mark.parametrize("seed", range(25))
def test_what_may_be_read_is_what_was_written_and_not_taken_back(seed: int) -> None:
    Schedule(SlotCache, seed).run(steps=30)


class NeverForgets(SlotCache):
    def forget(self, first: Tensor) -> None:
        self._known(first)


class NeverEvicts(SlotCache):
    def evict(self, last: Tensor) -> None:
        self._known(last)


class TakesSinks(SlotCache):
    @contextmanager
    def writing(self, positions: Tensor, end: int) -> Iterator[Tensor]:
        sinks, self.sink_slots = self.sink_slots, 0
        with super().writing(positions, end) as in_slots:
            self.sink_slots = sinks
            yield in_slots


class KeepsWhatAFailedPassWrote(SlotCache):
    @contextmanager
    def writing(self, positions: Tensor, end: int) -> Iterator[Tensor]:
        with super().writing(positions, end) as in_slots:
            failure = None
            try:
                yield in_slots
            except PassFailed as error:
                failure = error
        if failure:
            raise failure


class KeepsWhatAFailedPassWroteOver(SlotCache):
    @contextmanager
    def writing(self, positions: Tensor, end: int) -> Iterator[Tensor]:
        before = self._known(positions)
        try:
            with super().writing(positions, end) as in_slots:
                yield in_slots
        except PassFailed:
            self.positions = before
            raise


class RepeatsInAnotherOrder(SlotCache):
    def repeat_rows(self, count: int) -> None:
        self.select_rows(torch.arange(len(self.layers[0].keys)).repeat(count))

    batch_repeat_interleave = repeat_rows


class LeavesPositionsBehind(SlotCache):
    def select_rows(self, rows: Tensor) -> None:
        before = self.positions
        super().select_rows(rows)
        if before is not None and len(before) >= len(rows):
            self.positions = before[: len(rows)]

    batch_select_indices = reorder_cache = select_rows


class MarksOneRowForAll(SlotCache):
    @contextmanager
    def writing(self, positions: Tensor, end: int) -> Iterator[Tensor]:
        before = self._known(positions)
        with super().writing(positions, end) as in_slots:
            yield in_slots
        if len(positions) == 1 and len(before) > 1:
            self.positions = torch.cat([self.positions[:1], before[1:]])


@pytest.mark.parametrize(
    "broken",
    [
        NeverForgets,
        NeverEvicts,
        TakesSinks,
        KeepsWhatAFailedPassWrote,
        KeepsWhatAFailedPassWroteOver,
        RepeatsInAnotherOrder,
        LeavesPositionsBehind,
        MarksOneRowForAll,
    ],
)
def test_a_broken_cache_fails_the_same_schedules(broken: type[SlotCache]) -> None:
    def fails(seed: int) -> bool:
        try:
            Schedule(broken, seed).run(steps=30)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(25))
