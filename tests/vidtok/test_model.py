import random
import subprocess
import sys

import pytest
import torch

from tests.conftest import randomised
from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel

SHAPES = [(1, 4, 4), (1, 8, 8), (2, 8, 4), (4, 8, 4), (4, 16, 4), (2, 16, 8)]


def tiny(stride_t: int = 4, stride_s: int = 8, patch_s: int = 4, **options: object) -> VidTokModel:
    torch.manual_seed(0)
    codes = {"fsq_levels": [5, 5, 3]} if options.get("quantizer", "fsq") == "fsq" else {"codebook_size": 32}
    blocks = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "vq_kmeans_init": False, **codes, **options}
    model = VidTokModel(VidTokConfig(stride_t=stride_t, stride_s=stride_s, patch_s=patch_s, **blocks))
    return randomised(model)


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


def edited(clips: torch.Tensor, first: int, rng: random.Random) -> torch.Tensor:
    """Draw frame `first` anew, and of those after it each with a chance of a half."""
    generator, changed = torch.Generator().manual_seed(rng.randrange(1 << 30)), clips.clone()
    for frame in range(first, clips.shape[2]):
        if frame == first or rng.random() < 0.5:
            changed[:, :, frame] = torch.rand(clips[:, :, frame].shape, generator=generator, dtype=clips.dtype) * 2 - 1
    return changed


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("stride_t", "stride_s", "patch_s"), SHAPES)
def test_a_changed_frame_changes_no_earlier_latent_or_frame(stride_t: int, stride_s: int, patch_s: int, norm: str) -> None:
    model = tiny(stride_t, stride_s, patch_s, norm=norm).double()
    video = clip(1 + 3 * stride_t).double()
    codes = torch.randn(2, model.config.codebook_dim, 4, 32 // stride_s, 32 // stride_s).double()
    rng = random.Random(stride_t * stride_s)
    before, decoded = model.encoder(model.patchify(video)), model.patchify.inverse(model.decoder(codes))
    for _ in range(8):
        frame = rng.randrange(1, video.shape[2])
        after, latent = model.encoder(model.patchify(edited(video, frame, rng))), 1 + (frame - 1) // stride_t
        assert torch.equal(before[:, :, :latent], after[:, :, :latent])
        assert not torch.equal(before[:, :, latent], after[:, :, latent])
        latent = rng.randrange(1, codes.shape[2])
        after, frame = model.patchify.inverse(model.decoder(edited(codes, latent, rng))), 1 + (latent - 1) * stride_t
        assert torch.equal(decoded[:, :, :frame], after[:, :, :frame])
        assert not torch.equal(decoded[:, :, frame : frame + stride_t], after[:, :, frame : frame + stride_t])


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
    model = tiny(stride_t, quantizer=quantizer)
    video = clip(1 + stride_t)
    indices = model.encode(video)
    assert torch.equal(model.decode(indices), model.reconstruct(video))
    direct = model(video)
    assert torch.equal(direct.indices, indices)
    torch.testing.assert_close(direct.reconstruction.clamp(-1, 1), model.decode(indices), atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_encoding_in_training_mode_changes_nothing(quantizer: str) -> None:
    model = tiny(1, quantizer=quantizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.encode(clip(3))
    assert torch.equal(first, model.encode(clip(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_encoding_leaves_frozen_parts_frozen() -> None:
    model = tiny(1, quantizer="vq").train()
    model.quantizer.eval()
    model.decode(model.encode(clip(3)))
    assert model.training and model.encoder.training and not model.quantizer.training


def test_a_clip_does_not_depend_on_its_neighbours() -> None:
    model, video = tiny(4), clip(5, batch=3)
    assert torch.equal(model.encode(video)[1:2], model.encode(video[1:2]))


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_a_saved_model_loads_equal_in_a_new_process(quantizer: str, tmp_path) -> None:
    model = tiny(2, quantizer=quantizer)
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
        (clip(5)[0], r"video of shape \(3, 5, 32, 32\) came: it must be \(B, 3, T, H, W\)"),
        (clip(5)[:, :, :0], r"video of shape \(2, 3, 0, 32, 32\) came"),
    ],
)
@pytest.mark.parametrize("call", ["encode", "encode_latents", "reconstruct"])
def test_a_wrong_clip_is_refused_in_one_sentence(video: torch.Tensor, sentence: str, call: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        getattr(tiny(), call)(video)


def test_ids_outside_the_codebook_are_refused() -> None:
    model = tiny()
    indices = model.encode(clip(5))
    indices[0, 0, 0, 0] = model.config.codebook_size
    with pytest.raises(ValueError, match="index 75 lies outside the codebook of 75"):
        model.decode(indices)


@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        (torch.zeros(1, 0, 4, 4).long(), r"indices have shape \(1, 0, 4, 4\), not \(B, t, h, w\) of 1 or more each"),
        (torch.zeros(1, 4, 4).long(), r"not \(B, t, h, w\)"),
        (torch.zeros(1, 2, 4, 4), "indices are torch.float32, but ids are whole numbers"),
        (torch.zeros(1, 2, 4, 4).bool(), "indices are torch.bool"),
    ],
)
def test_what_are_no_ids_is_refused(indices: torch.Tensor, sentence: str) -> None:
    model = tiny()
    for call in (model.decode, model.decode_chunk):
        with pytest.raises(ValueError, match=sentence):
            call(indices)
    with pytest.raises(ValueError, match=rf"{sentence}|stream ended before|must be \(B, n, h, w\)"):
        list(model.stream_decode([indices]))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 4, 2, 4, 4), (1, 3, 0, 4, 4)])
def test_what_are_no_latents_is_refused(shape: tuple[int, ...]) -> None:
    model = tiny()
    for call in (model.decode_latents, lambda latents: list(model.stream_decode_latents([latents]))):
        with pytest.raises(
            ValueError, match=r"\(B, 3, t, h, w\) of 1 or more each|must be \(B, C, n, H, W\)|stream ended before"
        ):
            call(torch.zeros(shape))


@pytest.mark.parametrize("call", ["encode", "decode", "encode_chunk", "decode_chunk", "stream_encode", "stream_decode"])
def test_continuous_latents_have_no_ids(call: str) -> None:
    model = tiny(quantizer="kl")
    given = clip(5) if "encode" in call else torch.zeros(1, 2, 4, 4).long()
    with pytest.raises(ValueError, match="quantizer=kl has continuous latents and no indices: use encode_latents"):
        list(getattr(model, call)([given] if "stream" in call else given))


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
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    for damaged in ("[]", text.replace('"format_version": 1', '"format_version": "1"')):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"holds no options|format '1', this version reads"):
            load_model(VidTokModel, tmp_path)
    config.write_text(text)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_model(VidTokModel, tmp_path)


def test_encoding_with_a_codebook_that_was_never_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="never filled"):
        tiny(1, quantizer="vq", vq_kmeans_init=True).encode(clip(3))
