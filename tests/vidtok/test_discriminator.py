"""What a discriminator sees, and what it must not: other clips of the batch, and, in two dimensions, other frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from vidtok.discriminator import PatchDiscriminator


def clips(count: int = 2, frames: int = 5, side: int = 32) -> Tensor:
    return torch.rand(count, 3, frames, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def discriminator(dimensions: int) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(dimensions, width=8, layers=2).eval()


@pytest.mark.parametrize(("dimensions", "patches"), [(2, 5 * 8 * 8), (3, 3 * 8 * 8)])
def test_every_patch_has_a_score(dimensions: int, patches: int) -> None:
    assert discriminator(dimensions)(clips()).shape == (2, patches)
    assert discriminator(dimensions)(clips(1, frames=1)).shape == (1, 8 * 8)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_score_does_not_depend_on_the_other_clips_of_a_batch(dimensions: int) -> None:
    # In training mode, or a norm over the batch would not show; each pass moves the estimates of spectral norm, so each has its own.
    (model, other), video = (discriminator(dimensions).train() for _ in range(2)), clips(3)
    with torch.no_grad():
        torch.testing.assert_close(model(video)[1:2], other(video[1:2]))


def test_two_dimensions_look_at_a_frame_alone_and_three_at_its_neighbours() -> None:
    video = clips()
    changed = video.clone()
    changed[:, :, 4] = 0
    with torch.no_grad():
        flat, deep = ((model(video) - model(changed)).abs().amax(dim=0) for model in (discriminator(2), discriminator(3)))
    assert flat[: 4 * 64].max() == 0 < flat[4 * 64 :].max()
    assert deep[64:128].max() > 0


@pytest.mark.parametrize("dimensions", [2, 3])
def test_no_layer_normalises_over_a_batch_and_every_kernel_has_norm_one(dimensions: int) -> None:
    model = discriminator(dimensions).train()
    for _ in range(30):  # each pass brings the estimate of the norm nearer
        model(clips(1, side=16))
    model.eval()
    assert not [
        module for module in model.modules() if "Norm" in type(module).__name__ and "Spectral" not in type(module).__name__
    ]
    kernels = [module.weight.detach().flatten(1) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    assert len(kernels) == 4
    for kernel in kernels:
        assert float(torch.linalg.matrix_norm(kernel, 2)) == pytest.approx(1, rel=0.05)


def test_a_saved_discriminator_gives_the_same_scores(tmp_path: Path) -> None:
    model = discriminator(3).train()
    model(clips())
    save_model(model, str(tmp_path / "d.safetensors"))
    torch.manual_seed(9)
    other = PatchDiscriminator(3, width=8, layers=2)
    load_model(other, tmp_path / "d.safetensors")
    assert torch.equal(model(clips()), other(clips()))
