"""What only a GPU can show; `make test-gpu` runs it, and nothing else does."""

from pathlib import Path

import pytest
import torch

from tests.conftest import randomised
from vidgpt.cache import SlotCache
from vidgpt.config import VidGPTConfig
from vidgpt.fused import FusedModel
from vidgpt.model import VidGPTForCausalLM
from vidgpt.recording import cuda_graph
from vidgpt.rollout import stream_tokens
from vidgpt.sampling import SamplingOptions
from vidgpt.train import main as train_gpt
from vidtok.config import VidTokConfig
from vidtok.encode import main as encode
from vidtok.model import VidTokModel
from vidtok.train import main as train_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def gpt() -> VidGPTForCausalLM:
    torch.manual_seed(0)
    config = VidGPTConfig(
        codebook_size=50, grid_height=4, grid_width=4, window=6, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return VidGPTForCausalLM(config).eval()


def grids(batch: int, frames: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, frames, 4, 4), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_cpu() -> None:
    model = gpt()
    input_ids = model.model.layout.flatten(grids(2, 6))
    expected = model(input_ids).logits
    torch.testing.assert_close(model.cuda()(input_ids.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_cached_logits_equal_uncached_ones() -> None:
    model = gpt().cuda()
    input_ids = model.model.layout.flatten(grids(2, 6)).cuda()
    cache = SlotCache(2, input_ids.shape[1])
    parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in input_ids.split([30, 1, 17, 54], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model, given, options = gpt().cuda(), grids(3, 2), SamplingOptions()
    together = torch.stack(list(stream_tokens(model, given, 2, options=options)), dim=1)
    alone = torch.stack(list(stream_tokens(model, given[1:2], 2, options=options, first_sequence=1)), dim=1)
    assert torch.equal(together[1:2], alone)


def test_the_tokenizer_encodes_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = randomised(VidTokModel(VidTokConfig(stride_t=2, width=16)))
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    expected = model.encode(video)
    model.cuda()
    streamed = torch.cat(list(model.stream_encode(video.cuda().split(2, dim=2))), dim=1)
    for indices in (model.encode(video.cuda()), streamed):
        same = (indices.cpu() == expected).float().mean()
        assert float(same) > 0.95  # a latent at a rounding border may fall to the other side


def test_both_trainings_run_in_bf16_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data=digits", "data.episodes=8", "data.validation_episodes=2"]
    run = ["batch_size=2", "checkpoint_every=2", "evaluate_every=4", "evaluation_clips=2"]
    for steps in (4, 8):
        train_tokenizer([*data, *run, f"run_dir={tmp_path / 'tok'}", "unquantized_steps=1", f"max_steps={steps}"])
    assert "bf16" in capsys.readouterr().out
    encode([*data, f"checkpoint={tmp_path / 'tok'}", f"output={tmp_path / 'tokens'}"])
    train_gpt([*run, f"tokens={tmp_path / 'tokens'}", f"run_dir={tmp_path / 'gpt'}", "max_steps=4", "model.hidden_size=48"])
    assert (tmp_path / "gpt" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("plan", ["raster", "speculative", "diagonal"])
def test_recorded_passes_draw_the_ids_of_plain_ones(plan: str) -> None:
    model, given = gpt().cuda(), grids(3, 2)
    found = torch.stack(list(stream_tokens(FusedModel(model, record=cuda_graph), given, 4, decoding=plan)), dim=1)
    assert torch.equal(found, torch.stack(list(stream_tokens(model, given, 4, decoding=plan)), dim=1))


def test_compiled_passes_are_recorded() -> None:
    model, given = gpt().cuda(), grids(1, 2)
    fused = FusedModel(model, use_compile=True)
    assert fused.record is cuda_graph
    found = torch.stack(list(stream_tokens(fused, given, 4, decoding="speculative")), dim=1)
    assert torch.equal(found, torch.stack(list(stream_tokens(model, given, 4)), dim=1))
