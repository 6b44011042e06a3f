import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vidgpt.conftest import CARD, net, write_tokens
from vidgpt.laws import invariants as laws
from vidgpt.laws.verification import LAWS, make_subject
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import VerifyOptions
from vidgpt.verify import main
from vidtok.folders import save_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt"
    save_model(net(), folder)
    CARD.save(folder)
    return folder


def test_the_command_prints_a_line_a_law_and_ends_well(checkpoint: Path, capsys) -> None:
    main([f"checkpoint={checkpoint}", "device=cpu", "clips=2", "frames=5"])
    lines = capsys.readouterr().out.splitlines()
    assert "2 clips of 5 frames, 2 given, random ids" in lines[0]
    assert len(lines) == len(LAWS) + 2 and lines[-1] == "18 laws hold, 0 do not, 2 are not applicable"
    assert lines[1].startswith("pass  cached = uncached: largest difference ") and lines[1].endswith("bound 1e-04")
    assert sum(line.startswith("pass  ") for line in lines) == 18 and sum(line.startswith("n/a   ") for line in lines) == 2


def test_the_command_says_what_bf16_may_differ_by(checkpoint: Path, capsys) -> None:
    main([f"checkpoint={checkpoint}", "device=cpu", "clips=2", "precision=bf16"])
    lines = capsys.readouterr().out.splitlines()
    assert "on cpu, bf16: 2 clips" in lines[0] and lines[-1] == "17 laws hold, 0 do not, 3 are not applicable"
    rounding, bound = (float(found) for found in re.findall(r"\d\.?\d*e-\d+", lines[1] + lines[2].partition("bound")[2]))
    assert "bf16 puts the uncached model's own logits up to" in lines[1] and bound == pytest.approx(4 * rounding, rel=0.2)


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
    assert lines[-1] == "17 laws hold, 1 do not, 2 are not applicable"


def test_contexts_come_from_a_token_dataset(checkpoint: Path, tmp_path: Path, capsys) -> None:
    indices = torch.randint(0, 12, (3, 5, 3, 4), generator=torch.Generator().manual_seed(2))
    tokens = write_tokens(tmp_path / "tokens", splits=["validation"] * 3, given=list(indices))
    subject = make_subject(net(), VerifyOptions(str(checkpoint), tokens=str(tokens), clips=2, frames=5))
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
        (["precision=fp16"], "precision=fp16 is not known: give fp32 or bf16"),
        (["tokens=other"], "tokenizer_fingerprint"),
    ],
)
def test_a_mistake_of_the_user_is_one_sentence(keys, sentence, checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    if keys == ["tokens=other"]:
        monkeypatch.chdir(tmp_path)
        write_tokens(tmp_path / "other", replace(CARD, tokenizer_fingerprint="fedcba9876543210"))
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", *keys])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_more_frames_than_the_window_are_cut_to_it() -> None:
    assert make_subject(net(), VerifyOptions("here", frames=40)).frames == 6
