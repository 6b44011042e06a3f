import itertools

import pytest
import torch

from vidtok.config import VidTokConfig
from vidtok.quantizer import FSQuantizer, build_quantizer


def test_fsq_packs_levels_little_endian() -> None:
    quantizer = FSQuantizer([3, 5])
    indices = torch.arange(15).reshape(1, 15, 1, 1)
    codes = quantizer.decode(indices)[0, :, :, 0, 0].T
    expected = [(first - 1, (second - 2) / 2) for second, first in itertools.product(range(5), range(3))]
    torch.testing.assert_close(codes, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("name", ["fsq", "vq"])
def test_every_index_decodes_to_a_code_that_encodes_to_it(name: str) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(
        VidTokConfig(quantizer=name, fsq_levels=[3, 5], codebook_size=15, codebook_dim=4, vq_kmeans_init=False)
    ).eval()
    indices = torch.arange(15).reshape(1, 1, 3, 5)
    codes = quantizer.decode(indices)
    if name == "fsq":
        # FSQ bounds its input by tanh: invert it, staying off the rounding borders.
        codes = torch.atanh(codes.clamp(-0.95, 0.95)) * 1.2
    assert torch.equal(quantizer(codes).indices, indices)


def test_fsq_indices_are_the_same_under_autocast() -> None:
    quantizer, latents = FSQuantizer([8, 5, 5, 5]), torch.randn(2, 4, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantizer(latents).indices
    assert torch.equal(mixed, quantizer(latents).indices)


def vq(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_quantizer(VidTokConfig(quantizer="vq", codebook_dim=4, **{"codebook_size": 32, **options}))


def test_vq_starts_from_the_data() -> None:
    quantizer = vq(vq_kmeans_init=True).train()
    latents = 10 + torch.randn(4, 4, 2, 8, 8)
    quantizer(latents)
    codebook = quantizer.vq._codebook.embed[0]
    assert float((codebook.mean(0) - 10).abs().max()) < 1.0


def test_vq_revives_dead_codes() -> None:
    quantizer = vq(vq_kmeans_init=False, dead_code_ratio=0.1, vq_decay=0.8).train()
    with torch.no_grad():
        quantizer.vq._codebook.embed[:] = 100.0
        quantizer.vq._codebook.embed[:, 0] = 0.0
    latents = torch.randn(4, 4, 2, 8, 8)
    assert quantizer(latents).indices.unique().numel() == 1
    for _ in range(20):
        quantizer(latents)
    assert quantizer(latents).indices.unique().numel() >= 29


def test_a_revived_code_has_consistent_averages() -> None:
    quantizer = vq(vq_kmeans_init=False, dead_code_ratio=0.5).train()
    quantizer(torch.randn(4, 4, 2, 8, 8))
    book = quantizer.vq._codebook
    torch.testing.assert_close(book.embed_avg / book.cluster_size[..., None], book.embed, atol=1e-3, rtol=1e-3)


def test_the_initialised_flag_survives_saving() -> None:
    quantizer, latents = vq().train(), torch.randn(2, 4, 1, 8, 8)
    quantizer(latents)
    other = vq()
    other.load_state_dict(quantizer.state_dict())
    assert bool(other.vq._codebook.initted)
    assert torch.equal(other.eval()(latents).indices, quantizer.eval()(latents).indices)
