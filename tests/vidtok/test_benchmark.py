import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from vidtok import measuring
from vidtok.benchmark import Variant, bench_tokenizer, variants
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.measuring import convolution_flops, convolutions, count_flops, measure, peak_bytes, speed_up, spread
from vidtok.model import VidTokModel
from vidtok.options import BenchTokenizerOptions

CPU = torch.device("cpu")
SMALL = {"stride_t": 1, "stride_s": 8, "patch_s": 8, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SIDE", 8)
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 0.001)


def bench(folder: Path, **keys: object) -> dict:
    given = {"tokenizer": SMALL, "output": str(folder), "frames": 2, "size": [16, 24], "repeats": 2, **keys}
    return bench_tokenizer(BenchTokenizerOptions(**given))


@pytest.mark.parametrize(("bias", "stride"), [(True, 1), (False, 2)])
def test_the_count_is_that_of_the_textbook(bias: bool, stride: int) -> None:
    layer = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias)
    side = 8 // stride
    assert count_flops(lambda: layer(torch.zeros(2, 5, 8, 8))) == 2 * 2 * 7 * side * side * 5 * 9
    assert count_flops(lambda: torch.zeros(3, 4) @ torch.zeros(4, 5)) == 2 * 3 * 4 * 5
    assert count_flops(lambda: torch.zeros(3) + 1) == 0


def test_the_machines_convolution_is_counted_alike() -> None:
    calls = convolutions(torch.float32, CPU)
    results = [call() for call in calls.values()]
    assert {count_flops(call) for call in calls.values()} == {convolution_flops(CPU)}
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_the_peak_counts_what_lives_at_one_time() -> None:
    kilobyte = torch.zeros(256)
    assert peak_bytes(lambda: kilobyte + 1) == 1024
    assert peak_bytes(lambda: (kilobyte + 1).sin().cos()) == 2048
    assert peak_bytes(lambda: kilobyte.sin() + kilobyte.cos()) == 3072
    assert peak_bytes(lambda: kilobyte.add_(1), [kilobyte]) == 0
    assert peak_bytes(lambda: kilobyte[:5].view(5, 1), [kilobyte]) == 0


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine is twice as slow in the second round, and has a hiccup in the third.
    assert speed_up([2.0, 4.0, 2.0], [1.0, 2.0, 9.0]) == 2.0
    assert speed_up([1.0, 2.0], [1.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="argument 2"):
        speed_up([1.0], [1.0, 2.0])


def test_the_spread_is_relative_and_takes_a_single_round() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([7.0]) == 0.0


def test_every_call_has_its_turn_in_every_round() -> None:
    turns: list[str] = []
    taken = measure({name: lambda name=name: turns.append(name) for name in "ab"}, 3, CPU)
    assert [len(taken[name]) for name in "ab"] == [3, 3]
    assert all(second > 0 for seconds in taken.values() for second in seconds)
    changes = [turn for turn, before in zip(turns, ["", *turns], strict=False) if turn != before]
    assert "".join(changes) == "abababab"  # warming up, then three rounds


def test_each_compared_key_changes_alone() -> None:
    options = BenchTokenizerOptions(tokenizer=SMALL, precision="bf16", compare=["compile", "precision", "compile"])
    base = Variant("bf16", channels_last=False, compile=False)
    assert variants(options) == [base, Variant("bf16", False, True), Variant("fp32", False, False)]
    assert len({variant.name for variant in variants(options)}) == 3
    assert variants(BenchTokenizerOptions(tokenizer=SMALL, compare=[])) == [Variant("fp32", False, False)]


def test_the_table_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert [row["variant"] for row in result["rows"]] == ["fp32 NCHW", "bf16 NCHW", "fp32 NHWC"]
    assert set(result["convolution_flops_per_second"]) == {"fp32", "bf16"}
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert f"{row['variant']} " in printed
        for part in ("encode", "decode"):
            assert f"{row[f'{part}_frames_per_second']:.1f}" in printed
            assert all(math.isfinite(row[f"{part}_{name}"]) for name in ("speed_up", "share_of_convolution_rate"))
    assert result["rows"][0]["encode_speed_up"] == result["rows"][0]["decode_speed_up"] == 1.0


def test_only_a_bench_is_written_over(tmp_path: Path) -> None:
    bench(tmp_path, compare=[], repeats=1)
    again = bench(tmp_path, compare=[], repeats=1)
    assert again["files"] == ["bench.json"] and json.loads((tmp_path / "bench.json").read_text()) == again
    (tmp_path / "bench.json").write_text("mine")
    with pytest.raises(ValueError, match=r"bench\.json is there already, and no bench of this folder wrote it"):
        bench(tmp_path)


def test_what_needs_no_clock_is_exact(tmp_path: Path) -> None:
    result = bench(tmp_path, compare=[])
    model = VidTokModel(VidTokConfig(**SMALL))
    assert result["parameters"]["encoder"] == sum(weight.numel() for weight in model.encoder.parameters())
    assert sum(result["parameters"].values()) == model.num_parameters()
    convolutions_of = {name: [layer for layer in part.modules() if isinstance(layer, nn.Conv2d)]
                       for name, part in (("encode", model.encoder), ("decode", model.decoder))}  # fmt: skip
    for part, layers in convolutions_of.items():
        # patch_s = stride_s: every convolution runs on the token grid, 2 x 3 places a frame.
        assert result[f"{part}_flops_per_frame"] == sum(2 * 6 * layer.weight.numel() for layer in layers)


@pytest.mark.parametrize(
    ("quantizer", "weights"),
    [
        ({"quantizer": "fsq"}, "random"),
        ({"quantizer": "kl"}, "random"),
        ({"quantizer": "vq", "codebook_size": 512}, "random, codebook of noise"),
        # More codes than there are latents to make them of.
        ({"quantizer": "vq", "codebook_size": 4096}, "random, codebook of noise"),
        ({"quantizer": "vq", "codebook_size": 64, "num_codebooks": 2}, "random, codebook of noise"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride_t", [1, 4])
def test_every_kind_of_tokenizer_runs_untrained_and_says_so(
    quantizer: dict, weights: str, stride_t: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**SMALL, **quantizer, "stride_t": stride_t}
    result = bench(tmp_path, tokenizer=given, compare=[], precision="bf16", frames=1 + stride_t, repeats=1)
    (row,) = result["rows"]
    assert row["precision"] == "bf16" and row["encode_frames_per_second"] > 0
    assert result["weights"] == weights and f"weights: {weights};" in capsys.readouterr().out


def test_a_trained_tokenizer_is_measured_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(VidTokModel(VidTokConfig(**SMALL)), tmp_path / "tok")
    before = (tmp_path / "tok" / "model.safetensors").read_bytes()
    result = bench(tmp_path, tokenizer=None, checkpoint=str(tmp_path / "tok"), compare=["channels_last"])
    assert [row["channels_last"] for row in result["rows"]] == [False, True]
    assert result["weights"] == "trained" and "weights: trained;" in capsys.readouterr().out
    assert (tmp_path / "tok" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_compiled_tokenizer_has_a_row(tmp_path: Path) -> None:
    rows = bench(tmp_path, compare=["compile"], repeats=1)["rows"]
    assert [row["compile"] for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "neither of checkpoint and tokenizer"),
        ({"checkpoint": "a", "tokenizer": SMALL}, "both of checkpoint and tokenizer"),
        ({"tokenizer": SMALL, "size": [64]}, r"size=\[64\] is not \[height, width\]"),
        ({"tokenizer": SMALL, "precision": "fp8"}, "precision=fp8 is not known: give fp32 or bf16"),
        ({"tokenizer": SMALL, "compare": ["width"]}, "names width: it can name precision, channels_last and compile"),
        ({"tokenizer": SMALL, "repeats": 0}, "repeats=0 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchTokenizerOptions(**keys)


def test_a_failing_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_: object) -> None:
        raise TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr("vidtok.benchmark.measure", fail)
    with pytest.raises(ValueError, match=r"cannot compile the tokenizer \(no compiler\): leave compile out"):
        bench(tmp_path, compare=[])
