"""Two processes train what one process trains on the joined batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
from vidtok.run_options import RunOptions
from vidtok.runner import Runner, build_optimizer

def compute_loss(model, batch):
    return (model(batch[0]) - batch[0]).pow(2).mean(), {}

for max_steps in (3, 6):  # the second start resumes the first
    options = RunOptions(
        run_dir=sys.argv[1], batch_size=int(sys.argv[2]), max_steps=max_steps, lr=0.01, warmup_steps=0, min_lr_ratio=1.0,
        checkpoint_every=2, evaluate_every=3, log_every=1, ema_decay=0.5, num_workers=0, precision="fp32",
    )
    with Runner(options, {"batch_size": 0}, "test") as runner:
        model = nn.Linear(6, 6)
        points = TensorDataset(torch.randn(20, 6, generator=torch.Generator().manual_seed(7)))
        wrapped, optimizer = runner.prepare(model, build_optimizer(model, options))
        save = lambda folder: torch.save(model.state_dict(), folder / "weights.pt")
        for step, batches in runner.steps(points):
            logs = runner.update(wrapped, optimizer, batches, compute_loss)
            runner.after_step(step, logs, lambda: {"validation_loss": float(model.weight.abs().sum())}, save)
"""


def launch(folder: Path, num_processes: int, batch_size: int) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"] if num_processes > 1 else []
    command = [sys.executable, *launcher, str(script), str(folder / f"run-{num_processes}"), str(batch_size)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3], env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    for num_processes, batch_size in ((1, 8), (2, 4)):
        done = launch(tmp_path, num_processes, batch_size)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("all steps are done") == 2
    last = Path("checkpoints") / "step_000006" / "model.safetensors"
    alone, together = (load_file(tmp_path / f"run-{count}" / last) for count in (1, 2))
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-5, atol=1e-6)
    texts = [(tmp_path / f"run-{count}" / "metrics.jsonl").read_text() for count in (1, 2)]
    curves = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in curves]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.slow
def test_a_refusal_ends_every_process(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run-2" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run-2" / "config.yaml").write_text("batch_size: 5")
    (tmp_path / "run-2" / "run.json").write_text(json.dumps({"command": "test", "format_version": 1}))
    done = launch(tmp_path, 2, 4)
    assert done.returncode != 0
    assert done.stderr.count("holds a run with batch_size=5, but this command has batch_size=0") >= 2
