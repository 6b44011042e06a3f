"""Folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidtok.run.checkpoints import clean, describe_newest, read_state, write_folder


def _write(folder: Path, text: str) -> None:
    (folder / "a").write_text(text)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        _write(folder, "new")
        raise KeyboardInterrupt

    write_folder(tmp_path / "model", lambda folder: _write(folder, "old"))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", fill)
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_cleaning_brings_back_a_folder_whose_replacement_was_cut_off(tmp_path: Path) -> None:
    for name in (".old-model", ".tmp-model"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, name)
    clean(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == ".old-model"


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="has checkpoint format 99, this version reads 1"):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", '{"format_version": 1, "colour": "red"}'])
def test_a_damaged_state_names_the_checkpoint_and_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path} is damaged \(.*\): delete that folder, and the run goes on from"):
        read_state(tmp_path)


def test_the_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    assert describe_newest(tmp_path) == "there is no checkpoint yet"
    for name in ("step_999999", "step_1000000", "step_2000000.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert describe_newest(tmp_path) == f"the last checkpoint is {tmp_path / 'step_1000000'}"
