"""Which tensors decay, how weights are averaged, and what is said about them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vidtok.run.optimizer import Muon, WeightAverage, build_optimizer, describe, orthogonalise
from vidtok.run_options import RunOptions, check_options


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Linear(4, 2)


def test_only_matrices_and_kernels_decay() -> None:
    model = Small()
    groups = build_optimizer(model, RunOptions(weight_decay=0.3)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {name: 0.3 if name in ("conv.weight", "head.weight") else 0.0 for name in found}


def test_a_frozen_model_has_nothing_to_optimise() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(Small().requires_grad_(False), RunOptions())


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average, expected = WeightAverage(model, decay=0.5), 1.0
    for step, weight in enumerate([2.0, 5.0, -3.0, 4.0, 4.0, 4.0, 9.0, 2.0, 1.0, 3.0], start=1):
        nn.init.constant_(model.weight, weight)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_the_trained_weights_come_back_and_buffers_stay() -> None:
    model = Small()
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.norm.running_mean += 3
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied_to(model):
        torch.testing.assert_close(model.head.weight, trained["head.weight"] - 1)
        assert torch.equal(model.norm.running_mean, trained["norm.running_mean"])
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_the_trained_weights_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    nn.init.zeros_(model.weight)
    with pytest.raises(RuntimeError, match="evaluation failed"), average.applied_to(model):
        raise RuntimeError("evaluation failed")
    assert not model.weight.any()


def test_a_tensor_that_the_optimizer_forgot_is_named() -> None:
    model = Small()
    model.conv.requires_grad_(False)
    lines = describe(model, torch.optim.SGD([model.head.weight], lr=0.1), memory_bytes=3 * 2**30)
    assert lines[0] == "parameters: 34 (conv 16, norm 8, head 10), of them frozen 16"
    assert lines[1] == "not in the optimizer, so never trained: norm.weight, norm.bias, head.bias"
    assert lines[2] == "estimated memory: 3.00 GiB"


@pytest.mark.parametrize("shape", [(6, 6), (4, 20), (20, 4)])
def test_orthogonalising_keeps_the_directions_and_levels_their_strength(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    # Two of one shape go together; each is what it is alone.
    result = orthogonalise(torch.stack([matrix, 5 * matrix.flip(0)]))[0]
    # Off the diagonal: what leaked between directions; bf16 leaves about one percent.
    strengths = left.T @ result @ right.T
    assert float((strengths - strengths.diag().diag()).abs().max()) < 0.05
    assert float(strengths.diag().min()) > 0.5 and float(strengths.diag().max()) < 1.3


class Edged(nn.Module):
    edge_layers = ("first",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(4, 8), nn.Conv2d(8, 8, 3)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(points)[:, :, None, None].expand(-1, -1, 3, 3)).flatten(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    points, losses = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), []
    for _ in range(steps):
        loss = (model(points) - torch.cat([points, -points], dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_muon_moves_inner_matrices_and_adamw_the_rest() -> None:
    options = RunOptions(optimizer="muon", lr=0.01, weight_decay=0.1)
    with_muon, plain = Edged(), Edged()
    optimizer = build_optimizer(with_muon, options)
    assert isinstance(optimizer, Muon)
    inner = [value for group in optimizer.param_groups if group.get("is_muon") for value in group["params"]]
    assert [value.shape for value in inner] == [with_muon.inner.weight.shape]
    before = with_muon.inner.weight.detach().clone()
    train(with_muon, optimizer, 1)
    train(plain, build_optimizer(plain, RunOptions(lr=0.01, weight_decay=0.1)), 1)
    for name in ("first.weight", "first.bias", "inner.bias"):
        assert torch.equal(with_muon.get_parameter(name), plain.get_parameter(name))
    moved = (with_muon.inner.weight.detach() - before * (1 - 0.01 * 0.1)).flatten(1)
    # The gradient has the rank of the four inputs: each of its directions moves by about lr times the scale, however strong it is.
    steps = torch.linalg.svdvals(moved / (0.01 * 0.2 * 72**0.5))[:4]
    assert float(steps.min()) > 0.5 and float(steps.max()) < 1.3


def test_muon_learns_and_continues_from_its_state() -> None:
    model = Edged()
    optimizer = build_optimizer(model, RunOptions(optimizer="muon", lr=0.02))
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.2 * losses[0]
    second = Edged()
    second.load_state_dict(model.state_dict())
    other = build_optimizer(second, RunOptions(optimizer="muon", lr=0.02))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 3) == train(second, other, 3)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer='sgd' is not one of adamw, muon"):
        check_options(RunOptions(optimizer="sgd", max_steps=1))
