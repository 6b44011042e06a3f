"""Use of codebooks against counts of the last tokens, what a warning says and when, and codes after the recommended recipe."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vidtok.codebook import CodebookMonitor, check_same_codebook, codebook_hash
from vidtok.config import VidTokConfig
from vidtok.digits import join_digits
from vidtok.metrics import CodeMeter
from vidtok.quantizer import build_quantizer


def test_the_window_holds_exactly_the_last_tokens() -> None:
    monitor, generator = CodebookMonitor([11], window_tokens=100), torch.Generator().manual_seed(0)
    seen = torch.zeros(0, dtype=torch.int64)
    for size in (30, 1, 69, 50, 0, 250, 7, 99, 100):
        indices = torch.randint(0, 1 + size % 11, (size,), generator=generator)
        monitor.update(indices)
        seen = torch.cat([seen, indices])
        counts = torch.bincount(seen[-100:], minlength=11)
        figures, shares = monitor.figures(), counts[counts > 0] / counts.sum()
        assert figures["codebook_window_tokens"] == min(100, len(seen))
        assert figures["codebook_window_dead_codes"] == int((counts == 0).sum())
        assert figures["codebook_window_used_fraction"] == pytest.approx(int((counts > 0).sum()) / 11)
        assert figures["codebook_window_perplexity_codes"] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


def test_several_codebooks_have_figures_of_their_own() -> None:
    monitor = CodebookMonitor([4, 8])
    digits = torch.stack([torch.tensor([0, 1, 0, 1]), torch.tensor([7, 7, 7, 7])], dim=-1)
    monitor.update(join_digits(digits, [4, 8]).reshape(1, 1, 2, 2))
    figures = monitor.figures()
    assert (figures["codebook_window_used_fraction_0"], figures["codebook_window_used_fraction_1"]) == (0.5, 1 / 8)
    assert figures["codebook_window_perplexity_codes_0"] == pytest.approx(2.0)
    assert (figures["codebook_window_dead_codes_0"], figures["codebook_window_dead_codes_1"]) == (2, 7)


def test_a_collapsed_codebook_is_named_with_its_use_and_its_remedies() -> None:
    monitor = CodebookMonitor([4096], window_tokens=20_000)
    monitor.update(torch.arange(20_000) % 37)
    assert monitor.warning() == (
        "codebook: 37 of 4096 codes used over the last 20,000 tokens: try tokenizer.quantizer=fsq, a lower "
        "tokenizer.codebook_dim, or a higher tokenizer.dead_code_ratio"
    )


def test_a_warning_waits_for_four_tokens_a_code_or_a_full_window() -> None:
    monitor = CodebookMonitor([4096])
    monitor.update(torch.zeros(4 * 4096 - 1, dtype=torch.int64))
    assert monitor.warning() is None
    monitor.update(torch.zeros(1, dtype=torch.int64))
    assert "1 of 4096 codes" in str(monitor.warning())
    short = CodebookMonitor([4096], window_tokens=1000)
    assert short.warning() is None
    # A thousand tokens cannot use more than a fifth of 4096 codes by much: what counts is what even use would reach.
    short.update(torch.arange(1000))
    assert short.warning() is None
    short.update(torch.arange(1000) % 150)
    assert "150 of 4096 codes" in str(short.warning())


def test_an_even_codebook_raises_no_warning() -> None:
    monitor = CodebookMonitor([512], window_tokens=4096)
    monitor.update(torch.randint(0, 512, (4096,), generator=torch.Generator().manual_seed(0)))
    assert monitor.warning() is None


@pytest.mark.parametrize(("quantizer", "remedy"), [("fsq", "fsq_levels"), ("lfq", "entropy_weight"), ("simvq", "quantizer=fsq")])
def test_the_remedy_goes_with_the_method_and_names_the_codebook(quantizer: str, remedy: str) -> None:
    monitor = CodebookMonitor([2, 64, 64], window_tokens=256, quantizer=quantizer)
    monitor.update(torch.arange(256) % 2)
    warning = str(monitor.warning())
    assert warning.startswith("codebook 1: 1 of 64 codes used over the last 256 tokens; codebook 2: 1 of 64")
    assert remedy in warning
    assert "codebook 0" not in warning


def test_impossible_windows_and_codebooks_are_refused() -> None:
    with pytest.raises(ValueError, match="window_tokens=0"):
        CodebookMonitor([8], window_tokens=0)
    with pytest.raises(ValueError, match="factors=\\[\\]"):
        CodebookMonitor([])


def test_the_hash_changes_with_any_bit_of_the_codebook() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(VidTokConfig(quantizer="vq", codebook_size=16, codebook_dim=4, vq_kmeans_init=False))
    before = codebook_hash(quantizer)
    assert before == codebook_hash(quantizer.eval())
    check_same_codebook(quantizer)
    quantizer.vq._codebook.cluster_size[0, 3] += 1e-6
    assert codebook_hash(quantizer) != before


def test_the_code_meter_counts_every_codebook_by_itself() -> None:
    factors, generator = [1 << 16] * 3, torch.Generator().manual_seed(0)
    digits = torch.stack([torch.randint(0, size, (500,), generator=generator) for size in (1, 4, 1 << 16)], dim=-1)
    meter = CodeMeter(factors)
    meter.update(join_digits(digits, factors)[:200])
    meter.update(join_digits(digits, factors)[200:])
    for number in range(3):
        alone = CodeMeter(1 << 16)
        alone.update(digits[:, number])
        assert torch.equal(meter.digit_counts[number], alone.counts)
        assert meter.summary()[f"codebook_used_codes_{number}"] == alone.used()
        assert meter.summary()[f"codebook_perplexity_codes_{number}"] == pytest.approx(alone.perplexity())
    summary = meter.summary()
    assert summary["codes_seen_tokens"] == 500
    assert summary["raw_bits_per_token"] == 48
    assert 0 + 1.9 + 8.5 < summary["entropy_bits_per_token"] < 0 + 2 + math.log2(500)
    with pytest.raises(ValueError, match=f"0 to {2**48 - 1}"):
        meter.update(torch.tensor([1 << 48]))


def test_bits_per_token_are_logarithms_of_size_and_perplexity() -> None:
    meter = CodeMeter(1000)
    assert meter.summary()["entropy_bits_per_token"] == 0.0
    meter.update(torch.arange(8).repeat(5))
    summary = meter.summary()
    assert summary["raw_bits_per_token"] == pytest.approx(math.log2(1000))
    assert summary["entropy_bits_per_token"] == pytest.approx(3.0)
    assert summary["codebook_perplexity_codes"] == pytest.approx(8.0)
    assert not any(key.endswith("_0") for key in summary)


@pytest.mark.parametrize("codebooks", [0, [], [8, 0], 1 << 48])
def test_what_cannot_be_counted_is_refused(codebooks: int | list[int]) -> None:
    with pytest.raises(ValueError, match="codebook_factors"):
        CodeMeter(codebooks)


def smooth_patches(seed: int, images: int = 1) -> Tensor:
    """Patches (B, 1, 16, 16, 16) of 4 x 4 values of smooth noise of variance 1."""
    noise = torch.randn(images, 1, 70, 70, generator=torch.Generator().manual_seed(seed))
    smooth = 7 * F.avg_pool2d(noise, 7, stride=1)
    return rearrange(smooth, "b 1 (h p) (w q) -> b 1 h w (p q)", p=4, q=4)


class Recipe(nn.Module):
    """A linear tokenizer of patches."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.quantizer = build_quantizer(VidTokConfig(**options))
        self.encoder = nn.Linear(16, self.quantizer.channels_in)
        self.decoder = nn.Linear(self.quantizer.channels_out, 16)

    def latents(self, patches: Tensor) -> Tensor:
        return rearrange(self.encoder(patches), "b t h w d -> b d t h w")

    def fit(self, warm_up: int, steps: int) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        for step in range(steps):
            patches = smooth_patches(step)
            latents, loss = self.latents(patches), torch.zeros(())
            if step < warm_up:
                codes = self.quantizer.bypass(latents)
            else:
                quantized = self.quantizer(latents)
                codes, loss = quantized.codes, quantized.loss
            loss = loss + F.mse_loss(self.decoder(rearrange(codes, "b d t h w -> b t h w d")), patches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def used_fraction(steps: int = 120, warm_up: int = 40, **options: object) -> float:
    torch.manual_seed(0)
    recipe = Recipe(**options)
    recipe.fit(warm_up, steps)
    monitor = CodebookMonitor(recipe.quantizer.factors, quantizer=str(options["quantizer"]))
    with torch.no_grad():
        monitor.update(recipe.quantizer.eval()(recipe.latents(smooth_patches(10_000, images=64))).indices)
    return min(value for key, value in monitor.figures().items() if "used_fraction" in key)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"quantizer": "vq", "codebook_size": 256, "codebook_dim": 4}, 0.9),
        ({"quantizer": "vq", "codebook_size": 64, "codebook_dim": 4, "num_codebooks": 2}, 0.9),
        ({"quantizer": "fsq", "fsq_levels": [8, 6, 5]}, 0.5),
        ({"quantizer": "simvq", "codebook_size": 256, "codebook_dim": 4}, 0.5),
        ({"quantizer": "lfq", "codebook_size": 256}, 0.5),
        ({"quantizer": "bsq", "codebook_size": 256}, 0.5),
    ],
    ids=lambda value: value["quantizer"] if isinstance(value, dict) else "",
)
def test_after_an_unquantised_warm_up_smooth_data_use_most_of_the_codebook(options: dict, least: float) -> None:
    assert used_fraction(**options) > least


def test_without_warm_up_start_and_revival_a_codebook_collapses() -> None:
    bare = {"quantizer": "vq", "codebook_size": 256, "codebook_dim": 4, "vq_kmeans_init": False, "dead_code_ratio": 0.0}
    assert used_fraction(warm_up=0, **bare) < 0.3
