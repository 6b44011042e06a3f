"""Which tensors decay, how weights are averaged, and what is said about them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidtok.optimizer import WeightAverage, build_optimizer, describe
from vidtok.run_options import RunOptions


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
