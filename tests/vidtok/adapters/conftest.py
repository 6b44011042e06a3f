"""Tiny randomly initialised tokenizers of the real classes of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PICTURE: dict[str, Any] = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1, 1]}
PICTURE |= {"num_res_blocks": 1, "num_embeddings": 64}
TEXT: dict[str, Any] = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Save a model as its library does; gives the folder and its config.json."""

    def save(model: PreTrainedModel, name: str = "model", **options: Any) -> tuple[Path, dict[str, Any]]:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name, json.loads((tmp_path / name / "config.json").read_text())

    return save


@pytest.fixture
def picture_options() -> dict[str, Any]:
    return dict(PICTURE)


@pytest.fixture
def text_options() -> dict[str, Any]:
    return dict(TEXT)


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """Give a video of noise in [-1, 1]."""
    return lambda *shape: torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def lively() -> Callable[[nn.Module], None]:
    """Give batch norms statistics that differ from a batch's, so that the wrong mode shows."""

    def fill(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)

    return fill
