"""The commands in turn, on tiny models, as a user types them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vidgpt import checkpoint_evaluation
from vidgpt.evaluate import main as evaluate
from vidgpt.options import EvaluateOptions
from vidgpt.predict import main as predict
from vidgpt.rollout import Predictor
from vidgpt.train import main as train_gpt
from vidtok.encode import main as encode
from vidtok.reconstruct import main as reconstruct
from vidtok.train import main as train_tokenizer
from vidtok.video import probe, read_video, write_video

TOKENIZER = [
    "tokenizer.width=8",
    "tokenizer.encoder_blocks=1",
    "tokenizer.decoder_blocks=1",
    "clip_frames=5",
    "unquantized_steps=2",
]
RUN = ["max_steps=6", "batch_size=2", "warmup_steps=2", "checkpoint_every=3", "evaluate_every=3", "evaluation_clips=4"]
RESIDUAL = ["tokenizer.num_codebooks=2", "tokenizer.codebook_size=16"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.window=12"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder of two films, a tokenizer, tokens and a transformer, all made by the commands."""
    folder = tmp_path_factory.mktemp("my work=1")
    films = folder / "films, (a)"
    films.mkdir()
    for number, (height, width) in enumerate([(33, 47), (40, 32)]):
        frames = np.zeros((40, height, width, 3), np.uint8)
        for t in range(40):
            frames[t, 10:20, (t + 5 * number) % (width - 8) : (t + 5 * number) % (width - 8) + 8] = (200, 60 * number, 90)
        write_video(films / f"film {number}=x.mp4", frames, 10.0)
    (films / "broken.mp4").write_bytes(b"not a video")
    data = films_of(folder)
    train_tokenizer([*data, *TOKENIZER, *RUN, f"run_dir={folder / 'tok'}"])
    encode([*data, f"checkpoint={folder / 'tok'}", f"output={folder / 'tokens'}"])
    train_gpt([f"tokens={folder / 'tokens'}", f"run_dir={folder / 'gpt'}", *MODEL, *RUN])
    return folder


def films_of(work: Path) -> list[str]:
    root, cache = work / "films, (a)", work / "cache"
    return ["data=files", f"data.root={root}", "data.size=[32,32]", f"data.cache_dir={cache}", "data.validation=0.4"]


def run(main: Callable[[list[str]], None], capsys, *arguments: str) -> tuple[int, str]:
    """Give exit status and stderr of a command."""
    try:
        main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_a_bad_film_is_a_reject_not_an_end(work: Path) -> None:
    assert (work / "tokens" / "rejects.csv").read_text().splitlines()[1].startswith("broken.mp4,")
    assert json.loads((work / "tokens" / "card.json").read_text())["complete"] is True


def test_the_model_folder_is_self_contained_json_and_safetensors(work: Path) -> None:
    files = {
        path.relative_to(work / "gpt" / "model").as_posix() for path in (work / "gpt" / "model").rglob("*") if path.is_file()
    }
    assert {"config.json", "model.safetensors", "generation_config.json", "card.json", "tokenizer/config.json"} <= files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


def test_predict_writes_what_it_promises(work: Path, tmp_path, capsys) -> None:
    film = work / "films, (a)" / "film 0=x.mp4"
    arguments = [
        f"checkpoint={work / 'gpt'}",
        f"input={film}",
        f"output={tmp_path / 'out=1'}",
        "context=4",
        "future=6",
        "samples=2",
    ]
    assert run(predict, capsys, *arguments)[0] == 0
    out = tmp_path / "out=1"
    assert probe(out / "prediction.mp4").frames == 10
    assert len(list((out / "frames").glob("*.png"))) == 6
    tokens = load_file(out / "tokens.safetensors")
    assert tokens["future"].shape == (2, 6, 4, 4)
    record = json.loads((out / "prediction.json").read_text())
    assert record["context_frames_used"] == 4 and record["seed"] == 0
    assert (out / "strip.png").stat().st_size > 0
    run(predict, capsys, *arguments[:2], f"output={tmp_path / 'again'}", *arguments[3:])
    assert torch.equal(load_file(tmp_path / "again" / "tokens.safetensors")["future"], tokens["future"])


def test_three_lines_of_python_predict(work: Path) -> None:
    film = work / "films, (a)" / "film 1=x.mp4"
    predictor = Predictor.from_pretrained(work / "gpt")
    video = predictor.predict(read_video(film, frames=4, size=(32, 32)), future=5)
    assert video.shape == (1, 3, 5, 32, 32)
    assert -1 <= float(video.min()) <= float(video.max()) <= 1


def test_evaluate_writes_figures_tables_and_curves(work: Path, tmp_path, capsys) -> None:
    arguments = [
        f"checkpoint={work / 'gpt'}",
        f"tokens={work / 'tokens'}",
        f"output={tmp_path}",
        "clips=4",
        "rollout_clips=2",
        "context=4",
    ]
    assert run(evaluate, capsys, *arguments) == (0, "")
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert set(figures["teacher_forced"]) == {"model", "uniform", "unigram", "unigram_by_position", "copy_last_frame_smoothed"}
    assert figures["free_running"]["context_frames_count"] == 4
    assert {"by_frame.csv", "by_position.csv", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert list(tmp_path.glob("*.png"))


def test_an_output_that_is_a_file_is_refused_before_the_work(work: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_evaluation, "_measure", lambda *_: pytest.fail("the model was evaluated"))
    (tmp_path / "taken").write_text("mine")
    arguments = [f"checkpoint={work / 'gpt'}", f"tokens={work / 'tokens'}", f"output={tmp_path / 'taken'}"]
    status, error = run(evaluate, capsys, *arguments)
    assert (
        status == 2 and "cannot be a folder, because" in error and error.endswith("taken is a file: give another output folder\n")
    )


def test_a_report_that_no_evaluation_wrote_is_not_written_over(tmp_path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html is there already, and no evaluation of this folder wrote it"):
        checkpoint_evaluation.evaluate_checkpoint(EvaluateOptions("no checkpoint", "no tokens", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_reconstruct_writes_a_film_beside_its_figures(work: Path, tmp_path, capsys) -> None:
    film = work / "films, (a)" / "film 0=x.mp4"
    assert run(reconstruct, capsys, f"checkpoint={work / 'tok'}", f"input={film}", f"output={tmp_path}")[0] == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["frames"] == 40
    assert probe(tmp_path / "side_by_side.mp4").width == 2 * probe(tmp_path / "reconstruction.mp4").width


@pytest.mark.parametrize(
    ("tokenizer", "digits"),
    [([], "slots"), (RESIDUAL, "slots"), (RESIDUAL, "parallel")],
    ids=["one codebook", "residual in slots", "residual in parallel"],
)
def test_tokens_that_stand_for_two_frames_go_the_whole_way(tokenizer, digits, work: Path, tmp_path, capsys) -> None:
    data, places = films_of(work), {name: tmp_path / name for name in ("tok", "tokens", "gpt", "tuned", "out", "own", "sharp")}
    train_tokenizer([*data, *TOKENIZER, *RUN, "tokenizer.stride_t=2", *tokenizer, f"run_dir={places['tok']}"])
    encode([*data, f"checkpoint={places['tok']}", f"output={places['tokens']}"])
    train_gpt(
        [f"tokens={places['tokens']}", f"run_dir={places['gpt']}", *MODEL, *RUN, "model.window=6", f"model.digits={digits}"]
    )
    evaluate([f"checkpoint={places['gpt']}", f"tokens={places['tokens']}", f"output={places['out']}", "context=2", "clips=4"])
    card = json.loads((places["gpt"] / "model" / "card.json").read_text())
    figures = json.loads((places["out"] / "metrics.json").read_text())["teacher_forced"]["model"]
    assert figures["cross_entropy_nats_per_token"] < 2 * np.log(card["codebook_size"])
    assert (card["stride_t"], len(card["codebook_factors"])) == (2, 2 if tokenizer else 1)

    train_tokenizer(
        [*data, *RUN, f"init_from={places['tok']}", "train_only=decoder", f"run_dir={places['tuned']}", "clip_frames=5"]
    )
    film = work / "films, (a)" / "film 0=x.mp4"
    arguments = [f"checkpoint={places['gpt']}", f"input={film}", "context=3", "future=5", "samples=2"]
    assert run(predict, capsys, *arguments, f"output={places['own']}") == (0, "")
    assert run(predict, capsys, *arguments, f"output={places['sharp']}", f"decoder={places['tuned']}") == (0, "")
    own, sharp = (load_file(places[name] / "tokens.safetensors")["future"] for name in ("own", "sharp"))
    assert own.shape == (2, 3, 4, 4) and int(own.max()) < card["codebook_size"]
    assert torch.equal(own, sharp)
    pictures = [sorted((places[name] / "frames").glob("*.png")) for name in ("own", "sharp")]
    assert [len(names) for names in pictures] == [5, 5]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*pictures, strict=True))
    assert probe(places["own"] / "prediction_01.mp4").frames == 3 + 5


def test_encoding_again_changes_nothing(work: Path, tmp_path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in (work / "tokens").glob("*.parquet")}
    assert run(encode, capsys, *films_of(work), f"checkpoint={work / 'tok'}", f"output={work / 'tokens'}")[0] == 0
    assert before == {path.name: path.read_bytes() for path in (work / "tokens").glob("*.parquet")}


def test_tokens_of_another_tokenizer_are_refused(work: Path, tmp_path, capsys) -> None:
    other = shutil.copytree(work / "tokens", tmp_path / "tokens")
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps({**card, "encoder_fingerprint": "0123456789abcdef"}))
    status, error = run(evaluate, capsys, f"checkpoint={work / 'gpt'}", f"tokens={other}", f"output={tmp_path / 'out'}")
    assert status == 2
    assert "0123456789abcdef" in error and card["encoder_fingerprint"] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["input=/no/such film.mp4"], "/no/such film.mp4 does not exist"),
        (["context=10", "future=16"], "exceed the window of 12 frames"),
        (["checkpoint={tok}"], "not 'vidgpt'"),
        (["checkpoint=/tmp"], "not a trained folder"),
        (["contxt=3"], "did you mean context"),
        (["context=many"], "context=many: expected an integer"),
        (["sampling.top_p=7"], "top_p"),
        (["decoding=rastr"], "rastr"),
        (["input={broken}"], "broken.mp4"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_status_2(overrides, sentence, work: Path, tmp_path, capsys) -> None:
    film = work / "films, (a)" / "film 0=x.mp4"
    places = {"tok": work / "tok", "broken": work / "films, (a)" / "broken.mp4"}
    base = {"checkpoint": str(work / "gpt"), "input": str(film), "output": str(tmp_path / "out"), "context": "4", "future": "4"}
    base |= dict(override.format(**places).split("=", 1) for override in overrides)
    status, error = run(predict, capsys, *(f"{key}={value}" for key, value in base.items()))
    assert status == 2
    assert sentence in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_held_out_clips_shorter_than_the_window_are_used_at_their_length(work: Path, tmp_path, capsys) -> None:
    model = [option for option in MODEL if "window" not in option]
    assert (
        run(train_gpt, capsys, f"tokens={work / 'tokens'}", f"run_dir={tmp_path / 'gpt'}", *model, *RUN, "model.window=20")[0]
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "gpt" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines)
    arguments = [f"checkpoint={tmp_path / 'gpt'}", f"tokens={work / 'tokens'}", f"output={tmp_path / 'out'}"]
    status, error = run(evaluate, capsys, *arguments, "context=18")
    assert status == 2 and "window is 20 frames, the longest clip of split 'validation' has 16" in error


def test_the_window_fits_the_clips_by_itself_and_one_that_does_not_is_refused_by_name(work: Path, tmp_path, capsys) -> None:
    status, error = run(
        train_gpt, capsys, f"tokens={work / 'tokens'}", f"run_dir={tmp_path / 'a'}", *MODEL, *RUN, "model.window=30"
    )
    assert status == 2 and "use model.window=24 or less" in error
    data = ["data=digits", "data.episodes=4", "data.validation_episodes=2", "data.frames=7", "data.size=32"]
    assert run(encode, capsys, *data, f"checkpoint={work / 'tok'}", f"output={tmp_path / 'digits'}")[0] == 0
    model = [option for option in MODEL if "window" not in option]
    assert run(train_gpt, capsys, f"tokens={tmp_path / 'digits'}", f"run_dir={tmp_path / 'b'}", *model, *RUN)[0] == 0
    assert json.loads((tmp_path / "b" / "model" / "config.json").read_text())["window"] == 7


@pytest.mark.parametrize("override", ["evaluation_clips=0", "model.attention_dropout=7", "model.num_hidden_layers=-2"])
def test_an_impossible_value_is_one_sentence(override: str, work: Path, tmp_path, capsys) -> None:
    status, error = run(train_gpt, capsys, f"tokens={work / 'tokens'}", f"run_dir={tmp_path / 'run'}", *MODEL, *RUN, override)
    assert status == 2 and override.partition("=")[0].removeprefix("model.") in error and error.count("\n") == 1


def test_an_empty_folder_is_one_sentence(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    status, error = run(
        train_tokenizer, capsys, "data=files", f"data.root={tmp_path / 'empty'}", f"run_dir={tmp_path / 'run'}", "max_steps=1"
    )
    assert status == 2
    assert str(tmp_path / "empty") in error and ".mp4" in error and error.count("\n") == 1
