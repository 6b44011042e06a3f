"""Each method against vector-quantize-pytorch, torch.distributions or arithmetic, and the traps of the library that are guarded."""

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, ResidualFSQ, ResidualVQ, SimVQ, VectorQuantize

from vidtok.config import VidTokConfig
from vidtok.measuring import peak_bytes
from vidtok.quantizer import FSQuantizer, Quantizer, build_quantizer
from vidtok.quantizers import vector


def latents(channels: int, seed: int = 0) -> Tensor:
    return torch.randn(4, channels, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(places: Tensor) -> Tensor:
    return rearrange(places, "b d t h w -> 1 (b t h w) d")


def made(**options: object) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(VidTokConfig(**options))


def vq(**options: object) -> Quantizer:
    return made(quantizer="vq", codebook_dim=4, **{"codebook_size": 32, **options})


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4, 7]])
def test_fsq_gives_what_the_library_gives(levels: list[int]) -> None:
    ours, theirs = latents(len(levels)).requires_grad_(), latents(len(levels)).requires_grad_()
    quantized = FSQuantizer(levels)(ours)
    codes, indices = FSQ(levels)(rows(theirs))
    torch.testing.assert_close(rows(quantized.codes), codes)
    assert torch.equal(quantized.indices.flatten(), indices.flatten().long())
    weights = torch.randn(codes.shape)
    (rows(quantized.codes) * weights).sum().backward()
    (codes * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_residual_fsq_gives_what_the_library_gives() -> None:
    quantizer = made(quantizer="fsq", fsq_levels=[5, 4, 7], num_codebooks=3)
    quantized = quantizer(latents(3))
    codes, digits = ResidualFSQ(levels=[5, 4, 7], num_quantizers=3)(rows(latents(3)))
    torch.testing.assert_close(rows(quantized.codes), codes)
    expected = digits[0, :, 0] + 140 * digits[0, :, 1] + 140**2 * digits[0, :, 2]
    assert torch.equal(quantized.indices.flatten(), expected.long())


def test_residual_fsq_is_one_even_scale_of_all_levels() -> None:
    quantizer = made(quantizer="fsq", fsq_levels=[3, 3, 3], num_codebooks=3)
    position = torch.linspace(-1.49, 1.49, 400).reshape(1, 1, 1, 20, 20)
    indices = quantizer(1.5 * torch.atanh(position / 1.5).expand(-1, 3, -1, -1, -1)).indices
    codes = quantizer.decode(indices)[:, :1]
    assert codes.unique().numel() == 27
    assert float((codes - position).abs().max()) <= 1.5 / 27 + 1e-5


def test_simvq_gives_what_the_library_gives() -> None:
    quantizer = made(quantizer="simvq", codebook_size=32, codebook_dim=4)
    library = SimVQ(4, 32, rotation_trick=False, input_to_quantize_commit_loss_weight=0.25)
    library.load_state_dict(quantizer.simvq.state_dict())
    ours, theirs = latents(4).requires_grad_(), latents(4).requires_grad_()
    quantized = quantizer(ours)
    codes, indices, loss = library(rows(theirs))
    assert torch.equal(quantized.indices.flatten(), indices.flatten())
    torch.testing.assert_close(rows(quantized.codes), codes)
    torch.testing.assert_close(quantized.loss, loss)
    (quantized.loss + quantized.codes.sum()).backward()
    (loss + codes.sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantizer.simvq.code_transform.weight.grad, library.code_transform.weight.grad)


def test_vq_trains_as_the_library_does() -> None:
    quantizer = vq(vq_kmeans_init=False, dead_code_ratio=0.0).train()
    library = VectorQuantize(4, 32, decay=0.99, commitment_weight=0.25, rotation_trick=False).train()
    library.load_state_dict(quantizer.vq.state_dict())
    for seed in range(5):
        ours, theirs = latents(4, seed).requires_grad_(), latents(4, seed).requires_grad_()
        quantized = quantizer(ours)
        codes, indices, loss = library(rows(theirs))
        assert torch.equal(quantized.indices.flatten(), indices.flatten())
        torch.testing.assert_close(rows(quantized.codes), codes)
        torch.testing.assert_close(quantized.loss, loss)
        quantized.loss.backward()
        loss.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    for name, value in quantizer.vq.state_dict().items():
        torch.testing.assert_close(value, library.state_dict()[name])


def test_residual_vq_gives_what_the_library_gives() -> None:
    quantizer = vq(num_codebooks=3).train()
    for seed in range(3):
        quantizer(latents(4, seed))
    library = ResidualVQ(dim=4, num_quantizers=3, codebook_size=32).eval()
    for level, layer in zip(quantizer.levels, library.layers, strict=True):
        layer.load_state_dict(level.vq.state_dict())
    quantized = quantizer.eval()(latents(4, 9))
    codes, digits, _ = library(rows(latents(4, 9)))
    torch.testing.assert_close(rows(quantized.codes), codes)
    assert torch.equal(quantized.indices.flatten(), (digits[0] * torch.tensor([1, 32, 32**2])).sum(-1))


@pytest.mark.parametrize("is_spherical", [False, True])
def test_sign_codes_and_the_entropy_of_a_token_are_the_librarys(is_spherical: bool) -> None:
    quantizer = made(quantizer="bsq" if is_spherical else "lfq", codebook_size=64).eval()
    given = latents(6) * 0.3
    library = LFQ(dim=6, codebook_size=64, spherical=is_spherical).train()
    # The library's first channel is the highest bit, and its temperature the inverse of ours.
    sharpness = 1 / quantizer.magnitude**2
    found, breakdown = library(rows(given.flip(1)), inv_temperature=sharpness, return_loss_breakdown=True)
    quantized = quantizer(given)
    assert torch.equal(quantized.indices.flatten(), found.indices.flatten())
    torch.testing.assert_close(rows(quantized.codes), found.quantized.flip(-1))
    bits = quantized.terms["token_entropy_bits_per_bit"] * 6 * math.log(2)
    torch.testing.assert_close(bits, breakdown.per_sample_entropy, atol=2e-3, rtol=2e-3)
    # The sum over bits cannot lie below the entropy over codes.
    assert quantized.terms["batch_entropy_bits_per_bit"] * 6 * math.log(2) >= breakdown.batch_entropy - 1e-3


def test_entropies_are_those_of_independent_bits() -> None:
    quantizer = made(quantizer="lfq", codebook_size=16).eval()
    given = latents(4)
    shares = torch.sigmoid(4 * rows(given)[0])
    of_token, of_batch = quantizer.entropies(rows(given)[0])
    torch.testing.assert_close(of_token, Bernoulli(shares).entropy().mean() / math.log(2))
    torch.testing.assert_close(of_batch, Bernoulli(shares.mean(0)).entropy().mean() / math.log(2))
    expected = 0.25 * F.mse_loss(given, given.sign()) + 0.1 * (of_token - of_batch)
    torch.testing.assert_close(quantizer(given).loss, expected)


def test_entropy_needs_no_matrix_of_tokens_by_codes() -> None:
    # 2048 tokens x 2**24 codes would be 128 GiB.
    quantizer = made(quantizer="lfq", codebook_size=1 << 24).train()
    given = torch.randn(4, 24, 2, 16, 16, requires_grad=True)
    quantizer(given).loss.backward()
    assert torch.isfinite(given.grad).all()


def test_entropy_brings_a_bit_that_is_always_off_back() -> None:
    given = (latents(4) - torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1, 1)).requires_grad_()
    made(quantizer="lfq", codebook_size=16, commitment_weight=0.0).train()(given).loss.backward()
    assert float(given.grad[:, 0].mean()) < -10 * abs(float(given.grad[:, 1].mean()))


def test_kl_is_the_divergence_of_torch_and_sampling_belongs_to_training() -> None:
    quantizer, given = made(quantizer="kl", codebook_dim=3, kl_weight=0.5), latents(6)
    mean, log_variance = given.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(quantizer(given).loss, 0.5 * expected)
    assert torch.equal(quantizer.eval()(given).codes, mean)
    torch.manual_seed(1)
    drawn = torch.stack([quantizer.train()(given).codes for _ in range(400)])
    torch.testing.assert_close(drawn.mean(0), mean, atol=1.0, rtol=0)
    spread = (drawn.std(0) / (0.5 * log_variance).exp()).mean()
    assert float(spread) == pytest.approx(1.0, abs=0.01)


def test_a_wild_log_variance_stays_finite() -> None:
    given = torch.full((1, 2, 1, 2, 2), 1e4)
    assert torch.isfinite(made(quantizer="kl", codebook_dim=1)(given).loss)


def test_vq_starts_from_the_data() -> None:
    quantizer = vq().train()
    quantizer(10 + latents(4))
    assert float((quantizer.vq.codebook.mean(0) - 10).abs().max()) < 1.0


def test_starting_from_the_data_holds_no_matrix_of_latents_by_codes() -> None:
    quantizer, given = vq(codebook_size=256).train(), torch.randn(4, 4, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    assert peak_bytes(lambda: quantizer(given), [given]) < 4 * given[:, 0].numel() * 256 / 4
    book = quantizer.vq._codebook
    # The counts are those of the batch, or its threshold would find every code dead.
    assert float(book.cluster_size.sum()) == pytest.approx(given[:, 0].numel(), rel=0.05)
    assert int((book.cluster_size > 0.1 * book.reset_cluster_size).sum()) > 250


def test_starting_from_the_data_keeps_no_distances_for_the_backward_pass() -> None:
    quantizer, kept = vq(codebook_size=64).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        quantizer(latents(4).requires_grad_())
    assert max(kept) < 512 * 64
    assert not any(buffer.requires_grad for name, buffer in quantizer.named_buffers() if "_codebook" in name)


def test_an_empty_codebook_is_not_filled_by_evaluation() -> None:
    for quantizer in (vq().eval(), vq(num_codebooks=2).eval()):
        assert not quantizer.is_filled
        with pytest.raises(ValueError, match="never filled"):
            quantizer(latents(4))
        quantizer.train()(latents(4))
        assert quantizer.is_filled


@pytest.mark.parametrize(("kind", "size"), [("vq", 32), ("simvq", 32)])
def test_looking_in_parts_finds_the_same_codes(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = made(quantizer=kind, codebook_size=size, codebook_dim=4).train()
    quantizer(latents(4))
    whole = quantizer.eval()(latents(4, 1))
    monkeypatch.setattr(vector, "DISTANCES_AT_ONCE", 7 * size)
    assert torch.equal(quantizer(latents(4, 1)).indices, whole.indices)


def collapsed(**options: object) -> Quantizer:
    """A codebook of which only code 0 lies near the data, whose averages agree."""
    quantizer = vq(vq_kmeans_init=False, **options).train()
    book = quantizer.vq._codebook
    book.embed.fill_(100.0)
    book.embed[:, 0] = 0.0
    book.embed_avg.copy_(book.embed)
    return quantizer


def test_vq_revives_dead_codes() -> None:
    quantizer = collapsed(dead_code_ratio=0.1, vq_decay=0.8)
    given = latents(4)
    assert quantizer(given).indices.unique().numel() == 1
    for _ in range(20):
        quantizer(given)
    assert quantizer(given).indices.unique().numel() >= 29


def test_without_a_ratio_dead_codes_stay_dead() -> None:
    quantizer = collapsed(dead_code_ratio=0.0, vq_decay=0.8)
    for seed in range(20):
        assert quantizer(latents(4, seed)).indices.unique().numel() == 1


def test_a_revived_code_has_consistent_averages_and_outlives_the_next_steps() -> None:
    quantizer = collapsed(dead_code_ratio=0.5, vq_decay=0.9)
    book = quantizer.vq._codebook
    while not (book.cluster_size[0, 1:] == 512 / 32).all():
        quantizer(latents(4))
    torch.testing.assert_close(book.embed_avg / book.cluster_size[..., None], book.embed, atol=1e-4, rtol=1e-4)
    # Nothing lies near the revived codes now: half of the expected count is reached after ln 2 / -ln 0.9 = 6.6 steps, not at once.
    revived = book.embed.clone()
    for _ in range(6):
        quantizer(torch.full((4, 4, 2, 8, 8), 50.0))
    assert float((book.embed - revived)[0].norm(dim=1).sort().values[:-1].max()) < 1e-3
    quantizer(torch.full((4, 4, 2, 8, 8), 50.0))
    assert int((book.embed[0] == 50.0).all(dim=1).sum()) >= 30


@pytest.mark.parametrize("side", [4, 16])
def test_the_dead_code_threshold_follows_the_tokens_of_a_batch(side: int) -> None:
    quantizer = vq(dead_code_ratio=0.25).train()
    quantizer(torch.randn(2, 4, 1, side, side))
    book = quantizer.vq._codebook
    assert book.reset_cluster_size == 2 * side * side / 32
    assert book.threshold_ema_dead_code == 0.25 * 2 * side * side / 32


def test_going_on_from_a_saved_codebook_is_going_on() -> None:
    straight, resumed = vq(num_codebooks=2).train(), vq(num_codebooks=2).train()
    straight(latents(4))
    resumed.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    before = resumed.levels[0].vq.codebook.clone()
    for quantizer in (straight, resumed):
        torch.manual_seed(5)
        quantizer(latents(4, 1) + 30)
    # Another start from data would have put every code near 30.
    assert float((resumed.levels[0].vq.codebook - before).norm(dim=1).median()) < 1.0
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


def test_the_initialised_flag_survives_saving() -> None:
    quantizer, other = vq().train(), vq()
    quantizer(latents(4))
    other.load_state_dict(quantizer.state_dict())
    assert other.is_filled
    assert torch.equal(other.eval()(latents(4)).indices, quantizer.eval()(latents(4)).indices)
