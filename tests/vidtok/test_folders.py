import json

import pytest
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


@pytest.mark.parametrize("key", ["transformers_weights", "attn_implementation", "quantization_config"])
def test_a_config_that_loads_something_else_than_the_weights_beside_it_is_refused(key: str, tmp_path) -> None:
    save_model(VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, key: "adapter_model.bin"}))
    with pytest.raises(ValueError, match=f"has {key} in its config.json"):
        load_model(VidTokModel, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no options"):
        load_model(VidTokModel, tmp_path)
