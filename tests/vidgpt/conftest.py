from collections.abc import Callable

import pytest
import torch

from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM

MakeModel = Callable[..., VidGPTForCausalLM]


@pytest.fixture
def make_model() -> MakeModel:
    def make(**options: object) -> VidGPTForCausalLM:
        torch.manual_seed(0)
        sizes = {"codebook_size": 20, "grid_height": 3, "grid_width": 2, "window": 5, "hidden_size": 48, "num_hidden_layers": 2}
        # A wide initial range makes attention sharp, so that a wrong mask or phase shows in the logits.
        config = VidGPTConfig(**{**sizes, "num_attention_heads": 4, "initializer_range": 0.2, **options})
        return VidGPTForCausalLM(config).eval()

    return make


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    def make(model: VidGPTForCausalLM, batch: int = 2, frames: int | None = None, seed: int = 0) -> torch.Tensor:
        layout, generator = model.model.layout, torch.Generator().manual_seed(seed)
        shape = (batch, frames or model.config.window, layout.height, layout.width)
        indices = torch.randint(0, layout.codebook_size, shape, generator=generator)
        actions = torch.randint(0, layout.num_actions, shape[:2], generator=generator) if layout.num_actions else None
        return layout.flatten(indices, actions)

    return make
