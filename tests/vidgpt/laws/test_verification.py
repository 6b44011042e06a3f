from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import net
from vidgpt.laws import invariants as laws
from vidgpt.laws.verification import LAWS, make_subject
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import VerifyOptions
from vidgpt.verify import main
from vidtok.card import Card
from vidtok.folders import save_model
from vidtok.tokens import TokenRow, TokenWriter


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt"
    save_model(net(), folder)
    card().save(folder)
    return folder


def card(**changes: object) -> Card:
    sizes = {"codebook_size": 12, "grid_height": 3, "grid_width": 4, "codebook_factors": [12], "num_actions": 0}
    frame = {"stride_t": 1, "stride_s": 8, "fps": 10.0, "frame_height": 24, "frame_width": 32}
    names = {"tokenizer_fingerprint": "0123456789abcdef", "data_name": "files", "manifest_hash": "m"}
    return Card(**{**sizes, **frame, **names, **changes})


def write_tokens(folder: Path, indices: Tensor, **changes: object) -> Path:
    with TokenWriter(folder, card(**changes)) as writer:
        for number, clip in enumerate(indices):
            writer.add(TokenRow(f"clip {number}", 0.0, "validation", len(clip), clip))
        writer.finish()
    return folder


def test_the_command_prints_a_line_a_law_and_ends_well(checkpoint: Path, capsys) -> None:
    main([f"checkpoint={checkpoint}", "device=cpu", "clips=2", "frames=5"])
    lines = capsys.readouterr().out.splitlines()
    assert "2 clips of 5 frames, 2 given, random ids" in lines[0]
    assert len(lines) == len(LAWS) + 2 and lines[-1] == "16 laws hold, 0 do not, 1 are not applicable"
    assert lines[1].startswith("pass  cached = uncached: largest difference ") and lines[1].endswith("bound 1e-04")
    assert sum(line.startswith("pass  ") for line in lines) == 16 and sum(line.startswith("n/a   ") for line in lines) == 1


def test_the_command_ends_with_status_1_where_a_law_is_broken(checkpoint: Path, capsys, monkeypatch) -> None:
    load = laws.load_model

    def lossy(*arguments: object) -> VidGPTForCausalLM:
        model = load(*arguments)
        torch.nn.init.ones_(model.model.layers[1].input_layernorm.weight)
        return model

    monkeypatch.setattr(laws, "load_model", lossy)
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", "device=cpu"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("FAIL")] == ["FAIL  saved and loaded = as it was"]
    assert lines[-1] == "15 laws hold, 1 do not, 1 are not applicable"


def test_contexts_come_from_a_token_dataset(checkpoint: Path, tmp_path: Path, capsys) -> None:
    indices = torch.randint(0, 12, (3, 5, 3, 4), generator=torch.Generator().manual_seed(2))
    tokens = write_tokens(tmp_path / "tokens", indices)
    subject = make_subject(net(), VerifyOptions(str(checkpoint), tokens=str(tokens), clips=2, frames=5), Card.load(checkpoint))
    assert torch.equal(subject.indices, indices[[0, 2]])
    main([f"checkpoint={checkpoint}", f"tokens={tokens}", "device=cpu"])
    assert f"tokens of {tokens}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["checkpoint=nowhere"], "checkpoint nowhere does not exist"),
        (["device=tpu9"], "device=tpu9 is not there: give cpu, cuda"),
        (["frames=1"], "frames=1"),
        (["clips=0"], "clips=0"),
        (["tokens=other"], "tokenizer_fingerprint"),
    ],
)
def test_a_mistake_of_the_user_is_one_sentence(keys, sentence, checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    if keys == ["tokens=other"]:
        monkeypatch.chdir(tmp_path)
        write_tokens(tmp_path / "other", torch.zeros(1, 4, 3, 4, dtype=torch.long), tokenizer_fingerprint="fedcba9876543210")
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", *keys])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_more_frames_than_the_window_are_cut_to_it() -> None:
    assert make_subject(net(), VerifyOptions("here", frames=40)).frames == 6
