import torch

from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel


def test_a_model_is_loaded_in_fp32_whatever_it_was_saved_in(tmp_path) -> None:
    model = VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1)).bfloat16()
    save_model(model, tmp_path)
    loaded = load_model(VidTokModel, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
