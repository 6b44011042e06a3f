"""Laws that hold for every quantizer: what it gives, what it leaves alone, and that it survives precision changes and saving."""

import itertools

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from vidtok.config import VidTokConfig
from vidtok.digits import split_digits
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel
from vidtok.quantizer import FSQuantizer, Quantizer, build_quantizer

DISCRETE = {
    "fsq": {"quantizer": "fsq", "fsq_levels": [5, 4, 3]},
    "fsq-norm": {"quantizer": "fsq", "fsq_levels": [5, 4, 3], "fsq_norm": True},
    "vq": {"quantizer": "vq", "codebook_size": 24, "codebook_dim": 3},
    "simvq": {"quantizer": "simvq", "codebook_size": 24, "codebook_dim": 3},
    "lfq": {"quantizer": "lfq", "codebook_size": 32},
    "bsq": {"quantizer": "bsq", "codebook_size": 32},
    "residual-fsq": {"quantizer": "fsq", "fsq_levels": [5, 4, 3], "num_codebooks": 3, "fsq_norm": True},
    "residual-vq": {"quantizer": "vq", "codebook_size": 24, "codebook_dim": 3, "num_codebooks": 3},
    "residual-simvq": {"quantizer": "simvq", "codebook_size": 24, "codebook_dim": 3, "num_codebooks": 2},
    "residual-lfq": {"quantizer": "lfq", "codebook_size": 32, "num_codebooks": 3},
}
CONTINUOUS = {"kl": {"quantizer": "kl", "codebook_dim": 3}, "none": {"quantizer": "none", "codebook_dim": 3}}
OPTIONS = DISCRETE | CONTINUOUS
SHAPE = (2, 3, 4, 5)  # B, t, h, w


def latents_for(quantizer: Quantizer, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    batch, *grid = SHAPE
    return torch.randn(batch, quantizer.channels_in, *grid, generator=generator)


def built(kind: str) -> Quantizer:
    """A quantizer that has seen a few training batches."""
    torch.manual_seed(0)
    quantizer = build_quantizer(VidTokConfig(**OPTIONS[kind])).train()
    for seed in range(3):
        quantizer(latents_for(quantizer, seed))
    return quantizer.eval()


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same_state(quantizer: Quantizer, before: dict[str, Tensor]) -> None:
    assert quantizer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", DISCRETE)
def test_indices_are_integers_of_the_codebooks_and_decode_to_the_codes(kind: str) -> None:
    quantizer, config = built(kind), VidTokConfig(**OPTIONS[kind])
    quantized = quantizer(latents_for(quantizer, 7))
    assert quantizer.factors == config.codebook_factors
    assert quantizer.channels_in == quantizer.channels_out == config.codebook_dim
    assert quantized.indices.shape == SHAPE
    assert quantized.indices.dtype == torch.int64
    assert 0 <= int(quantized.indices.min()) <= int(quantized.indices.max()) < config.num_ids
    assert quantized.codes.shape == (2, config.codebook_dim, 3, 4, 5)
    assert quantized.codes.dtype == torch.float32
    assert torch.equal(quantizer.decode(quantized.indices), quantized.codes)
    assert quantized.loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in quantized.terms.values())


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_continuous_latents_have_no_ids(kind: str) -> None:
    quantizer, config = built(kind), VidTokConfig(**OPTIONS[kind])
    quantized = quantizer(latents_for(quantizer))
    assert quantized.indices is None
    assert quantized.codes.shape == (2, 3, 3, 4, 5)
    assert (quantizer.is_discrete, config.is_discrete) == (False, False)
    assert (quantizer.factors, config.codebook_factors, config.num_ids) == ([], [], 0)
    with pytest.raises(ValueError, match="continuous latents have no ids"):
        quantizer.decode(torch.zeros(SHAPE, dtype=torch.int64))


@pytest.mark.parametrize("kind", OPTIONS)
def test_evaluation_gives_the_same_twice_and_moves_nothing(kind: str) -> None:
    quantizer = built(kind)
    before, latents = state(quantizer), latents_for(quantizer, 9)
    first, second = quantizer(latents), quantizer(latents)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.loss, second.loss)
    assert_same_state(quantizer, before)


@pytest.mark.parametrize("kind", ["fsq", "fsq-norm", "simvq", "lfq", "bsq", "residual-fsq", "residual-simvq", "residual-lfq"])
def test_what_has_no_running_state_gives_the_same_in_training(kind: str) -> None:
    quantizer, latents = built(kind), latents_for(built(kind), 9)
    evaluated = quantizer(latents)
    trained = quantizer.train()(latents)
    assert torch.equal(trained.codes, evaluated.codes)
    assert torch.equal(trained.indices, evaluated.indices)


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradients_of_codes_and_loss_reach_every_latent(kind: str) -> None:
    quantizer = built(kind).train()
    latents = latents_for(quantizer, 3).requires_grad_()
    quantized = quantizer(latents)
    weights = torch.randn(quantized.codes.shape, generator=torch.Generator().manual_seed(1))
    ((quantized.codes * weights).sum() + quantized.loss).backward()
    assert torch.isfinite(latents.grad).all()
    share = (latents.grad != 0).double().mean()
    assert share == 1.0, f"{share:.1%} of the latents have a gradient"
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["vq", "simvq", "lfq", "residual-vq", "residual-simvq", "residual-lfq"])
def test_the_gradient_of_the_codes_passes_straight_through(kind: str) -> None:
    quantizer = built(kind).train()
    latents = latents_for(quantizer, 3).requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    (quantizer(latents).codes * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_state_loads_to_the_same_quantizer(kind: str) -> None:
    quantizer = built(kind)
    other = build_quantizer(VidTokConfig(**OPTIONS[kind])).eval()
    other.load_state_dict(load(save(quantizer.state_dict())))
    latents = latents_for(quantizer, 4)
    assert torch.equal(other(latents).codes, quantizer(latents).codes)
    torch.manual_seed(3)
    first = quantizer.train()(latents)
    torch.manual_seed(3)
    second = other.train()(latents)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.loss, second.loss)
    assert_same_state(other, state(quantizer))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_model_folder_brings_every_buffer_back(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    blocks = {"stride_t": 1, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    model = VidTokModel(VidTokConfig(**blocks, **OPTIONS[kind])).train()
    video = torch.rand(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model(video)
    save_model(model, tmp_path)
    loaded = load_model(VidTokModel, tmp_path)
    ours, theirs = (dict(net.quantizer.named_buffers()) for net in (model, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    model.eval()
    assert torch.equal(loaded.reconstruct(video), model.reconstruct(video))
    torch.manual_seed(0)
    expected = model.train()(video).quantizer_loss
    torch.manual_seed(0)
    assert torch.equal(loaded.train()(video).quantizer_loss, expected)


@pytest.mark.parametrize("kind", DISCRETE)
def test_indices_are_the_same_under_autocast(kind: str) -> None:
    quantizer = built(kind)
    latents = latents_for(quantizer, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantizer(latents)
    assert torch.equal(mixed.indices, quantizer(latents).indices)
    assert mixed.codes.dtype == torch.float32


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_converting_the_model_leaves_codebook_and_averages_in_fp32(kind: str, dtype: torch.dtype) -> None:
    quantizer = built(kind)
    before, latents = state(quantizer), latents_for(quantizer, 5)
    expected = quantizer(latents).codes
    torch.nn.ModuleList([quantizer]).to(dtype)
    assert_same_state(quantizer, before)
    assert torch.equal(quantizer(latents).codes, expected)


@pytest.mark.parametrize("kind", ["vq", "simvq", "residual-vq", "fsq-norm"])
def test_a_codebook_that_was_loaded_in_16_bits_is_refused(kind: str) -> None:
    quantizer = built(kind)
    for module in quantizer.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    tensors[name] = (
                        torch.nn.Parameter(tensor.data.bfloat16()) if tensors is module._parameters else tensor.bfloat16()
                    )
    with pytest.raises(ValueError, match=r"bfloat16.*load the tokenizer in float32"):
        quantizer(latents_for(quantizer))
    with pytest.raises(ValueError, match=r"bfloat16.*load the tokenizer in float32"):
        quantizer.decode(torch.zeros(SHAPE, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["vq", "simvq", "lfq", "bsq", "residual-lfq"])
def test_every_index_decodes_to_a_code_that_encodes_to_it(kind: str) -> None:
    quantizer = built(kind)
    total = VidTokConfig(**OPTIONS[kind]).num_ids
    indices = torch.randint(0, total, (1, 1, 10, 24)) if total > 1000 else torch.arange(total).reshape(1, 1, -1, 8)
    codes = quantizer.decode(indices)
    if kind == "bsq":
        torch.testing.assert_close(codes.norm(dim=1), torch.ones_like(codes[:, 0]))
    assert torch.equal(quantizer(codes).indices, indices)


def test_fsq_codes_encode_to_their_index_off_the_rounding_borders() -> None:
    quantizer, indices = FSQuantizer([3, 5]), torch.arange(15).reshape(1, 1, 3, 5)
    codes = torch.atanh(quantizer.decode(indices).clamp(-0.95, 0.95)) * 1.2
    assert torch.equal(quantizer(codes).indices, indices)


def test_fsq_packs_levels_little_endian() -> None:
    quantizer = FSQuantizer([3, 5])
    indices = torch.arange(15).reshape(1, 15, 1, 1)
    codes = quantizer.decode(indices)[0, :, :, 0, 0].T
    expected = [(first - 1, (second - 2) / 2) for second, first in itertools.product(range(5), range(3))]
    torch.testing.assert_close(codes, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["residual-fsq", "residual-vq", "residual-lfq"])
def test_the_coarsest_codebook_is_digit_zero_and_each_digit_brings_codes_nearer(kind: str) -> None:
    quantizer = built(kind)
    latents = latents_for(quantizer, 6) * 0.8
    with torch.no_grad():
        target, indices = quantizer.bypass(latents), quantizer(latents).indices
    digits = split_digits(indices, quantizer.factors)
    total, errors = torch.zeros_like(target), []
    for number, (level, scale) in enumerate(zip(quantizer.levels, quantizer.scales, strict=True)):
        total = total + level.decode(digits[..., number]) * scale[:, None, None, None]
        errors.append((target - total).square().mean().item())
    torch.testing.assert_close(total, quantizer.decode(indices))
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_warm_up_passes_on_latents_before_rounding(kind: str) -> None:
    quantizer = built(kind)
    latents = latents_for(quantizer, 8)
    passed = quantizer.bypass(latents)
    assert passed.shape == quantizer(latents).codes.shape
    assert quantizer.bypass(latents.bfloat16()).dtype == torch.bfloat16
    if kind in ("vq", "simvq", "none", "residual-vq"):
        assert torch.equal(passed, latents)
    if kind in ("fsq", "fsq-norm"):
        halves = torch.tensor([2, 2, 1]).reshape(3, 1, 1, 1)
        torch.testing.assert_close((passed * halves).round() / halves, quantizer(latents).codes)
    if kind == "lfq":
        assert torch.equal(passed.sign(), quantizer(latents).codes)
    if "fsq" in kind or "lfq" in kind:
        # However large latents are, the decoder sees the range that it will see once they are rounded.
        limit = quantizer.decode(quantizer(1e3 * latents).indices).abs().max().item()
        assert quantizer.bypass(1e3 * latents).abs().max().item() < 1.05 * limit


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_warm_up_leaves_no_parameter_without_a_gradient(kind: str) -> None:
    quantizer = built(kind).train()
    quantizer.bypass(latents_for(quantizer).requires_grad_()).sum().backward()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


@pytest.mark.parametrize("kind", DISCRETE)
def test_ids_outside_the_codebook_are_refused(kind: str) -> None:
    quantizer, total = built(kind), VidTokConfig(**OPTIONS[kind]).num_ids
    with pytest.raises(ValueError, match=f"index {total} lies outside the codebook of {total}"):
        quantizer.decode(torch.full(SHAPE, total))
    with pytest.raises(ValueError, match="index -1 lies outside"):
        quantizer.decode(torch.full(SHAPE, -1))


def test_a_config_of_before_the_new_fields_still_loads() -> None:
    old = {"quantizer": "vq", "codebook_size": 1024, "codebook_dim": 8, "vq_decay": 0.99, "format_version": 1}
    config = VidTokConfig.from_dict(old)
    assert (config.num_codebooks, config.codebook_factors, config.num_ids) == (1, [1024], 1024)
    names = {f"vq._codebook.{name}" for name in ("initted", "cluster_size", "embed_avg", "embed")}
    assert set(build_quantizer(config).state_dict()) == names
    assert build_quantizer(VidTokConfig.from_dict({"fsq_levels": [8, 5, 5, 5]})).state_dict() == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantizer": "lfq", "codebook_size": 1000}, "codebook_size=1000 is no power of two.*use 512 or 1024"),
        ({"quantizer": "bsq", "codebook_size": 3}, "codebook_size=3 is no power of two.*use 2 or 4"),
        (
            {"fsq_levels": [8, 5, 5, 5], "codebook_size": 1024},
            "codebook_size=1024 is not the 1000 that fsq_levels=.8, 5, 5, 5. make: set",
        ),
        ({"codebook_size": 997}, "codebook_size=997 is no product of whole numbers from 3 to 8"),
        ({"fsq_levels": [5, 5], "codebook_dim": 4}, "codebook_dim=4 is not the 2 that fsq_levels"),
        ({"fsq_levels": [4096]}, "fsq_levels=.4096. has a level that is not 3 to 1000"),
        ({"quantizer": "vq", "fsq_levels": [8, 5, 5]}, "fsq_levels=.8, 5, 5. mean nothing to quantizer=vq: set fsq_levels=null"),
        ({"quantizer": "lfq", "codebook_size": 64, "codebook_dim": 8}, "codebook_dim=8 is not the 6 bits of codebook_size=64"),
        ({"quantizer": "bsq", "codebook_size": 64, "num_codebooks": 2}, "num_codebooks=2 does not go with quantizer=bsq"),
        ({"quantizer": "kl", "num_codebooks": 2}, "num_codebooks=2 does not go with quantizer=kl"),
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"quantizer": "lfq", "codebook_size": 1 << 25}, "too many ids"),
        ({"quantizer": "lfq", "codebook_size": 1 << 21, "num_codebooks": 3}, "too many ids"),
        ({"quantizer": "lfq", "codebook_size": 64, "entropy_weight": -0.1}, "entropy_weight=-0.1 is below 0"),
        ({"quantizer": "kl", "kl_weight": -1.0}, "kl_weight=-1.0 is below 0"),
    ],
)
def test_impossible_codebooks_are_refused_in_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        VidTokConfig(**options)


def test_the_bits_of_a_lookup_free_codebook_are_its_channels() -> None:
    config = VidTokConfig(quantizer="lfq", codebook_size=1 << 18, num_codebooks=2)
    assert (config.codebook_dim, config.codebook_factors, config.num_ids) == (18, [1 << 18] * 2, 1 << 36)
    quantizer = build_quantizer(VidTokConfig(quantizer="lfq", codebook_size=8))
    assert quantizer.decode(torch.tensor(3).reshape(1, 1, 1, 1)).flatten().tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("size", "levels"), [(240, [8, 6, 5]), (1000, [8, 5, 5, 5]), (1024, [8, 8, 4, 4]), (64000, [8, 8, 8, 5, 5, 5])]
)
def test_fsq_makes_its_levels_from_the_size_of_the_codebook(size: int, levels: list[int]) -> None:
    config = VidTokConfig(quantizer="fsq", codebook_size=size)
    assert (config.fsq_levels, config.codebook_shape, config.num_ids) == (levels, (size, len(levels)), size)
