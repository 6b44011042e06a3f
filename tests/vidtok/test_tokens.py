"""The token dataset: what is written is read, an interruption leaves no trace, and a mismatch is one sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from vidtok.card import Card, check_cards
from vidtok.tokens import TokenDataset, TokenRow, TokenWriter, longest_row

GRID = (2, 3)


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "tokenizer_fingerprint": "00112233aabbccdd",
        "codebook_size": 50,
        "grid_height": GRID[0],
        "grid_width": GRID[1],
        "stride_t": 1,
        "stride_s": 8,
        "fps": 10.0,
        "frame_height": 16,
        "frame_width": 24,
        "num_actions": 4,
        "data_name": "toy",
        "manifest_hash": "abcd",
    }
    return Card(**(values | changes))


def make_rows(lengths: tuple[int, ...] = (7, 4, 9, 5, 6), of: Card | None = None) -> list[TokenRow]:
    """Make rows of known lengths (latent frames); the last one is held out."""
    of, rows = of or card(), []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        rows.append(
            TokenRow(
                source=f"clip-{number}.mp4",
                start=0.5 * number,
                split="validation" if number == len(lengths) - 1 else "train",
                frames=of.frames_of(length),
                indices=torch.randint(of.codebook_size, (length, *GRID), generator=generator),
                actions=torch.randint(of.num_actions, (length,), generator=generator) if of.num_actions else None,
            )
        )
    return rows


def write(folder: Path, of: Card | None = None, rows: list[TokenRow] | None = None, rows_per_shard: int = 2) -> Path:
    of = of or card()
    with TokenWriter(folder, of, rows_per_shard) as writer:
        for row in (rows or make_rows(of=of))[writer.rows_done :]:
            writer.add(row)
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write(tmp_path_factory.mktemp("tokens") / "size=[16,24]")


def test_every_window_of_every_row_comes_back(dataset_folder: Path) -> None:
    dataset = TokenDataset(dataset_folder, "train", window=5)
    rows = [row for row in make_rows() if row.split == "train"]
    expected = [(row, start) for row in rows for start in range(len(row.indices) - 5 + 1)]
    assert len(dataset) == len(expected) == 3 + 0 + 5 + 1
    for index, (row, start) in enumerate(expected):
        item = dataset[index]
        assert row.actions is not None
        assert item["indices"].dtype == item["actions"].dtype == torch.int64
        assert torch.equal(item["indices"], row.indices[start : start + 5])
        assert torch.equal(item["actions"], row.actions[start : start + 5])


def test_whole_rows_are_streamed_in_order(dataset_folder: Path) -> None:
    streamed = list(TokenDataset(dataset_folder, "train", window=2).rows())
    assert [tuple(row.shape) for row in streamed] == [(1, 7, *GRID), (1, 4, *GRID), (1, 9, *GRID), (1, 5, *GRID)]
    assert all(torch.equal(row[0], written.indices) for row, written in zip(streamed, make_rows(), strict=False))


def test_a_pickled_dataset_reads_the_same(dataset_folder: Path) -> None:
    dataset = TokenDataset(dataset_folder, "train", window=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[index]["indices"], dataset[index]["indices"]) for index in range(len(dataset)))


def test_an_index_outside_the_dataset_is_refused(dataset_folder: Path) -> None:
    dataset = TokenDataset(dataset_folder, "train", window=3)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_plain_pyarrow_reads_the_shards(dataset_folder: Path) -> None:
    table = pq.read_table(sorted(dataset_folder.glob("shard-*.parquet")))
    assert table.schema.field("tokens").type.value_type == "uint16"
    assert table["source"].to_pylist() == [row.source for row in make_rows()]
    assert table["tokens"][1].as_py() == make_rows()[1].indices.flatten().tolist()


def test_the_card_counts_what_was_written(dataset_folder: Path) -> None:
    found = Card.load(dataset_folder)
    assert (found.complete, found.rows, found.frames, found.splits) == (True, 5, 31, {"train": 4, "validation": 1})
    assert found.begun() == card()


@pytest.mark.parametrize("first_frames", [1, 4])
def test_with_a_temporal_stride_a_window_begins_anywhere_in_its_row(tmp_path: Path, first_frames: int) -> None:
    of = card(stride_t=4, num_actions=0, first_frames=first_frames)
    dataset = TokenDataset(write(tmp_path, of), "train", window=5)
    assert len(dataset) == 3 + 5 + 1
    assert torch.equal(dataset[4]["indices"], make_rows(of=of)[2].indices[1:6])
    assert torch.equal(dataset[4]["actions"], torch.zeros(5, dtype=torch.int64))


def test_a_first_latent_frame_of_several_frames_counts_as_such(tmp_path: Path) -> None:
    of = card(stride_t=4, num_actions=0, first_frames=4)
    assert Card.load(write(tmp_path / "emu", of)).frames == 4 * 31
    row = replace(make_rows(of=of)[0], frames=1 + 6 * 4)
    with TokenWriter(tmp_path / "wrong", of) as writer, pytest.raises(ValueError, match="first_frames=4 and stride_t=4"):
        writer.add(row)


@pytest.mark.parametrize(("codebook_size", "dtype"), [(1 << 16, "uint16"), (1 << 31, "int32"), (1 << 40, "int64")])
def test_every_id_comes_back_however_large(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    of = card(codebook_size=codebook_size)
    rows = make_rows((3,), of)
    rows[0].indices[0, 0] = codebook_size - 1
    dataset = TokenDataset(write(tmp_path, of, rows), "validation", window=3)
    assert torch.equal(dataset[0]["indices"], rows[0].indices)
    assert str(pq.read_schema(tmp_path / "shard-00000.parquet").field("tokens").type.value_type) == dtype
    assert json.loads((tmp_path / "card.json").read_text())["value_dtype"] == dtype


def test_rows_wait_for_their_shard_as_narrow_as_they_are_written(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, card(), rows_per_shard=9) as writer:
        for row in make_rows():
            writer.add(row)
        assert sum(row.indices.nbytes for row in writer._rows) == 2 * 31 * GRID[0] * GRID[1]


@pytest.mark.parametrize("rows_before", [0, 1, 2, 3, 4])
def test_an_interrupted_encoding_ends_in_the_same_files(dataset_folder: Path, tmp_path: Path, rows_before: int) -> None:
    with TokenWriter(tmp_path, card(), rows_per_shard=2) as writer:
        for row in make_rows()[:rows_before]:
            writer.add(row)
    (tmp_path / ".tmp-shard-00009.parquet").write_bytes(b"half")
    with TokenWriter(tmp_path, card(), rows_per_shard=2) as writer:
        assert writer.rows_done == rows_before // 2 * 2
    write(tmp_path)
    assert files_of(tmp_path) == files_of(dataset_folder)


def test_an_encoding_cut_off_between_last_shard_and_card_ends_in_the_same_files(dataset_folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    Card.load(tmp_path).begun().save(tmp_path)
    write(tmp_path)
    assert files_of(tmp_path) == files_of(dataset_folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("shard", "card", ".tmp"))}


def test_finishing_twice_changes_nothing_and_adding_is_refused(tmp_path: Path) -> None:
    before = files_of(write(tmp_path))
    with TokenWriter(tmp_path, card(), rows_per_shard=2) as writer:
        assert writer.rows_done == 5
        writer.finish()
        with pytest.raises(ValueError, match="is complete with 5 rows"):
            writer.add(make_rows()[0])
    assert files_of(tmp_path) == before


def test_a_folder_of_other_tokens_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"has manifest_hash=abcd, but this command has manifest_hash=ffff: give another output"):
        TokenWriter(tmp_path, card(manifest_hash="ffff"))


def test_another_shard_size_is_refused_while_the_encoding_is_not_complete(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, card(), rows_per_shard=2) as writer:
        for row in make_rows()[:4]:
            writer.add(row)
    with pytest.raises(ValueError, match="begun with rows_per_shard=2, now it is 1"):
        TokenWriter(tmp_path, card(), rows_per_shard=1)


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, card()), pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        TokenWriter(tmp_path, card())


def test_an_encoding_without_rows_does_not_become_complete(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, card()) as writer, pytest.raises(ValueError, match="no clip that is long enough"):
        writer.finish()
    with pytest.raises(ValueError, match=r"not complete.*run its vidtok-encode command again"):
        TokenDataset(tmp_path, "train", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.full((7, *GRID), 50)}, "token ids go from 50 to 50, allowed are 0 to 49"),
        ({"indices": torch.full((7, *GRID), -1)}, "token ids go from -1"),
        ({"indices": torch.zeros(7, 3, 2, dtype=torch.int64)}, "do not fit a grid of 2x3"),
        ({"frames": 8}, "for 8 frames"),
        ({"actions": None}, "actions are missing"),
        ({"actions": torch.full((7,), 4)}, "actions go from 4 to 4, allowed are 0 to 3"),
        ({"actions": torch.zeros(6, dtype=torch.int64)}, "expected \\(7,\\)"),
    ],
)
def test_a_row_that_does_not_fit_the_card_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with TokenWriter(tmp_path, card()) as writer, pytest.raises(ValueError, match=message):
        writer.add(replace(make_rows()[0], **change))


def rewrite_card(folder: Path, **changes: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ids_outside_the_codebook_are_named_with_their_row(tmp_path: Path) -> None:
    write(tmp_path)
    rewrite_card(tmp_path, codebook_size=10, codebook_factors=[10])
    dataset = TokenDataset(tmp_path, "validation", 2)
    wrong = next(int(value) for value in make_rows()[4].indices[:2].flatten() if value >= 10)
    message = rf"token id {wrong} in the row of 'clip-4.mp4' does not fit codebook_size=10 \(0 to 9\)"
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_actions_outside_the_action_space_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    rewrite_card(tmp_path, num_actions=1)
    with pytest.raises(ValueError, match=r"does not fit num_actions=1"):
        [TokenDataset(tmp_path, "train", 2)[index] for index in range(8)]


def test_a_grid_that_is_not_the_cards_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    rewrite_card(tmp_path, grid_width=6, frame_width=48)
    with pytest.raises(ValueError, match=r"'clip-0.mp4' has grid \[2, 3\], the card \(2, 6\)"):
        TokenDataset(tmp_path, "train", 2)


def test_a_split_without_rows_names_the_splits_there_are(dataset_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no row of split 'test': it has \{'train': 4, 'validation': 1\}"):
        TokenDataset(dataset_folder, "test", 2)


@pytest.mark.parametrize("window", [0, 10])
def test_a_window_that_fits_no_row_names_the_longest(dataset_folder: Path, window: int) -> None:
    with pytest.raises(ValueError, match=r"has 9: use a window of 1 to 9, or encode longer clips"):
        TokenDataset(dataset_folder, "train", window)


@pytest.mark.parametrize(("codebook_size", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_the_highest_id_survives_in_the_narrowest_integers(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    of = card(codebook_size=codebook_size, num_actions=0)
    highest = torch.full((2, *GRID), codebook_size - 1)
    write(tmp_path, of, [TokenRow("a", 0.0, "train", 2, highest)])
    schema = pq.read_schema(tmp_path / "shard-00000.parquet")
    assert of.value_dtype == str(schema.field("tokens").type.value_type) == dtype
    assert torch.equal(TokenDataset(tmp_path, "train", 2)[0]["indices"], highest)


def test_a_dataset_encoded_anew_in_the_same_place_is_not_read_from_the_cache(tmp_path: Path) -> None:
    def first_window(ids: Tensor) -> Tensor:
        write(tmp_path, card(num_actions=0), [TokenRow("a", 0.0, "train", 2, ids)])
        return TokenDataset(tmp_path, "train", 2)[0]["indices"]

    old, new = torch.zeros(2, *GRID, dtype=torch.int64), torch.ones(2, *GRID, dtype=torch.int64)
    assert torch.equal(first_window(old), old)
    for path in tmp_path.glob("*.*"):
        if path.is_file():
            path.unlink()
    assert torch.equal(first_window(new), new)


def test_cards_of_one_tokenizer_agree_whatever_the_data() -> None:
    ours, theirs = card(), card(data_name="other", manifest_hash="ffff", complete=True, rows=3)
    check_cards(ours, "the checkpoint", theirs, "tokens/")
    assert ours != theirs


def test_cards_of_two_tokenizers_are_refused_in_one_sentence_with_both_sides() -> None:
    message = r"^the checkpoint has fps=10.0, but tokens/ has fps=5.0: both must come from one tokenizer"
    with pytest.raises(ValueError, match=message):
        check_cards(card(), "the checkpoint", card(fps=5.0, num_actions=9), "tokens/")


def test_a_card_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    written = card(complete=True, rows=3, frames=40, splits={"train": 3})
    written.save(tmp_path)
    assert Card.load(tmp_path) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format_version 2, this version reads 1"),
        ({"format_version": None}, "has format_version None"),
        ({"colour": "red"}, "does not know 'colour'"),
        ({"value_dtype": "int32"}, "says value_dtype=int32, but codebook_size=50 needs uint16"),
    ],
)
def test_a_card_of_another_format_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    card().save(tmp_path)
    rewrite_card(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        Card.load(tmp_path)


def test_a_folder_without_a_card_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"card.json does not exist: give a folder"):
        Card.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": "fifty"}, "has codebook_size='fifty', which is not of type int"),
        ({"codebook_size": True}, "has codebook_size=True, which is not of type int"),
        ({"stride_t": 1.5}, "has stride_t=1.5, which is not of type int"),
        ({"fps": "25"}, "has fps='25', which is not of type float"),
        ({"data_name": None}, "has data_name=None, which is not of type str"),
        ({"complete": "yes"}, "has complete='yes', which is not of type bool"),
        ({"splits": ["train"]}, r"has splits=\['train'\], which is not of type dict"),
        ({"splits": {"train": "all"}}, "which is not of type dict"),
    ],
)
def test_a_card_with_a_value_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    card().save(tmp_path)
    rewrite_card(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        Card.load(tmp_path)


def test_a_card_of_before_the_clips_were_recorded_is_read(tmp_path: Path) -> None:
    card(fps=25).save(tmp_path)
    path = tmp_path / "card.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if "clip_" not in key}))
    assert Card.load(tmp_path) == card(fps=25)


def open_in_every_way(folder: Path) -> Iterator[str]:
    """Give the sentence of everything that reads the folder."""
    for act in (
        lambda: TokenDataset(folder, "train", 2),
        lambda: longest_row(folder, "train"),
        lambda: TokenWriter(folder, card(), rows_per_shard=2),
    ):
        with pytest.raises(ValueError) as caught:
            act()
        yield str(caught.value)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([0], "shard-00000.parquet is gone"),
        ([1], "shard-00001.parquet is gone"),
        ([2], "has 4 rows {'train': 4}, but its card.json counts 5 {'train': 4, 'validation': 1}: a shard is gone or replaced"),
        ([0, 1, 2], "has 0 rows {}, but its card.json counts 5"),
    ],
)
def test_a_shard_that_is_gone_is_noticed(tmp_path: Path, gone: list[int], message: str) -> None:
    write(tmp_path)
    for number in gone:
        (tmp_path / f"shard-{number:05d}.parquet").unlink()
    assert all(message in sentence and "\n" not in sentence for sentence in open_in_every_way(tmp_path))


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: b"garbage" * 9, lambda old: old[: len(old) // 2]])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path)
    shard = tmp_path / "shard-00001.parquet"
    shard.write_bytes(damage(shard.read_bytes()))
    assert set(open_in_every_way(tmp_path)) == {f"{shard} is damaged: copy the folder again, or encode into a new one."}


def test_a_shard_damaged_in_its_tokens_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "shard-00001.parquet"
    column = pq.read_metadata(shard).row_group(0).column(7)
    assert column.path_in_schema.startswith("tokens")
    content, start = bytearray(shard.read_bytes()), column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001.parquet is damaged: copy the folder again"):
        TokenDataset(tmp_path, "train", 2)


def test_the_shards_of_an_encoding_that_goes_on_must_all_be_there(tmp_path: Path) -> None:
    write(tmp_path, rows_per_shard=1)
    Card.load(tmp_path).begun().save(tmp_path)
    (tmp_path / "shard-00001.parquet").unlink()
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001.parquet is gone"):
        TokenWriter(tmp_path, card(), rows_per_shard=1)
    assert files_of(tmp_path) == before


def test_the_longest_row_of_a_split_that_is_not_there_is_zero_only_if_asked(dataset_folder: Path) -> None:
    assert (longest_row(dataset_folder, "train"), longest_row(dataset_folder, "validation")) == (9, 6)
    assert longest_row(dataset_folder, "test", is_optional=True) == 0
    with pytest.raises(ValueError, match=r"no row of split 'test': it has \{'train': 4, 'validation': 1\}"):
        longest_row(dataset_folder, "test")
