import json
from pathlib import Path

import pytest

from vidgpt.demo import main as demo
from vidtok.video import probe

pytest.importorskip("ale_py")

TINY = [
    "data.episodes=2", "data.validation_episodes=1", "data.max_frames=40", "data.validation_start=0", "data.size=[32,32]",
    "tokenizer.width=8", "tokenizer.decoder_blocks=1", "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.window=8", "context=3", "future=5", "pixel_clips=3", "shown_clips=2", "evaluation.clips=4", "evaluation.rollout_clips=2",
    "tokenizer_training.max_steps=4", "tokenizer_training.unquantized_steps=2", "gpt_training.max_steps=4",
]  # fmt: skip


def test_the_demo_writes_its_report_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, f"run_dir={tmp_path / 'demo'}", f"data.cache_dir={tmp_path / 'cache'}"]
    demo(arguments)
    printed = capsys.readouterr().out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "gain over copy-last-frame, mean of horizons 4 to 5" in printed and "report.html in a browser" in printed
    assert page.count("<img") >= 2 * 4 + 7 and "http:" not in page and "https:" not in page
    curves = json.loads((tmp_path / "demo" / "pixels.json").read_text())["psnr_db_mean_by_horizon"]
    assert (
        set(curves) == {"prediction", "copy_last_frame", "linear_extrapolation", "tokenizer_ceiling"}
        and len(curves["prediction"]) == 5
    )
    assert (tmp_path / "demo" / "prediction.png").stat().st_size > 0 and probe(tmp_path / "demo" / "held_out.mp4").frames == 8
    weights = tmp_path / "demo" / "gpt" / "model" / "model.safetensors"
    before = weights.read_bytes()
    demo(arguments)
    assert weights.read_bytes() == before
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["tokenizer.stride_t=4"], "context=3 ends inside a latent frame of tokenizer.stride_t=4: use 1 or 5"),
        (["future=6"], "context=3 and future=6 exceed the 8 frames of model.window=8"),
        (["data.max_frames=7"], "no held-out episode has the 8 frames of context=3 and future=5"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(overrides: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        demo([*TINY, f"run_dir={tmp_path / 'demo'}", f"data.cache_dir={tmp_path / 'cache'}", *overrides])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "demo" / "tokenizer").exists()
