"""Weights that do not match are refused by name, and nothing but the needed ones is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

from vidtok.adapters.janus import JanusTokenizer
from vidtok.adapters.weights import load_network, options_in


@pytest.fixture
def folder(saved, picture_options) -> tuple[Path, dict[str, Any]]:
    return saved(JanusVQVAE(JanusVQVAEConfig(**picture_options, num_patches=8)))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_half_precision_weights_are_read_as_fp32(folder) -> None:
    before = JanusTokenizer.load(*folder)
    rewrite(folder[0], lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    tokenizer = JanusTokenizer.load(*folder)
    assert {weight.dtype for weight in tokenizer.parameters()} == {torch.float32}
    for weight, original in zip(tokenizer.parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, original.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {f"model.vqmodel.{name}": tensor for name, tensor in list(tensors.items())[1:]}, "lacks weights"),
        (lambda tensors: {**tensors, "encoder.extra.weight": torch.zeros(1)}, r"has weights \['encoder.extra.weight'\]"),
        (lambda tensors: {**tensors, "quant_conv.bias": torch.zeros(99)}, "do not match .*quant_conv.bias"),
        (lambda _: {"other.weight": torch.zeros(1)}, "has no weight"),
        (lambda tensors: {**tensors, "quant_conv.bias": tensors["quant_conv.bias"] / 0}, r"\['quant_conv.bias'\].* not finite"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_name(folder, change, message: str) -> None:
    rewrite(folder[0], change)
    with pytest.raises(ValueError, match=message):
        JanusTokenizer.load(*folder)


def test_a_folder_without_safetensors_and_a_damaged_one_are_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        load_network(JanusVQVAE, folder[1], tmp_path / "empty")
    (folder[0] / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        load_network(JanusVQVAE, folder[1], folder[0])


def test_two_files_with_the_same_weight_are_refused(folder) -> None:
    save_file({"quant_conv.bias": torch.zeros(4)}, folder[0] / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors and model.safetensors in .* both hold 'quant_conv.bias'"):
        JanusTokenizer.load(*folder)


def test_options_that_say_how_to_load_are_not_followed(folder) -> None:
    before = JanusTokenizer.load(*folder)
    orders = {"attn_implementation": "someone/kernel", "_name_or_path": "elsewhere", "auto_map": {"AutoModel": "code.Model"}}
    orders |= {"dtype": "load", "torch_dtype": "float16", "quantization_config": {"quant_method": "bitsandbytes"}}
    orders |= {"per_layer_config": {"0": {}}, "trust_remote_code": True, "transformers_weights": "other.bin", "num_labels": 3}
    tokenizer = JanusTokenizer.load(folder[0], {**folder[1], **orders})
    assert tokenizer.fingerprint() == before.fingerprint() and tokenizer.values == before.values


@pytest.mark.parametrize("change", [{"embed_dim": "four"}, {"base_channels": 30}, {"num_embeddings": -1}])
def test_options_of_no_network_are_one_sentence(folder, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^the config\.json of .* describes no JanusVQVAE \([^\n]+\): the folder is damaged"):
        JanusTokenizer.load(folder[0], {**folder[1], **change})


def test_options_are_found_alone_and_inside_a_larger_model() -> None:
    assert options_in({"embed_dim": 4}, "vq_config") == {"embed_dim": 4}
    assert options_in({"vq_config": {"embed_dim": 4}, "hidden_size": 8}, "vq_config") == {"embed_dim": 4}
    assert options_in({"vq_config": None, "hidden_size": 8}, "vq_config") == {}
    with pytest.raises(ValueError, match="vq_config='rest', which are no options"):
        options_in({"vq_config": "rest"}, "vq_config")
