"""The bench: its rows against closed forms and hand-made figures. Nothing here is timed."""

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from einops import repeat
from torch import Tensor

from tests.vidgpt.conftest import CARD, write_tokens
from vidgpt.bench import main
from vidgpt.config import VidGPTConfig
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import BenchOptions, DiagonalKeys, SpeculativeKeys
from vidgpt.rollout import stream_tokens
from vidgpt.speed.benchmark import _Fidelity, bench_gpt
from vidgpt.speed.inputs import Clips, load_clips, load_subject
from vidgpt.speed.timing import MEBIBYTE, Runs, bytes_per_frame, mean_positions, speed_row, triad
from vidgpt.speed.transforms import cache_bytes_per_position, weight_bytes
from vidtok.card import Card
from vidtok.folders import save_model
from vidtok.tokens import TokenDataset

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
PLANS = ["transformers", "raster", "speculative", "diagonal"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgpt.speed.benchmark.ARRAY_BYTES", 1 << 12)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    return str(write_tokens(tmp_path / "tokens"))


def save_checkpoint(folder: Path, card: Card = CARD, num_actions: int = 0) -> str:
    torch.manual_seed(1)
    config = VidGPTConfig(**TINY, codebook_size=12, grid_height=3, grid_width=4, num_actions=num_actions, window=6)
    save_model(VidGPTForCausalLM(config), folder / "model")
    card.save(folder / "model")
    return str(folder)


def options_of(folder: Path, **keys: object) -> BenchOptions:
    given = {"model": TINY, "output": str(folder / "bench"), "context": 2, "future": 3, "rounds": 2}
    return BenchOptions(**{**given, **keys})


def bench(folder: Path, **keys: object) -> dict:
    return bench_gpt(options_of(folder, **keys))


@pytest.mark.parametrize(("window", "delay"), [(1, 0), (2, 0), (1, 3), (9, 0)])
def test_every_plan_has_a_row_with_the_passes_of_its_closed_form(window: int, delay: int, tmp_path: Path, tokens: str) -> None:
    result = bench(tmp_path, tokens=tokens, decoding=PLANS[::-1], diagonal=DiagonalKeys(window, delay), batch_size=2)
    rows = {row["decoding"]: row for row in result["rows"]}
    assert next(iter(rows)) == "transformers" and sorted(rows) == sorted(PLANS)
    # One pass a token, leads included, but for the first lead.
    assert rows["transformers"]["forward_passes_per_frame"] == (3 * 13 - 1) / 3
    assert rows["raster"]["forward_passes_per_frame"] == 12
    step = delay or 4 + min(window, 4) * 2
    last = 4 + min(window, 4) * 2
    assert rows["diagonal"]["forward_passes_per_frame"] == pytest.approx((2 * step + last) / 3)
    assert 1 <= rows["speculative"]["forward_passes_per_frame"] <= 12
    assert 0 <= rows["speculative"]["drafts_accepted_fraction"] <= 1
    assert [row["drafts_accepted_fraction"] for row in result["rows"] if row["decoding"] != "speculative"] == [None] * 3
    exact = [rows[name] for name in ("transformers", "raster", "speculative")]
    assert [row["ids_equal_to_raster_fraction"] for row in exact] == [1.0] * 3
    assert len({row["token_accuracy_fraction"] for row in exact}) == 1
    assert (rows["diagonal"]["ids_equal_to_raster_fraction"] == 1.0) == (window == 9)
    # Context, future and one frame in the making; generate's cache has what was read.
    position = 2 * 2 * 2 * 32 * 4
    assert rows["raster"]["cache_mebibytes"] == 6 * 13 * position / MEBIBYTE
    assert rows["transformers"]["cache_mebibytes"] == 5 * 13 * position / MEBIBYTE


def test_the_table_and_the_file_say_the_same(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path, tokens=tokens, precision="bf16", prune=0.5, cache_dtype="int8")
    assert json.loads((tmp_path / "bench" / "bench.json").read_text()) == result
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    formats = {"tokens_per_second": ".0f", "frames_per_second": ".2f", "forward_passes_per_frame": ".1f", "speed_up": ".2f"}
    for row in result["rows"]:
        for key, form in formats.items():
            assert f" {row[key]:{form}} " in lines[row["decoding"]], key
        assert f" {row['share_of_memory_bandwidth']:.0%} " in lines[row["decoding"]]
        assert f" {row['token_accuracy_fraction']:.1%}" in lines[row["decoding"]]
        assert row["tokens_per_second"] == pytest.approx(12 * row["frames_per_second"])
    assert "PSNR" not in printed.split("passes: ")[0]
    names = [row["transform"] for row in result["transforms"]]
    assert names == ["as it is", "bf16", "50% zeros", "int8 cache", "all of these"]
    for row in result["transforms"]:
        assert f" {row['cross_entropy_nats_per_token']:.4f} " in lines[row["transform"]]
        change = row["cross_entropy_nats_per_token"] - result["transforms"][0]["cross_entropy_nats_per_token"]
        assert row["cross_entropy_change_nats_per_token"] == change
        assert (change == 0) == (row["transform"] == "as it is")
    halves = [row["weights_read_mebibytes"] for row in result["transforms"][:2]]
    assert halves[1] < 0.55 * halves[0]
    assert result["rows"][0]["speed_up"] == result["rows"][0]["decode_speed_up"] == 1.0
    assert "fresh weights know no video" in printed and "generate runs as the library has it" in printed
    assert "zeros are read and multiplied" in printed and "copies of the last given frame" in printed


def test_without_transforms_there_is_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path, decoding=["raster"], rounds=1)
    assert result["transforms"] == [] and len(result["rows"]) == 1
    printed = capsys.readouterr().out
    assert "nats" not in printed and "from noise" in printed and "noise is no video" in printed
    assert result["rows"][0]["token_accuracy_fraction"] is None and "right " not in printed.split("passes: ")[0]


def test_what_is_right_is_counted_on_the_windows_of_each_round(tmp_path: Path, tokens: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "gpt")
    keys = {"model": None, "checkpoint": checkpoint, "tokens": tokens, "rounds": 3, "batch_size": 2}
    result = bench(tmp_path, **keys, decoding=["raster"])
    windows = TokenDataset(tokens, "validation", 5)
    assert len(windows) == 6
    clips = torch.stack([windows[number]["indices"] for number in range(6)])
    model = load_subject(options_of(tmp_path, **keys)).model
    drawn = torch.stack(list(stream_tokens(model, clips[:, :2], 3)), dim=1)
    assert result["rows"][0]["token_accuracy_fraction"] == pytest.approx(float((drawn == clips[:, 2:]).double().mean()))
    copied = float((clips[:, 1:2] == clips[:, 2:]).double().mean())
    assert result["copy_of_last_frame_accuracy_fraction"] == pytest.approx(copied) and copied > 0.5
    assert result["weights"] == f"of {checkpoint}" and result["clips"] == f"held-out clips of {tokens}"


def test_a_run_folder_knows_the_tokens_that_it_was_trained_on(tmp_path: Path, tokens: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "gpt")
    options = options_of(tmp_path, model=None, checkpoint=checkpoint)
    assert load_subject(options).tokens is None
    (tmp_path / "gpt" / "config.yaml").write_text(f"seed: 0\ntokens: {tokens}\n")
    subject = load_subject(options)
    assert subject.tokens == tokens and load_clips(subject, options).is_real
    (tmp_path / "gpt" / "config.yaml").write_text(f"tokens: {tmp_path / 'gone'}\n")
    clips = load_clips(load_subject(options), options)
    assert not clips.is_real and clips.indices.shape == (2, 1, 5, 3, 4)


@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_model_of_actions_gets_them(with_tokens: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = replace(CARD, num_actions=3)
    checkpoint = save_checkpoint(tmp_path / "gpt", card, num_actions=3)
    tokens = str(write_tokens(tmp_path / "tokens", card)) if with_tokens else None
    rows = bench(tmp_path, model=None, checkpoint=checkpoint, tokens=tokens, rounds=1)["rows"]
    assert "this model was not trained for decoding=diagonal" in capsys.readouterr().out
    assert [row["ids_equal_to_raster_fraction"] for row in rows[:3]] == [1.0] * 3


def test_the_bytes_of_a_frame_are_those_of_a_hand_made_example() -> None:
    # 4 passes, each over 1000 bytes of weights and 7 positions of 10 bytes.
    assert bytes_per_frame(4, 1000, 10, 7) == 4280
    a, read = torch.zeros(4), triad(16, CPU)()
    assert isinstance(read, Tensor) and read.tolist() == [4.0] * 4 and read.shape == a.shape


@pytest.mark.parametrize(("context", "future"), [(2, 3), (1, 1), (4, 16)])
def test_the_mean_of_positions_is_that_of_all_passes(context: int, future: int) -> None:
    config = VidGPTConfig(**TINY, grid_height=3, grid_width=4, window=24)
    layout = TokenLayout.from_config(config)
    # The query that draws the token at position p reads positions 0 .. p - 1.
    positions = torch.arange((context + future) * layout.tokens_per_frame)
    drawn = positions[(positions >= context * layout.tokens_per_frame) & ~layout.is_lead(positions)]
    assert mean_positions(config, context, future) == float(drawn.double().mean())
    windowed = VidGPTConfig(**TINY, grid_height=3, grid_width=4, window=24, attention_frames=2, sink_frames=1)
    assert mean_positions(windowed, context, future) == min(3 * 13, float(drawn.double().mean()))


def test_a_row_is_its_runs_by_hand() -> None:
    config = VidGPTConfig(**TINY, codebook_size=12, grid_height=3, grid_width=4, window=5)
    model = FusedModel(VidGPTForCausalLM(config).eval())

    def runs(seconds: list[float], prefill: float, passes: int) -> Runs:
        ids = torch.zeros(2, 3, 3, 4, dtype=torch.long)
        works = [
            Work(frames=3, forward_passes=passes + 1, prefills=1, drafted=40, accepted=10, cache_bytes=MEBIBYTE) for _ in seconds
        ]
        return Runs(model, DecodingOptions(), seconds, [prefill] * len(seconds), [ids] * len(seconds), works)

    # The machine is twice as slow in the second round, and has a hiccup in the third.
    row = speed_row(runs([1.5, 2.5, 9.5], 0.5, 12), runs([6.5, 12.5, 6.5], 0.5, 36), context=2, bandwidth=1e6)
    assert row["tokens_per_second"] == pytest.approx(2 * 3 * 12 / 2.5) and row["frames_per_second"] == pytest.approx(2 * 3 / 2.5)
    assert row["forward_passes_per_frame"] == 4 and row["drafts_accepted_fraction"] == 0.25
    assert row["prefill_milliseconds"] == 500 and row["decode_milliseconds_per_frame"] == pytest.approx(2000 / 3)
    assert row["speed_up"] == pytest.approx(median([6.5 / 1.5, 12.5 / 2.5, 6.5 / 9.5]))
    assert row["decode_speed_up"] == pytest.approx(median([6 / 1, 12 / 2, 6 / 9]))
    assert row["cache_mebibytes"] == 1
    needed = 4 * (weight_bytes(model) + 2 * cache_bytes_per_position(model) * 3.5 * 13)
    assert row["share_of_memory_bandwidth"] == pytest.approx(needed / (2 / 3) / 1e6)


def test_psnr_is_that_of_the_pooled_error_of_what_is_shown(tmp_path: Path) -> None:
    real = torch.arange(2 * 3 * 1 * 2).view(1, 2, 3, 1, 2)  # (rounds, B, t, h, w)
    context = torch.full((1, 2, 1, 1, 2), 7)
    given: list[Tensor] = []

    def show(before: Tensor, indices: Tensor, future: int) -> Tensor:
        given.append(before)
        assert future == 3 * 2
        return repeat(indices / 100, "b t h w -> b 3 (t s) h w", s=2)

    predictor = SimpleNamespace(show=show, card=SimpleNamespace(stride_t=2), device=CPU)
    clips = Clips(torch.cat([context, real], dim=2), None, "", is_real=True)
    options = options_of(tmp_path, context=1)
    drawn = real.clone()
    drawn[0, 1, 2, 0, 0] += 10
    fidelity = _Fidelity({"raster": SimpleNamespace(ids=list(real))}, clips, predictor, options)
    row = fidelity.row(SimpleNamespace(ids=list(drawn)))
    assert row["psnr_db"] == pytest.approx(10 * math.log10(4 / (0.1**2 / 12)))
    assert row["ids_equal_to_raster_fraction"] == row["token_accuracy_fraction"] == pytest.approx(11 / 12)
    assert all((before == 7).all() for before in given)
    assert fidelity.row(SimpleNamespace(ids=list(real)))["psnr_db"] is None
    assert _Fidelity({}, clips, None, options).row(SimpleNamespace(ids=list(drawn)))["ids_equal_to_raster_fraction"] is None


def test_digits_predicted_at_once_leave_generate_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {**TINY, "factors": [10, 100], "digits": "parallel"}
    result = bench(tmp_path, model=model, rounds=1, future=1)
    assert [row["decoding"] for row in result["rows"]] == PLANS[1:]
    assert "generate is left out" in capsys.readouterr().out


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    result = bench(tmp_path, threads=before + 1, rounds=1, decoding=["raster"], future=1)
    assert result["device"] == f"CPU, {before + 1} threads" and torch.get_num_threads() == before


def test_only_a_bench_is_written_over(tmp_path: Path, tokens: str) -> None:
    keys = {"decoding": ["raster"], "rounds": 1, "future": 1}
    bench(tmp_path, **keys)
    assert bench(tmp_path, **keys)["files"] == ["bench.json"]
    (tmp_path / "bench" / "bench.json").write_text("mine")
    with pytest.raises(ValueError, match=r"bench\.json is there already, and no bench of this folder wrote it"):
        bench(tmp_path, **keys)
    with pytest.raises(ValueError, match=r"tokens=.* lies where output="):
        bench(tmp_path, **keys, tokens=tokens, output=tokens)


def test_a_failing_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_: object) -> None:
        raise TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr("torch.compile", lambda _: fail)
    with pytest.raises(ValueError, match=r"cannot compile the transformer \(no compiler\): leave compile out"):
        bench(tmp_path, compile=True)


@pytest.mark.slow
def test_a_compiled_transformer_gives_the_same_ids(tmp_path: Path) -> None:
    rows = bench(tmp_path, compile=True, rounds=1)["rows"]
    assert [row["ids_equal_to_raster_fraction"] for row in rows[:3]] == [1.0] * 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "neither of checkpoint and model is given: give checkpoint=DIR or model=small"),
        ({"checkpoint": "a"}, "both of checkpoint and model is given"),
        ({"decoding": []}, r"decoding=\[\] must name each plan once"),
        ({"decoding": ["raster", "raster"]}, "must name each plan once"),
        ({"precision": "fp8"}, "precision=fp8 is not known: give fp32 or bf16"),
        ({"prune": 1.0}, r"prune=1\.0 is not allowed"),
        ({"cache_dtype": "int4"}, "cache_dtype=int4 is not known: give int8"),
        ({"rounds": 0}, "rounds=0 is not allowed"),
        ({"threads": 0}, "threads=0 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(keys: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        options_of(tmp_path, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoding": ["rastr"]}, "decoding='rastr' is not one of raster, speculative"),
        ({"diagonal": DiagonalKeys(window=0)}, "window=0"),
        ({"speculative": SpeculativeKeys(draft="mine")}, "draft='mine' is not one of .*own, previous"),
        (
            {"future": 6, "context": 3},
            "context=3 and future=6 make clips of 9 latent frames, the longest held-out one of .* has 7",
        ),
        (
            {"model": {**TINY, "window": 4}},
            "^context=2 and future=3 exceed the window of 4 latent frames: give fewer, together 4 or less, or a larger model.window$",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_any_work(
    keys: dict, message: str, tmp_path: Path, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgpt.speed.benchmark._measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        bench(tmp_path, tokens=tokens, **keys)
    assert not (tmp_path / "bench").exists()


def test_a_refusal_advises_keys_that_the_command_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_checkpoint(tmp_path / "gpt")
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", f"output={tmp_path}/b", "context=2", "future=5"])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "exceed the window of 6 latent frames: give fewer, together 6 or less" in printed
    known = {option.name for option in fields(BenchOptions)}
    assert (
        set(re.findall(r"\b([a-z_]+)(?:\.[a-z_]+)*=", printed)) <= known
        and "long" not in printed
        and "model.window" not in printed
    )


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "gpt")
    tokens = str(write_tokens(tmp_path / "tokens", replace(CARD, tokenizer_fingerprint="ffff0000")))
    with pytest.raises(ValueError, match="both must come from one tokenizer"):
        bench(tmp_path, model=None, checkpoint=checkpoint, tokens=tokens)


def test_the_command_takes_presets_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"model.{key}={value}" for key, value in TINY.items() if key != "initializer_range"]
    common = ["model=tiny", *sizes, "context=1", "future=1", "rounds=1", f"output={tmp_path}/b"]
    main([*common, "decoding=[speculative,diagonal]", "speculative.draft=previous", "diagonal.window=2"])
    rows = json.loads((tmp_path / "b" / "bench.json").read_text())["rows"]
    assert [row["decoding"] for row in rows] == ["speculative", "diagonal"]
    with pytest.raises(SystemExit) as stop:
        main([*common, "decoding=[diagonals]"])
    assert stop.value.code == 2 and "decoding='diagonals' is not one of" in capsys.readouterr().err
