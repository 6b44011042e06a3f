"""Two processes on unlike data keep one codebook, to the bit, and reckon with the entropy of their joint batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KINDS = {
    "vq": {"quantizer": "vq", "codebook_size": 32, "codebook_dim": 4},
    "vq-random-start": {"quantizer": "vq", "codebook_size": 32, "codebook_dim": 4, "vq_kmeans_init": False},
    "simvq": {"quantizer": "simvq", "codebook_size": 32, "codebook_dim": 4},
    "lfq": {"quantizer": "lfq", "codebook_size": 16},
    "residual-vq": {"quantizer": "vq", "codebook_size": 32, "codebook_dim": 4, "num_codebooks": 2},
    "residual-simvq": {"quantizer": "simvq", "codebook_size": 32, "codebook_dim": 4, "num_codebooks": 2},
}
SCRIPT = """
import json, sys
import torch
from torch import distributed, nn
from vidtok.codebook import check_same_codebook, codebook_hash
from vidtok.config import VidTokConfig
from vidtok.quantizer import build_quantizer

rank, store, kinds = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)


class Tokenizer(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.encoder = nn.Conv3d(4, 4, 1)
        self.quantizer = build_quantizer(VidTokConfig(vq_decay=0.8, dead_code_ratio=0.5, **options))

    def forward(self, video, is_quantized):
        latents = self.encoder(video)
        if not is_quantized:
            return self.quantizer.bypass(latents).square().mean()
        quantized = self.quantizer(latents)
        return quantized.codes.square().mean() + quantized.loss


def batch(rank, seed):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    # Clusters that come and go, so that codes die and are revived; each process has its own.
    return torch.randn(2, 4, 1, 4, 4, generator=generator) + 5 * torch.randn(1, 4, 1, 1, 1, generator=generator)


def refused(act):
    try:
        act()
    except ValueError as error:
        return str(error)


def train(options):
    torch.manual_seed(0)
    model = Tokenizer(options).train()
    # Buffers are not broadcast, or the first process's would hide that the others have drifted away.
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(12):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        wrapped(batch(rank, step), step >= 2).backward()
        optimizer.step()
    check_same_codebook(model.quantizer)
    return codebook_hash(model)


def entropy(joint):
    quantizer = build_quantizer(VidTokConfig(quantizer="lfq", codebook_size=16)).train(not joint)
    shift = torch.tensor([0.3, -0.2, 0.1, 0.0], requires_grad=True)
    parts = [batch(number, 1)[:, :, 0].movedim(1, -1).reshape(-1, 4)[: 32 - 16 * number] for number in range(2)]
    given = torch.cat(parts) if joint else parts[rank]
    of_batch = quantizer.entropies(0.3 * given + shift)[1]
    of_batch.backward()
    return of_batch.item(), shift.grad


early = build_quantizer(VidTokConfig(**kinds["vq"])).train()
early(batch(rank, 0))
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
found = {"hashes": {name: train(options) for name, options in kinds.items()}}
torch.manual_seed(rank)
drifted = build_quantizer(VidTokConfig(**kinds["simvq"]))
found["drifted"] = refused(lambda: check_same_codebook(drifted))
found["early"] = refused(lambda: early(batch(rank, 1)))
value, gradient = entropy(joint=False)
distributed.all_reduce(gradient)
joint_value, joint_gradient = entropy(joint=True)
found["entropy"] = [value, joint_value, (gradient / 2).tolist(), joint_gradient.tolist()]
print(json.dumps(found))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(rank), str(folder / "store"), json.dumps(KINDS)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        answers = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(error for _, error in answers)
    return [json.loads(answer.splitlines()[-1]) for answer, _ in answers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_are_the_same_bits_in_both_processes(processes: list[dict[str, Any]], kind: str) -> None:
    first, second = (found["hashes"][kind] for found in processes)
    assert first == second


@pytest.mark.slow
def test_codebooks_that_differ_are_refused_in_both_processes(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert "the codebooks of processes 0 and 1 differ" in found["drifted"]


@pytest.mark.slow
def test_a_quantizer_of_before_the_processes_met_is_refused_and_spoils_no_later_one(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert "build the model after Accelerator()" in found["early"]


@pytest.mark.slow
def test_the_entropy_of_the_batch_is_that_of_the_joint_batch(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        value, joint_value, gradient, joint_gradient = found["entropy"]
        assert value == pytest.approx(joint_value, rel=1e-5)
        assert gradient == pytest.approx(joint_gradient, rel=1e-4)
