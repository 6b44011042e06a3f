"""Names of weights: those given so far stay, and the encoder's does not know the decoder."""

from typing import Any

import pytest
import torch

from vidtok.config import VidTokConfig
from vidtok.model import VidTokModel


def model(**options: Any) -> VidTokModel:
    """Fill a tokenizer with numbers that depend on no random generator."""
    made = VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1, **options))
    for number, (_, tensor) in enumerate(sorted(made.state_dict().items()), start=1):
        tensor.copy_(((torch.arange(tensor.numel()) * number) % 7).view(tensor.shape).to(tensor.dtype) / 8)
    return made


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "3c01da4e844c81b5"),
        ({"quantizer": "vq", "codebook_size": 16, "codebook_dim": 4}, "dfcd5b02192bdc3e"),
        ({"stride_t": 1, "encoder_kernel": 1}, "c8724cbacc380114"),
    ],
)
def test_a_tokenizer_of_the_first_version_keeps_its_name(options: dict[str, Any], name: str) -> None:
    assert model(**options).fingerprint() == name


def test_an_option_counts_where_it_is_not_the_default() -> None:
    assert model(patching="haar").fingerprint() != model().fingerprint() == model(patching="fold").fingerprint()


def test_the_encoder_keeps_its_name_whatever_the_decoder_is() -> None:
    plain = model()
    name = plain.encoder_fingerprint()
    assert name != plain.fingerprint()
    with torch.no_grad():
        plain.decoder.conv_out.weight.add_(1)
    assert plain.encoder_fingerprint() == name == model(commitment_weight=1.0).encoder_fingerprint()
    with torch.no_grad():
        plain.encoder.conv_out.bias[0] += 1
    assert plain.encoder_fingerprint() != name


def test_the_encoder_gets_another_name_with_its_codebook() -> None:
    options = {"quantizer": "vq", "codebook_size": 16, "codebook_dim": 4}
    plain, other = model(**options), model(**options)
    tensors = [tensor for name, tensor in other.quantizer.state_dict().items() if tensor.shape[-2:] == (16, 4)]
    assert tensors
    tensors[0][..., 0, 0] += 1
    assert plain.encoder_fingerprint() != other.encoder_fingerprint()
