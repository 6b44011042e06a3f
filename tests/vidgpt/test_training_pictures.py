"""The picture of a training transformer shows what it would have drawn, and the training command keeps it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_model as load_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.regimes import teacher_forced_scores
from vidgpt.train import main as train_gpt
from vidgpt.training_pictures import MOST_FRAMES, drawing, likeliest_tokens, load_decoder
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel
from vidtok.runner import Runner
from vidtok.tokens import TokenDataset, TokenRow, TokenWriter
from vidtok.video import to_frames

RUN = ["max_steps=3", "batch_size=2", "warmup_steps=1", "checkpoint_every=1", "evaluate_every=2", "evaluation_clips=2"]
# Steps so large that neither the averaged weights nor the actions are without effect.
RUN += ["precision=fp32", "lr=0.05", "ema_decay=0.9", "use_actions=true", "trackers=[tensorboard]"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
FRAMES = 10
NUM_ACTIONS = 3


def small_model(factors: list[int], digits: str) -> VidGPTForCausalLM:
    """Give a model whose every weight counts: a fresh one leaves its branches out."""
    torch.manual_seed(0)
    config = VidGPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, grid_height=2, grid_width=3, window=FRAMES,
        codebook_size=int(np.prod(factors)), factors=factors, digits=digits, num_actions=NUM_ACTIONS,
    )  # fmt: skip
    model = VidGPTForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(("factors", "digits"), [([16], "slots"), ([4, 4], "slots"), ([4, 4], "parallel")])
def test_the_likeliest_tokens_are_those_the_scores_count_as_hits(factors: list[int], digits: str) -> None:
    model = small_model(factors, digits)
    layout = model.model.layout
    # The true tokens are made the model's own first choice at half of the places, so that there are hits and misses.
    indices = torch.randint(16, (2, FRAMES, 2, 3), generator=torch.Generator().manual_seed(1))
    actions = torch.randint(NUM_ACTIONS, (2, FRAMES), generator=torch.Generator().manual_seed(2))
    found = likeliest_tokens(model, layout, indices, actions)
    assert found.shape == (2, FRAMES - 1, 2, 3) and len(found.unique()) > 4
    for frame in range(1, FRAMES, 2):
        indices[:, frame] = likeliest_tokens(model, layout, indices, actions)[:, frame - 1]
    found = likeliest_tokens(model, layout, indices, actions)
    hits = teacher_forced_scores(model, layout, indices, actions).top1
    assert torch.equal((found == indices[:, 1:]).double(), hits) and 0.1 < hits.mean() < 0.9
    assert not torch.equal(likeliest_tokens(model, layout, indices, torch.zeros_like(actions)), found)


def write_dataset(folder: Path) -> VidTokModel:
    """Write tokens with their tokenizer, whose frames are 15 x 23 and so smaller than its grid."""
    torch.manual_seed(0)
    tokenizer = VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16, quantizer="fsq")).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stride = tokenizer.config.stride_t
    card = Card(
        tokenizer_fingerprint="0123abcd", codebook_size=tokenizer.codebook_size, grid_height=2, grid_width=3, stride_t=stride,
        stride_s=tokenizer.config.stride_s, fps=10.0, frame_height=15, frame_width=23, num_actions=NUM_ACTIONS, data_name="toy",
        manifest_hash="abcd",
    )  # fmt: skip
    with TokenWriter(folder, card, 8) as writer:
        for number, split in enumerate(["train"] * 4 + ["validation"] * 2):
            indices = torch.randint(16, (FRAMES, 2, 3), generator=torch.Generator().manual_seed(number))
            actions, frames = (number + torch.arange(FRAMES)) % NUM_ACTIONS, 1 + (FRAMES - 1) * stride
            row = TokenRow(source=f"clip-{number}", start=0.0, split=split, frames=frames, indices=indices, actions=actions)
            writer.add(row)
        writer.finish()
    save_model(tokenizer, folder / "tokenizer")
    return tokenizer


def test_vidgpt_train_keeps_pictures_of_a_held_out_clip(tmp_path: Path) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "gpt"
    write_dataset(tokens)
    train_gpt([f"tokens={tokens}", f"run_dir={run}", *MODEL, *RUN])
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("samples/real_over_likeliest")
    assert [event.step for event in shown] == [2, 3]
    pictures = [np.asarray(Image.open(run / "samples" / f"step_00000{step}.png")) for step in (2, 3)]
    for event, picture in zip(shown, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)
        assert picture.shape == (2 * 15, MOST_FRAMES * 23, 3)
        # The first frame is given, the others are the model's.
        np.testing.assert_array_equal(picture[:15, :23], picture[15:, :23])
        assert (picture[:15, 23:] != picture[15:, 23:]).any()
    decoder = load_decoder(tokens, torch.device("cpu"), print)
    assert decoder is not None
    clip = TokenDataset(tokens, "validation", FRAMES)[0]
    real, actions = clip["indices"][None], clip["actions"][None]
    frames = to_frames(decoder.decode(real[:, :MOST_FRAMES])[0][:, :: decoder.config.stride_t, :15, :23])
    np.testing.assert_array_equal(pictures[0][:15], np.concatenate(list(frames), axis=1))
    # What model/, which is averaged, draws behind the actions is what the picture of its step shows.
    (state,) = (run / "checkpoints" / "step_000003").glob("*.json")
    step = json.loads(state.read_text())["best_step"]
    model = load_model(VidGPTForCausalLM, run / "model")

    def draw(actions: torch.Tensor) -> np.ndarray:
        return drawing(decoder, model, model.model.layout, Card.load(tokens), real, actions)()

    np.testing.assert_array_equal(draw(actions), pictures[step - 2])
    assert (draw(torch.zeros_like(actions)) != draw(actions)).any()
    averaged = draw(actions)
    load_weights(model, run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
    assert (draw(actions) != averaged).any()


def test_a_damaged_tokenizer_costs_the_pictures_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, shown, blind = tmp_path / "tokens", tmp_path / "shown", tmp_path / "blind"
    write_dataset(tokens)
    train_gpt([f"tokens={tokens}", f"run_dir={shown}", *MODEL, *RUN])
    assert "no pictures" not in capsys.readouterr().out
    (tokens / "tokenizer" / "model.safetensors").write_bytes(b"cut")
    # A new run, and one that was begun while the tokenizer was whole.
    for run, steps in ((blind, 3), (shown, 4)):
        train_gpt([f"tokens={tokens}", f"run_dir={run}", *MODEL, *RUN, f"max_steps={steps}"])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "no pictures" in line]
        assert line.startswith(f"no pictures in samples/: {tokens / 'tokenizer'} cannot be loaded")
        assert (run / "checkpoints" / f"step_00000{steps}").is_dir()
    assert not list((blind / "samples").iterdir())
    assert sorted(path.name for path in (shown / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]
    weights = [(run / "checkpoints" / "step_000003" / "model.safetensors").read_bytes() for run in (shown, blind)]
    assert weights[0] == weights[1]


def test_only_the_process_that_draws_loads_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "gpt"
    write_dataset(tokens)
    monkeypatch.setattr(Runner, "is_main", False)
    train_gpt([f"tokens={tokens}", f"run_dir={run}", *MODEL, *RUN])
    assert (run / "model" / "config.json").is_file() and not list((run / "samples").iterdir())


def test_tokens_without_a_tokenizer_of_ours_have_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "model.safetensors").write_bytes(b"weights")
    said: list[str] = []
    assert load_decoder(tmp_path, torch.device("cpu"), said.append) is None
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "emu3_vqgan"}')
    assert load_decoder(tmp_path, torch.device("cpu"), said.append) is None and not said
    for damaged in ('{"model_type": "vidtok"}', "{", ""):
        (tmp_path / "tokenizer" / "config.json").write_text(damaged)
        assert load_decoder(tmp_path, torch.device("cpu"), said.append) is None
    assert len(said) == 3 and all("tokenizer" in line and "\n" not in line for line in said)
