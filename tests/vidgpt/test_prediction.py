import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.vidgpt.conftest import contents, save_predictor, write_pictures
from tests.vidgpt.conftest import prediction_options as options
from vidgpt import prediction
from vidgpt.checkpoint import check_model
from vidgpt.config import VidGPTConfig
from vidgpt.decoding.stream import LongOptions
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import DiagonalKeys, LongKeys
from vidgpt.prediction import predict_file
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.adapters.base import ForeignTokenizer, Options
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model folder with its card and tokenizer, all untrained."""
    return save_predictor(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", ["frame_{:04d}.png", "picture {}.png"])
@pytest.mark.parametrize(
    ("source", "output"), [("shots/frames", "shots"), ("shots/frames", "shots/frames"), ("shots/./frames", "shots")]
)
def test_pictures_where_the_output_would_go_are_refused_and_kept(name, source, output, checkpoint: Path, tmp_path) -> None:
    before = write_pictures(tmp_path / "shots" / "frames", name)
    with pytest.raises(ValueError, match=r"^input=.* lies where output=.* is written"):
        predict_file(options(checkpoint, tmp_path / source, tmp_path / output))
    assert contents(tmp_path) == before


def test_a_prediction_is_no_input_of_its_own_folder(checkpoint: Path, tmp_path) -> None:
    write_pictures(tmp_path / "in")
    predict_file(options(checkpoint, tmp_path / "in", tmp_path / "out"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="lies where output"):
        predict_file(options(checkpoint, tmp_path / "out" / "prediction.mp4", tmp_path / "out"))
    assert contents(tmp_path) == before


def test_a_shorter_prediction_leaves_nothing_of_the_former_and_everything_of_the_user(checkpoint: Path, tmp_path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    mine = write_pictures(source) | write_pictures(out / "frames", "holiday_{}.png")
    (out / "prediction of mine.mp4").write_bytes(b"mine")
    predict_file(options(checkpoint, source, out, future=4, samples=2))
    record = predict_file(options(checkpoint, source, out, future=2))
    files = {out / str(name) for name in json.loads((out / "prediction.json").read_text())["files"]}
    assert record["files"] == [
        "prediction.mp4", "frames/frame_0000.png", "frames/frame_0001.png", "strip.png", "tokens.safetensors", "prediction.json"
    ]  # fmt: skip
    assert set(contents(out)) == files | {path for path in mine if out in path.parents} | {out / "prediction of mine.mp4"}
    assert mine.items() <= contents(tmp_path).items()


@pytest.mark.parametrize(
    "name", ["frames/frame_0001.png", "prediction.mp4", "strip.png", "tokens.safetensors", "prediction.json"]
)
def test_a_file_that_no_prediction_wrote_is_not_overwritten(name: str, checkpoint: Path, tmp_path) -> None:
    write_pictures(tmp_path / "in")
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match="is there already, and no prediction of this folder wrote it"):
        predict_file(options(checkpoint, tmp_path / "in", tmp_path / "out"))
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_record_that_names_other_files_deletes_none_of_them(checkpoint: Path, tmp_path) -> None:
    write_pictures(tmp_path / "in")
    kept = ["../thesis.mp4", "frames/../thesis.mp4", "frames/frame_1.png", "prediction_final.mp4", "frames/frame_0009.png.bak"]
    (tmp_path / "out" / "frames").mkdir(parents=True)
    for name in kept:
        (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "out" / "prediction.json").write_text(json.dumps({"files": [*kept, 7, "prediction.json"]}))
    predict_file(options(checkpoint, tmp_path / "in", tmp_path / "out"))
    assert {(tmp_path / "out" / name).read_text() for name in kept} == {"mine"}


@pytest.mark.parametrize("output", ["taken", "taken/deeper"])
def test_an_output_that_is_a_file_is_refused_before_any_work(output: str, tmp_path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file: give another output folder"):
        predict_file(options(tmp_path / "no checkpoint", tmp_path / "no input", tmp_path / output))


def test_the_window_is_checked_before_the_input_is_decoded(checkpoint: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prediction, "read_context", lambda *_: pytest.fail("the input was read"))
    with pytest.raises(ValueError, match="context of 4 and future of 3 frames exceed the window of 6"):
        predict_file(options(checkpoint, tmp_path / "in", tmp_path / "out", context=4, future=3))


def test_a_clip_of_a_batch_is_predicted_as_it_is_alone(checkpoint: Path) -> None:
    predictor = Predictor.from_pretrained(checkpoint, device="cpu")
    video = torch.rand(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampling = SamplingOptions()
    together = predictor.predict(video, 3, seed=5, options=sampling)
    alone = predictor.predict(video[1:], 3, seed=5, options=sampling, first_sequence=1)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(alone, predictor.predict(video[1:], 3, seed=5, options=sampling), atol=1e-2)
    given = predictor.encode(video)
    rows = torch.stack(list(predictor.stream(given, 3, seed=5, options=sampling)), dim=1)
    row = torch.stack(list(predictor.stream(given[1:], 3, seed=5, options=sampling, first_sequence=1)), dim=1)
    assert torch.equal(rows[1:], row)


def test_clips_of_different_lengths_are_predicted_as_each_alone(checkpoint: Path) -> None:
    predictor = Predictor.from_pretrained(checkpoint, device="cpu")
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clips, request = [video[0, :, :1], video[1]], {"future": 3, "seed": 5, "options": SamplingOptions(), "samples": 2}
    together = predictor.predict(clips, **request)
    alone = [predictor.predict(clip[None], first_sequence=2 * row, **request) for row, clip in enumerate(clips)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    with pytest.raises(ValueError, match="actions of 1 clips came for 2 clips"):
        predictor.predict(clips, 3, actions=[torch.zeros(4)])


def test_a_prediction_is_that_of_the_weights_as_they_are(checkpoint: Path) -> None:
    predictor, video = Predictor.from_pretrained(checkpoint, device="cpu"), torch.zeros(1, 3, 2, 16, 16)
    before = predictor.predict(video, 3, options=SamplingOptions())
    assert predictor.fused is predictor.fused
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in predictor.model.parameters():
            weight.add_(torch.randn_like(weight))
    after = predictor.predict(video, 3, options=SamplingOptions())
    assert not torch.equal(after, before)
    assert torch.equal(
        after, Predictor(predictor.model, predictor.tokenizer, predictor.card).predict(video, 3, options=SamplingOptions())
    )


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("decoding", ["raster", "speculative"])
def test_frames_come_one_by_one_and_are_those_of_predict(decoding: str, history: int, checkpoint: Path) -> None:
    predictor = Predictor.from_pretrained(checkpoint, device="cpu")
    video = torch.rand(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    request = {"future": 9, "decoding": decoding, "history": history, "samples": 2, "long": LongOptions("reprefill", 2)}
    stream = predictor.stream_frames(video, options=SamplingOptions(), seed=3, **request)
    first = next(stream)
    assert first.shape == (2, 3, 1, 16, 16)
    whole = predictor.predict(video, options=SamplingOptions(), seed=3, **request)
    torch.testing.assert_close(torch.cat([first, *stream], dim=2), whole, atol=1e-5, rtol=0)


def test_the_keys_of_decoding_reach_the_plan(checkpoint: Path, tmp_path, capsys) -> None:
    write_pictures(tmp_path / "in")
    source, keys = tmp_path / "in", {"future": 8, "long": LongKeys("reprefill", 3), "samples": 2}
    raster = predict_file(options(checkpoint, source, tmp_path / "raster", **keys))
    fast = predict_file(options(checkpoint, source, tmp_path / "fast", decoding="speculative", **keys))
    assert "trained for" not in capsys.readouterr().out
    rows = predict_file(options(checkpoint, source, tmp_path / "rows", decoding="diagonal", diagonal=DiagonalKeys(1, 2), **keys))
    assert "this model was not trained for decoding=diagonal" in capsys.readouterr().out.splitlines()[0]
    tokens = [(tmp_path / name / "tokens.safetensors").read_bytes() for name in ("raster", "fast")]
    assert tokens[0] == tokens[1]
    assert raster["forward_passes_per_frame"] == 4
    # The window of 6 is full after 4 frames, and after 3 and 1 more.
    assert raster["prefills"] == 3
    assert fast["drafts_accepted_fraction"] is not None
    assert rows["forward_passes_per_frame"] < 4
    with pytest.raises(ValueError, match=r"long.drop=6 leaves nothing of a window of 6"):
        predict_file(options(checkpoint, source, tmp_path / "out", **(keys | {"long": LongKeys("reprefill", 6)})))
    with pytest.raises(ValueError, match=r"long.mode=window needs a model that sees the newest frames alone"):
        predict_file(options(checkpoint, source, tmp_path / "out", **(keys | {"long": LongKeys("window")})))
    assert not (tmp_path / "out").exists()


class Blind(ForeignTokenizer):
    has_decoder = False


CLIP = torch.zeros(1, 3, 2, 16, 16)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"video": torch.zeros(1, 3, 2, 32, 16)},
            r"frames of 32x16 pixels came, this model was trained on 16x16: .*size=\(16, 16\)",
        ),
        ({"video": CLIP[:, :1]}, r"must be \(B, 3, T, H, W\)"),
        ({"video": CLIP[0]}, r"must be \(B, 3, T, H, W\)"),
        ({"video": CLIP.byte()}, "torch.uint8 came"),
        ({"video": CLIP + 3}, r"must lie in \[-1, 1\]"),
        ({"future": 5}, "context of 2 and future of 5 frames exceed the window of 6"),
        ({"future": 0}, "both must be 1 or more"),
        ({"decoding": "rastr"}, "'rastr' is not one of raster"),
        ({"actions": torch.zeros(1, 5).long()}, "trained without actions"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_any_work(wrong: dict, sentence: str, checkpoint: Path, monkeypatch) -> None:
    predictor = Predictor.from_pretrained(checkpoint, device="cpu")
    monkeypatch.setattr(predictor.tokenizer, "encode", lambda *_: pytest.fail("the video was encoded"))
    with pytest.raises(ValueError, match=sentence):
        predictor.predict(**{"video": CLIP, "future": 3, **wrong})


def test_a_tokenizer_without_a_decoder_predicts_no_frames(checkpoint: Path) -> None:
    own = Predictor.from_pretrained(checkpoint, device="cpu")
    blind = Predictor(own.model, Blind(Options({}, {}), 1, 8, 1000), own.card)
    with pytest.raises(ValueError, match="has no decoder"):
        blind.predict(CLIP, 3)


def test_actions_are_one_a_latent_frame() -> None:
    torch.manual_seed(0)
    tokenizer = VidTokModel(VidTokConfig(stride_t=2, width=8, encoder_blocks=1, decoder_blocks=1))
    sizes = {"codebook_size": tokenizer.codebook_size, "grid_height": 2, "grid_width": 2, "num_actions": 3}
    model = VidGPTForCausalLM(VidGPTConfig(**sizes, window=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    frame = {"stride_t": 2, "stride_s": 8, "fps": 10.0, "frame_height": 16, "frame_width": 16}
    card = Card(tokenizer.fingerprint(), **sizes, **frame, data_name="files", manifest_hash="m")
    predictor, clip = Predictor(model, tokenizer, card), torch.zeros(2, 3, 3, 16, 16)
    assert predictor.predict(clip, 3, actions=torch.zeros(2, 4).long()).shape == (2, 3, 3, 16, 16)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 6\), the frames need \(2, 4\)"):
        predictor.predict(clip, 3, actions=torch.zeros(2, 6).long())


@pytest.mark.parametrize(("first_frames", "context", "future"), [(1, 9, 12), (4, 8, 16)])
def test_a_window_is_told_in_the_frames_of_the_user(first_frames: int, context: int, future: int, checkpoint: Path) -> None:
    own = Predictor.from_pretrained(checkpoint, device="cpu")
    predictor = Predictor(own.model, own.tokenizer, replace(own.card, stride_t=4, first_frames=first_frames))
    predictor.check_window(context, future)
    with pytest.raises(
        ValueError, match=f"context of {context} and future of {future + 1} frames exceed the window of {context + future}"
    ):
        predictor.check_window(context, future + 1)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"codebook_size": 999, "codebook_factors": [999]},
            "codebook_size=999 in its card.json, but its config.json has codebook_size=1000",
        ),
        ({"grid_height": 3, "frame_height": 24}, "grid_height=3"),
        ({"grid_width": 3, "frame_width": 24}, "grid_width=3"),
        ({"stride_t": 4}, "stride_t=4 in its card.json, but .*tokenizer has stride_t=1"),
        ({"stride_s": 4, "frame_height": 8, "frame_width": 8}, "stride_s=4"),
    ],
)
def test_a_card_that_is_not_of_this_model_is_refused(changed: dict, sentence: str, checkpoint: Path) -> None:
    text, card = (checkpoint / "card.json").read_text(), Card.load(checkpoint)
    replace(card, **changed).save(checkpoint)
    try:
        with pytest.raises(ValueError, match=sentence):
            Predictor.from_pretrained(checkpoint, device="cpu")
    finally:
        (checkpoint / "card.json").write_text(text)


def test_a_model_knows_all_recorded_actions_or_none(checkpoint: Path) -> None:
    card = Card.load(checkpoint)
    sizes = {"codebook_size": 1000, "grid_height": 2, "grid_width": 2}
    check_model(card, VidGPTConfig(**sizes, num_actions=0), "here")
    check_model(card, VidGPTConfig(**sizes, num_actions=3), "here")
    with pytest.raises(ValueError, match=r"here has num_actions=3 in its card\.json, .* has num_actions=4"):
        check_model(card, VidGPTConfig(**sizes, num_actions=4), "here")


def test_a_folder_without_a_tokenizer_says_how_to_get_one(checkpoint: Path, tmp_path) -> None:
    for name in ("config.json", "model.safetensors", "card.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match="encode the tokens again with vidtok-encode, which puts the tokenizer beside them"):
        Predictor.from_pretrained(tmp_path)


def test_another_decoder_shows_the_same_tokens_and_another_encoder_is_refused(checkpoint: Path, tmp_path) -> None:
    tuned = VidTokModel.from_pretrained(checkpoint / "tokenizer")
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(0.1)
    save_model(tuned, tmp_path / "tuned")
    own, other = Predictor.from_pretrained(checkpoint), Predictor.from_pretrained(checkpoint, decoder=tmp_path / "tuned")
    video = torch.rand(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    indices = own.encode(video)
    assert torch.equal(indices, other.encode(video))
    assert not torch.equal(own.decode(indices), other.decode(indices))
    with torch.no_grad():
        tuned.encoder.conv_in.bias.add_(0.1)
    save_model(tuned, tmp_path / "other")
    with pytest.raises(ValueError, match="trained from it with train_only=decoder"):
        Predictor.from_pretrained(checkpoint, decoder=tmp_path / "other")
