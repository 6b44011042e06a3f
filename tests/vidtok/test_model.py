import subprocess
import sys

import pytest
import torch

from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel

SHAPES = [(1, 4, 4), (1, 8, 8), (2, 8, 4), (4, 8, 4), (4, 16, 4), (2, 16, 8)]


def tiny(stride_t: int = 4, stride_s: int = 8, patch_s: int = 4, **options: object) -> VidTokModel:
    torch.manual_seed(0)
    blocks = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "fsq_levels": [5, 5, 3], "vq_kmeans_init": False, **options}
    model = VidTokModel(VidTokConfig(stride_t=stride_t, stride_s=stride_s, patch_s=patch_s, **blocks))
    for name, parameter in model.named_parameters():
        # Zero-initialised branches would hide a leak in them.
        if "conv2.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def clip(frames: int, side: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("stride_t", "stride_s", "patch_s"), SHAPES)
def test_encode_and_decode_give_the_promised_shapes(stride_t: int, stride_s: int, patch_s: int) -> None:
    model = tiny(stride_t, stride_s, patch_s)
    video = clip(1 + 2 * stride_t)
    indices = model.encode(video)
    assert indices.shape == (2, 3, 32 // stride_s, 32 // stride_s)
    assert indices.dtype == torch.int64
    assert 0 <= int(indices.min()) <= int(indices.max()) < model.config.codebook_size
    assert model.decode(indices).shape == video.shape


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("stride_t", "stride_s", "patch_s"), SHAPES)
def test_a_changed_frame_changes_no_earlier_latent_or_frame(stride_t: int, stride_s: int, patch_s: int, norm: str) -> None:
    model = tiny(stride_t, stride_s, patch_s, norm=norm).double()
    video = clip(1 + 3 * stride_t).double()
    for frame in (stride_t + 1, 2 * stride_t + 1):
        edited = video.clone()
        edited[:, :, frame:] = -edited[:, :, frame:]
        before, after = (model.encoder(model.patchify(x)) for x in (video, edited))
        latent = 1 + (frame - 1) // stride_t
        assert torch.equal(before[:, :, :latent], after[:, :, :latent])
        assert not torch.equal(before[:, :, latent:], after[:, :, latent:])
    codes = torch.randn(2, model.config.codebook_dim, 4, 32 // stride_s, 32 // stride_s).double()
    edited = codes.clone()
    edited[:, :, 2:] = -edited[:, :, 2:]
    before, after = (model.patchify.inverse(model.decoder(x)) for x in (codes, edited))
    assert torch.equal(before[:, :, : 1 + stride_t], after[:, :, : 1 + stride_t])
    assert not torch.equal(before[:, :, 1 + stride_t :], after[:, :, 1 + stride_t :])


@pytest.mark.parametrize("stride_t", [1, 2, 4])
def test_an_image_is_the_first_frame_of_a_clip(stride_t: int) -> None:
    model = tiny(stride_t)
    video = clip(1 + 2 * stride_t)
    assert torch.equal(model.encode(video[:, :, :1]), model.encode(video)[:, :1])


@pytest.mark.parametrize("stride_t", [1, 2, 4])
def test_patches_unfold_to_the_same_clip(stride_t: int) -> None:
    model, video = tiny(stride_t), clip(1 + 2 * stride_t)
    assert torch.equal(model.patchify.inverse(model.patchify(video)), video)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("stride_t", [1, 4])
def test_decoding_an_encoding_is_the_reconstruction(quantizer: str, stride_t: int) -> None:
    model = tiny(stride_t, quantizer=quantizer, codebook_size=32)
    video = clip(1 + stride_t)
    indices = model.encode(video)
    assert torch.equal(model.decode(indices), model.reconstruct(video))
    direct = model(video)
    assert torch.equal(direct.indices, indices)
    torch.testing.assert_close(direct.reconstruction.clamp(-1, 1), model.decode(indices), atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_encoding_in_training_mode_changes_nothing(quantizer: str) -> None:
    model = tiny(1, quantizer=quantizer, codebook_size=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.encode(clip(3))
    assert torch.equal(first, model.encode(clip(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_encoding_leaves_frozen_parts_frozen() -> None:
    model = tiny(1, quantizer="vq", codebook_size=32).train()
    model.quantizer.eval()
    model.decode(model.encode(clip(3)))
    assert model.training and model.encoder.training and not model.quantizer.training


def test_a_clip_does_not_depend_on_its_neighbours() -> None:
    model, video = tiny(4), clip(5, batch=3)
    assert torch.equal(model.encode(video)[1:2], model.encode(video[1:2]))


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_a_saved_model_loads_equal_in_a_new_process(quantizer: str, tmp_path) -> None:
    model = tiny(2, quantizer=quantizer, codebook_size=32)
    video = clip(5)
    save_model(model, tmp_path)
    torch.save({"video": video, "indices": model.encode(video), "decoded": model.reconstruct(video)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; from vidtok.folders import load_model; from vidtok.model import VidTokModel\n"
        "m = load_model(VidTokModel, sys.argv[1]); e = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(m.encode(e['video']), e['indices']) and torch.equal(m.decode(e['indices']), e['decoded'])\n"
        "print(m.fingerprint())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == model.fingerprint()


def test_the_fingerprint_changes_with_one_weight() -> None:
    model = tiny()
    before = model.fingerprint()
    assert before == tiny().fingerprint()
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    assert model.fingerprint() != before


def test_one_batch_overfits() -> None:
    model = tiny(1, width=16).train()
    video = clip(2, side=16, batch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(video).reconstruction - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("video", "sentence"),
    [
        (clip(5) * 200, "range|\\[-1, 1\\]"),
        (clip(5)[:, :2], "3|RGB|channel"),
    ],
)
def test_a_wrong_clip_is_refused_in_one_sentence(video: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny().encode(video)


def test_ids_outside_the_codebook_are_refused() -> None:
    model = tiny()
    indices = model.encode(clip(5))
    indices[0, 0, 0, 0] = model.config.codebook_size
    with pytest.raises(ValueError, match="index 75 lies outside the codebook of 75"):
        model.decode(indices)


@pytest.mark.parametrize(
    "options",
    [
        {"stride_t": 3},
        {"stride_s": 5},
        {"patch_s": 16},
        {"quantizer": "magic"},
        {"fsq_levels": [2, 5]},
        {"channel_multipliers": [1]},
        {"width": 0},
        {"encoder_kernel": 2},
        {"vq_decay": 1.7},
        {"dead_code_ratio": 50.0},
    ],
)
def test_an_impossible_architecture_is_refused(options: dict) -> None:
    with pytest.raises(Exception, match="|".join(options)):
        VidTokConfig(**options)


def test_a_damaged_folder_is_one_sentence(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(VidTokModel, tmp_path / "none")
    with pytest.raises(ValueError, match="not a trained folder"):
        load_model(VidTokModel, tmp_path)
    save_model(tiny(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_model(VidTokModel, tmp_path)


def test_encoding_with_a_codebook_that_was_never_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="never filled"):
        tiny(1, quantizer="vq", codebook_size=32, vq_kmeans_init=True).encode(clip(3))
