"""Rules of attention over positions, compared with what a plain loop over frames, rows and times of drawing says."""

import itertools

import pytest
import torch

from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout
from vidgpt.masks import causal, diagonal, rule_of, sliding

GRIDS = [TokenLayout(20, 3, 4), TokenLayout(20, 2, 2, factors=(4, 5)), TokenLayout(20, 4, 3, factors=(4, 5), digits="parallel")]


def table(rule, layout: TokenLayout, frames: int = 3) -> torch.Tensor:
    positions = torch.arange(frames * layout.tokens_per_frame)
    return rule(positions[:, None], positions)


def drawn_at(layout: TokenLayout, window: int, delay: int, frames: int = 3) -> dict[int, int]:
    """The pass that draws each position: a row begins `window` passes behind the one above; leads are there before their frame."""
    columns, size = layout.width * layout.slots_per_place, layout.tokens_per_frame
    frame_takes = delay or columns + window * (layout.height - 1)
    times = {}
    for frame, row, column in itertools.product(range(frames), range(layout.height), range(columns)):
        times[frame * size] = frame * frame_takes - 1
        times[frame * size + 1 + row * columns + column] = frame * frame_takes + window * row + column
    return times


@pytest.mark.parametrize("layout", GRIDS, ids=["digit", "slots", "parallel"])
@pytest.mark.parametrize("delay", [0, 1, 5, 7, 99])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_diagonal_query_sees_what_is_drawn_in_its_row_and_above_before_it_predicts(window, delay, layout) -> None:
    columns, size = layout.width * layout.slots_per_place, layout.tokens_per_frame
    whole = columns + min(window, columns) * (layout.height - 1)
    times = drawn_at(layout, min(window, columns), min(delay, whole) or whole)
    seen, starts = (table(diagonal(layout, window, delay, begins), layout) for begins in (False, True))

    def row_of(position: int) -> int:
        return position // size * layout.height + max(0, position % size - 1) // columns

    for target in (position for position in times if position % size):
        query, begins_row = target - 1, target % size != 1 and (target % size - 1) % columns == 0
        expected = [row_of(key) <= row_of(target) and times[key] < times[target] for key in sorted(times)]
        assert (starts if begins_row else seen)[query].tolist() == expected
        # Seen from its own place the end of a row sees too much: it knows what is drawn in the row that it ends.
        assert not begins_row or window >= columns or seen[query].tolist() != expected


@pytest.mark.parametrize("layout", GRIDS, ids=["digit", "slots", "parallel"])
def test_a_window_of_a_row_or_more_is_causal(layout: TokenLayout) -> None:
    columns = layout.width * layout.slots_per_place
    for window in (columns, columns + 1, 10 * columns):
        assert torch.equal(table(diagonal(layout, window), layout), table(causal, layout))
    assert not torch.equal(table(diagonal(layout, columns - 2), layout), table(causal, layout))


@pytest.mark.parametrize(("frames", "sinks"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_a_sliding_window_shows_the_newest_frames_and_the_first(frames: int, sinks: int) -> None:
    layout = TokenLayout(20, 1, 2)
    seen = table(sliding(layout, frames, sinks), layout, frames=6)
    for query, key in itertools.product(range(18), range(18)):
        assert bool(seen[query, key]) == (query // 3 - key // 3 < frames or key // 3 < sinks)


@pytest.mark.parametrize("base", ["causal", "diagonal"])
def test_a_models_rule_is_its_window_and_that_of_the_plan(base: str) -> None:
    config = VidGPTConfig(codebook_size=20, grid_height=3, grid_width=4, window=5, attention_frames=2, sink_frames=1)
    layout = TokenLayout.from_config(config)
    rule = causal if base == "causal" else diagonal(layout, 1)
    both = table(rule, layout, 5) & table(sliding(layout, 2, 1), layout, 5)
    assert torch.equal(table(rule_of(config, rule), layout, 5), both)
    assert not torch.equal(both, table(rule, layout, 5))
    config.attention_frames = config.sink_frames = 0
    assert rule_of(config, rule) is rule


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attention_frames": -1}, r"attention_frames=-1 is not from 0 \(all frames\) to window=5"),
        ({"attention_frames": 6}, r"attention_frames=6 is not from 0 \(all frames\) to window=5"),
        ({"sink_frames": 1}, "sink_frames=1 keeps frames visible that attention_frames=0 would hide"),
        ({"sink_frames": -1, "attention_frames": 2}, "sink_frames=-1 keeps"),
    ],
)
def test_an_impossible_window_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        VidGPTConfig(window=5, **options)
