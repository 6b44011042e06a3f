import random
import subprocess
import sys

import pytest
import torch

from vidtok.config import VidTokConfig
from vidtok.model import VidTokModel
from vidtok.streaming import StreamState, latents_at_once, regroup


def model_of(seed: int, **options: object) -> VidTokModel:
    torch.manual_seed(seed)
    defaults = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "fsq_levels": [5, 5, 3], "vq_kmeans_init": False}
    model = VidTokModel(VidTokConfig(**(defaults | options)))
    for name, parameter in model.named_parameters():
        # Zero-initialised branches would hide a seam in them.
        if "conv2.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


CASES = [
    {"stride_t": 1},
    {"stride_t": 1, "temporal_decoder": True, "norm": "layer"},
    {"stride_t": 2, "patching": "haar"},
    {"stride_t": 4, "quantizer": "vq", "codebook_size": 32},
    {"stride_t": 4, "patch_s": 8, "temporal_encoder": False},
    {"stride_t": 4, "norm": "layer"},
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_clip_in_random_chunks_gives_what_it_gives_whole(options: dict, seed: int) -> None:
    model, rng = model_of(seed, **options), random.Random(seed)
    stride = model.stride_t
    video = clip(1 + stride * rng.randint(1, 9))
    latents = model._latents(video, video.shape[2] + stride)
    codes = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    whole = model._video(codes, None, video.shape[2] + stride)
    for chunk_frames in (1, rng.randint(1, video.shape[2]), None):
        torch.testing.assert_close(model._latents(video, chunk_frames), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(model._video(codes, None, chunk_frames), whole, atol=1e-5, rtol=0)


QUANTIZERS = [
    {"quantizer": "simvq", "codebook_size": 32},
    {"quantizer": "lfq", "codebook_size": 32},
    {"quantizer": "bsq", "codebook_size": 32},
    {"quantizer": "vq", "codebook_size": 16, "num_codebooks": 3},
    {"quantizer": "fsq", "num_codebooks": 2},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", CASES + QUANTIZERS, ids=str)
def test_a_stream_of_any_pieces_is_the_whole_clip(options: dict, seed: int) -> None:
    # In double precision no latent comes so near to the border of two codes that rounding could decide.
    model, rng = model_of(seed, **options).double(), random.Random(seed)
    video = clip(rng.randint(1, 19))
    cuts = sorted(rng.sample(range(1, video.shape[2] + 1), k=min(3, video.shape[2])))
    pieces = [part for part in torch.tensor_split(video, cuts, dim=2) if part.shape[2]]
    indices = model.encode(video)
    assert torch.equal(torch.cat(list(model.stream_encode(pieces)), dim=1), indices)
    decoded = torch.cat(list(model.stream_decode(indices.split(rng.randint(1, 3), dim=1))), dim=2)
    torch.testing.assert_close(decoded, model.decode(indices), atol=1e-5, rtol=0)


def test_a_state_can_be_branched_and_moved_and_never_changes() -> None:
    model, video = model_of(0, stride_t=4), clip(13)
    first, state = model.encode_chunk(video[:, :, :5])
    kept = [tensor.clone() for tensor in state.tensors]
    one, _ = model.encode_chunk(video[:, :, 5:9], state.to("cpu"))
    other, _ = model.encode_chunk(-video[:, :, 5:9], state)
    assert not torch.equal(one, other)
    assert all(torch.equal(before, after) for before, after in zip(kept, state.tensors, strict=True))
    assert torch.equal(torch.cat([first, one], dim=1), model.encode(video)[:, :3])


def test_two_streams_interleave() -> None:
    model, left, right = model_of(0, stride_t=4), clip(9), clip(9) * 0.5
    streams = [model.stream_encode(iter(video.split(1, dim=2))) for video in (left, right)]
    results: list[list[torch.Tensor]] = [[], []]
    for pair in zip(*streams, strict=True):
        for number, indices in enumerate(pair):
            results[number].append(indices)
    assert torch.equal(torch.cat(results[0], dim=1), model.encode(left))
    assert torch.equal(torch.cat(results[1], dim=1), model.encode(right))


def test_a_stream_gives_each_chunk_as_soon_as_it_is_whole() -> None:
    model, seen = model_of(0, stride_t=4), []

    def source() -> object:
        for frame in clip(9).split(1, dim=2):
            seen.append(frame)
            yield frame

    stream = model.stream_encode(source())
    assert next(stream).shape[1] == 1 and len(seen) == 1
    assert next(stream).shape[1] == 1 and len(seen) == 5


def test_what_is_kept_does_not_grow_with_the_clip() -> None:
    model, sizes = model_of(0, stride_t=4), []
    state: StreamState | None = None
    for frames in (5, *[4] * 20):
        _, state = model.encode_chunk(clip(frames), state)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in state.tensors))
    assert len(set(sizes)) == 1 and sizes[0] > 0


@pytest.mark.parametrize("frames", [(3,), (1, 3), (4,)])
def test_a_chunk_that_is_no_whole_step_is_refused(frames: tuple[int, ...]) -> None:
    model, state = model_of(0, stride_t=4), None
    with pytest.raises(ValueError, match=r"does not fit stride_t=4.*k \* 4 frames"):
        for count in frames:
            _, state = model.encode_chunk(clip(count), state)


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        list(regroup(iter([]), 4))


def test_a_chunk_fits_the_memory_and_is_never_empty() -> None:
    cpu = torch.device("cpu")
    assert latents_at_once(1 << 60, cpu) == 1
    assert latents_at_once(1 << 22, cpu) * (1 << 22) <= 1 << 26
    with pytest.raises(ValueError, match="chunk_frames=0"):
        model_of(0).encode(clip(5), chunk_frames=0)


GROWTH = """
import resource, torch
from vidtok.config import VidTokConfig
from vidtok.model import VidTokModel
torch.set_num_threads(1)
model = VidTokModel(VidTokConfig(stride_t=4, width=16)).eval()
def run(frames):
    pieces = (torch.zeros(1, 3, min(8, frames - at), 64, 64) for at in range(0, frames, 8))
    for video in model.stream_decode(model.stream_encode(pieces)):
        assert video.shape[1:2] == (3,)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
short = run(17)
print((run(2001) - short) * (1 if __import__("sys").platform == "darwin" else 1024))
"""


@pytest.mark.slow
def test_a_hundred_times_longer_stream_takes_no_more_memory() -> None:
    result = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # 2001 frames are 98 MB; what grew is the allocator's.
    assert int(result.stdout) < 16e6
