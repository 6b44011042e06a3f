"""A training command killed at any moment and given again ends with the weights of a run that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DATA = ["data=digits", "data.episodes=6", "data.validation_episodes=2", "data.size=32"]
RUN = [
    "max_steps=8",
    "batch_size=2",
    "checkpoint_every=1",
    "evaluate_every=4",
    "evaluation_clips=2",
    "warmup_steps=2",
    "ema_decay=0.9",
]
TOKENIZER = ["tokenizer.width=8", "tokenizer.decoder_blocks=1", "clip_frames=3", "unquantized_steps=3"]
VQ = ["tokenizer.quantizer=vq", "tokenizer.codebook_size=16", "tokenizer.codebook_dim=4"]
GAN = ["gan.weight=0.5", "gan.start=1", "gan.warmup_steps=1", "gan.ramp_steps=4", "gan.width=4", "gan.layers=2"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.window=6"]


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(module: str, *arguments: str) -> str:
    process = start(module, *arguments)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed


def kill_after(step: int, module: str, run_dir: Path, *arguments: str) -> None:
    process = start(module, f"run_dir={run_dir}", *arguments)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / f"step_{step:06d}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def last_weights(run_dir: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (run_dir / "checkpoints" / "step_000008").iterdir()
        if path.suffix == ".safetensors"
    }


@pytest.mark.parametrize("more", [[], VQ, [*VQ, *GAN]], ids=["fsq", "vq", "vq-gan"])
def test_a_killed_tokenizer_run_ends_with_the_same_weights(more: list[str], tmp_path: Path) -> None:
    arguments = [*DATA, *RUN, *TOKENIZER, *more]
    finish("vidtok.train", f"run_dir={tmp_path / 'straight'}", *arguments)
    kill_after(4, "vidtok.train", tmp_path / "killed", *arguments)
    assert "Resuming" in finish("vidtok.train", f"run_dir={tmp_path / 'killed'}", *arguments)
    assert last_weights(tmp_path / "killed") == last_weights(tmp_path / "straight") != {}
    assert ("discriminator.safetensors" in last_weights(tmp_path / "killed")) == ("gan.weight=0.5" in more)


def test_a_killed_transformer_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    finish("vidtok.train", f"run_dir={tmp_path / 'tok'}", *DATA, *RUN, *TOKENIZER)
    finish("vidtok.encode", *DATA, f"checkpoint={tmp_path / 'tok'}", f"output={tmp_path / 'tokens'}")
    arguments = [f"tokens={tmp_path / 'tokens'}", *MODEL, *RUN]
    finish("vidgpt.train", f"run_dir={tmp_path / 'straight'}", *arguments)
    kill_after(5, "vidgpt.train", tmp_path / "killed", *arguments)
    assert "Resuming" in finish("vidgpt.train", f"run_dir={tmp_path / 'killed'}", *arguments)
    assert last_weights(tmp_path / "killed") == last_weights(tmp_path / "straight") != {}
