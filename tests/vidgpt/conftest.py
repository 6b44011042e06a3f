from collections.abc import Callable

import pytest
import torch

from vidgpt.config import VidGPTConfig
from vidgpt.decoding.stream import stream_tokens
from vidgpt.fused import FusedModel
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


# Plain functions, for tests of decoding: `from tests.vidgpt.conftest import clips, net, roll`.
CODES, ROWS, COLUMNS, WINDOW = 12, 3, 4, 6


def net(**options: object) -> VidGPTForCausalLM:
    """Make a model whose weights are all large enough that a leak or a lost state shows, those of norms included."""
    torch.manual_seed(0)
    sizes = {"codebook_size": CODES, "grid_height": ROWS, "grid_width": COLUMNS, "window": WINDOW, "hidden_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = VidGPTForCausalLM(VidGPTConfig(**{**sizes, **heads, **options})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.25)
    return model


def clips(batch: int = 3, frames: int = 2, seed: int = 0) -> torch.Tensor:
    """Make indices (B, t, h, w) for `net`."""
    return torch.randint(0, CODES, (batch, frames, ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed))


def chosen(batch: int, frames: int) -> torch.Tensor:
    """Make actions (B, t) out of three."""
    return torch.randint(0, 3, (batch, frames), generator=torch.Generator().manual_seed(3))


def ragged(given: torch.Tensor) -> list[torch.Tensor]:
    """Give clips of 2, 1 and 3 frames."""
    return [given[0], given[1][:1], torch.cat([given[2], given[0][:1]])]


def roll(
    model: VidGPTForCausalLM | FusedModel, context: torch.Tensor | list[torch.Tensor], future: int, **options
) -> torch.Tensor:
    """Give all frames (B, future, h, w) of stream_tokens."""
    return torch.stack(list(stream_tokens(model, context, future, **options)), dim=1)
