from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vidgpt.config import VidGPTConfig
from vidgpt.decoding.stream import stream_tokens
from vidgpt.fused import FusedModel
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import PredictOptions
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.tokens import TokenRow, TokenWriter
from vidtok.video import write_png

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


# Plain functions, for tests of decoding and prediction: `from tests.vidgpt.conftest import clips, net, roll`.
CODES, ROWS, COLUMNS, WINDOW = 12, 3, 4, 6


def net(**options: object) -> VidGPTForCausalLM:
    """Make a model whose weights are all large enough that a leak or a lost state shows, those of norms included."""
    torch.manual_seed(0)
    sizes = {"codebook_size": CODES, "grid_height": ROWS, "grid_width": COLUMNS, "window": WINDOW, "hidden_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = VidGPTForCausalLM(VidGPTConfig(**{**sizes, **heads, "draft_head": True, **options})).eval()
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


CARD = Card(
    tokenizer_fingerprint="0123456789abcdef",
    codebook_size=CODES,
    grid_height=ROWS,
    grid_width=COLUMNS,
    stride_t=1,
    stride_s=8,
    fps=10.0,
    frame_height=8 * ROWS,
    frame_width=8 * COLUMNS,
    num_actions=0,
    data_name="toy",
    manifest_hash="abcd",
)


def write_tokens(
    folder: Path,
    card: Card = CARD,
    splits: Sequence[str] = ("train", "validation", "validation"),
    frames: int = 7,
    given: Sequence[torch.Tensor] | None = None,
) -> Path:
    """Write a token dataset of one clip a split name; given: their indices (t, h, w), by default random ones.

    Every other column of these never changes, as in video.
    """
    with TokenWriter(folder, card, 8) as writer:
        for number, split in enumerate(splits):
            generator = torch.Generator().manual_seed(number)
            indices = torch.randint(card.codebook_size, (frames, card.grid_height, card.grid_width), generator=generator)
            indices[:, :, ::2] = indices[:1, :, ::2]
            indices = indices if given is None else given[number]
            actions = torch.randint(card.num_actions, (len(indices),), generator=generator) if card.num_actions else None
            writer.add(TokenRow(f"clip-{number}", 0.0, split, len(indices), indices, actions))
        writer.finish()
    return folder


def save_predictor(folder: Path, stride_t: int = 1) -> Path:
    """Write a model folder for frames of 16x16 pixels, 2x2 tokens and a window of 6, with its card and tokenizer, all untrained."""
    torch.manual_seed(0)
    tokenizer = VidTokModel(VidTokConfig(stride_t=stride_t, width=8, encoder_blocks=1, decoder_blocks=1))
    save_model(tokenizer, folder / "tokenizer")
    sizes = {"codebook_size": tokenizer.config.codebook_size, "grid_height": 2, "grid_width": 2}
    save_model(
        VidGPTForCausalLM(VidGPTConfig(**sizes, window=6, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)), folder
    )
    frame = {"stride_t": stride_t, "stride_s": 8, "fps": 10.0, "frame_height": 16, "frame_width": 16, "num_actions": 3}
    names = {"data_name": "files", "manifest_hash": "m", "encoder_fingerprint": tokenizer.encoder_fingerprint()}
    Card(tokenizer.fingerprint(), **sizes, **frame, **names).save(folder)
    return folder


def write_pictures(folder: Path, name: str = "frame_{:04d}.png") -> dict[Path, bytes]:
    """Write four plain pictures of 16x16 pixels, each brighter than the one before; gives all files there."""
    folder.mkdir(parents=True)
    for index in range(4):
        write_png(folder / name.format(index), np.full((16, 16, 3), 60 * index, np.uint8))
    return contents(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    """Give every file in a folder and what it holds."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prediction_options(checkpoint: Path, source: Path, output: Path, **others: object) -> PredictOptions:
    """Give the options of a prediction of three frames from two."""
    values = {"context": 2, "future": 3, **others}
    return PredictOptions(checkpoint=str(checkpoint), input=str(source), output=str(output), **values)  # type: ignore[arg-type]
