"""LPIPS from files: against an independent computation, its laws, and every file that cannot be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.signal import correlate
from torch import Tensor, nn

from vidtok.perceptual import load_lpips

NAMES = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
STAGES = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}


def backbone(name: str, width: int = 4) -> dict[str, Tensor]:
    """Give a narrow network of random weights under torchvision's names, with the classifier that its files hold too."""
    generator, tensors, channels = torch.Generator().manual_seed(2), {"classifier.0.weight": torch.ones(2, 2)}, 3
    for number, at in enumerate(NAMES[name]):
        side = {0: 11, 3: 5}.get(at, 3) if name == "alex" else 3
        tensors[f"features.{at}.weight"] = (
            torch.randn(width + number, channels, side, side, generator=generator) / side / channels**0.5
        )
        tensors[f"features.{at}.bias"] = 0.1 * torch.randn(width + number, generator=generator)
        channels = width + number
    return tensors


def heads(name: str, width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = [width + NAMES[name].index(at) for at in STAGES[name]]
    return {f"lin{n}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator) for n, channels in enumerate(widths)}


def pair(side: int = 40, clips: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.rand(clips, 3, side, side, generator=generator) * 2 - 1 for _ in range(2))  # type: ignore[return-value]


def convolve(image: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    maps = [correlate(padded, kernel, mode="valid")[0] + offset for kernel, offset in zip(weight, bias, strict=True)]
    return np.maximum(np.stack(maps), 0)[:, ::stride, ::stride]


def pool(maps: np.ndarray, side: int) -> np.ndarray:
    rows = np.lib.stride_tricks.sliding_window_view(maps, (side, side), axis=(1, 2))
    return rows[:, ::2, ::2].max(axis=(-1, -2))


def reference(name: str, image: np.ndarray, target: np.ndarray) -> float:
    """Compute the distance of two images (3, H, W) layer by layer with SciPy."""
    tensors = {key: value.double().numpy() for key, value in (backbone(name) | heads(name)).items()}
    distance = 0.0
    maps = [
        (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        for x in (image, target)
    ]
    for at in NAMES[name]:
        if at in ((3, 6) if name == "alex" else (5, 10, 17, 24)):
            maps = [pool(x, 3 if name == "alex" else 2) for x in maps]
        stride, padding = ({0: (4, 2), 3: (1, 2)}.get(at, (1, 1))) if name == "alex" else (1, 1)
        maps = [convolve(x, tensors[f"features.{at}.weight"], tensors[f"features.{at}.bias"], stride, padding) for x in maps]
        if at in STAGES[name]:
            ours, theirs = (x / np.sqrt((x**2).sum(axis=0) + 1e-10) for x in maps)
            weight = tensors[f"lin{STAGES[name].index(at)}.model.1.weight"][0]
            distance += (weight * (ours - theirs) ** 2).sum(axis=0).mean()
    return distance


@pytest.fixture(params=["alex", "vgg"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_distance_is_that_of_a_plain_computation(name: str, tmp_path: Path) -> None:
    torch.save(backbone(name), tmp_path / "net.pth")
    torch.save(heads(name), tmp_path / "heads.pth")
    lpips = load_lpips(tmp_path / "net.pth", tmp_path / "heads.pth")
    image, target = pair()
    expected = [reference(name, image[k].double().numpy(), target[k].double().numpy()) for k in range(2)]
    np.testing.assert_allclose(lpips(image, target).numpy(), expected, rtol=1e-4)


def test_identity_is_zero_and_the_distance_symmetric(name: str, tmp_path: Path) -> None:
    torch.save(backbone(name) | heads(name), tmp_path / "both.pth")
    lpips = load_lpips(tmp_path / "both.pth")
    image, target = pair()
    assert lpips(image, image).tolist() == [0.0, 0.0]
    assert torch.equal(lpips(image, target), lpips(target, image))
    assert (lpips(image, target) > 0).all()


def test_every_kind_of_file_gives_the_same_distance(name: str, tmp_path: Path) -> None:
    torch.save(backbone(name), tmp_path / "net.pth")
    save_file(heads(name), tmp_path / "heads.safetensors")
    slices = {key.replace("features.", "net.slice1."): value for key, value in backbone(name).items() if "features" in key}
    save_file(slices | heads(name), tmp_path / "package.safetensors")
    apart = load_lpips(tmp_path / "net.pth", tmp_path / "heads.safetensors")
    together = load_lpips(tmp_path / "package.safetensors")
    assert torch.equal(apart(*pair()), together(*pair()))


def test_it_stays_frozen_and_in_eval_mode_inside_a_training_parent_and_in_fp32(tmp_path: Path) -> None:
    torch.save(backbone("alex") | heads("alex"), tmp_path / "both.pth")
    lpips = load_lpips(tmp_path / "both.pth")
    parent = nn.Sequential(nn.Dropout(), lpips).train()
    assert parent.training and not any(module.training for module in lpips.modules())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    image, target = pair()
    expected = lpips(image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(image, target), expected)


def test_flat_images_have_a_finite_gradient(tmp_path: Path) -> None:
    dead = {key: -value.abs() if key.endswith("bias") else 0 * value for key, value in backbone("vgg").items()}
    torch.save(dead | heads("vgg"), tmp_path / "dead.pth")
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    load_lpips(tmp_path / "dead.pth")(image, torch.ones(1, 3, 16, 16)).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_drawn_frames_are_frames_of_their_own_clip(tmp_path: Path) -> None:
    torch.save(backbone("alex") | heads("alex"), tmp_path / "both.pth")
    lpips = load_lpips(tmp_path / "both.pth")
    video, reference_clip = (torch.stack([image] * 4, dim=2) for image in pair(32))
    whole = lpips.of_clips(video, reference_clip)
    torch.testing.assert_close(lpips.of_clips(video, reference_clip, 1), whole)  # all frames of a clip are alike here
    video[:, :, 2] = reference_clip[:, :, 2]
    torch.manual_seed(0)
    drawn = {round(float(lpips.of_clips(video[:1], reference_clip[:1], 1)), 6) for _ in range(12)}
    assert len(drawn) == 2 and 0.0 in drawn
    torch.testing.assert_close(lpips.of_clips(video, reference_clip), 0.75 * whole)


def test_the_checksum_is_kept_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    torch.save(backbone("alex") | heads("alex"), path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_lpips(path).checksum == load_lpips(path, sha256=checksum[:8].upper()).checksum == checksum
    assert load_lpips(path).heads_checksum == checksum
    torch.save(heads("alex"), tmp_path / "heads.pth")
    apart = load_lpips(path, tmp_path / "heads.pth")
    assert apart.heads_checksum == hashlib.sha256((tmp_path / "heads.pth").read_bytes()).hexdigest() != apart.checksum == checksum
    for wrong in ("0" * 64, checksum[:4]):
        with pytest.raises(ValueError, match=f"has the SHA-256 checksum {checksum}, not {wrong}: get the file again"):
            load_lpips(path, sha256=wrong)


def test_heads_that_no_file_holds_are_those_that_torchmetrics_brings(tmp_path: Path) -> None:
    torch.save(backbone("alex"), tmp_path / "net.pth")
    # The real heads do not fit a narrow network, which shows that they were found.
    with pytest.raises(
        ValueError, match=r"alex\.pth has shape \(1, 64, 1, 1\) under lin0\.model\.1\.weight, where alex needs \(1, 4, 1, 1\)"
    ):
        load_lpips(tmp_path / "net.pth")


def test_files_that_cannot_be_used_are_named_in_one_sentence(tmp_path: Path) -> None:
    contents = {
        "vgg13.pth": {key: value for key, value in backbone("vgg").items() if ".28." not in key},
        "list.pth": [1, 2],
        "heads.pth": heads("vgg"),
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save(backbone("vgg"), tmp_path / "net.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    expected = {
        ("missing.pth", None): "is no file: give lpips_weights=FILE",
        ("vgg13.pth", None): "holds neither AlexNet's nor VGG16's convolutions",
        ("list.pth", None): "is no state dict",
        ("text.pth", None): "cannot be read as a state dict",
        ("text.safetensors", None): "cannot be read as a state dict",
        ("module.pth", None): "cannot be read as a state dict",
        ("net.pth", "net.pth"): "has nothing under lin0.model.1.weight",
    }
    for (weights, others), message in expected.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_lpips(tmp_path / weights, None if others is None else tmp_path / others)
        assert "\n" not in str(caught.value)


def test_images_that_are_too_small_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(backbone(name) | heads(name), tmp_path / "both.pth")
    lpips, least = load_lpips(tmp_path / "both.pth"), {"alex": 31, "vgg": 16}[name]
    assert lpips(*pair(least)).isfinite().all()
    with pytest.raises(ValueError, match=f"images of {least - 1}x{least - 1} pixels, its network needs {least}"):
        lpips(*pair(least - 1))
