"""Every experiment composes with every budget, keeps its protocol, and refuses what contradicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vidgpt.benchmark_protocol import check_protocol
from vidgpt.config import VidGPTConfig
from vidgpt.demo import main as demo
from vidgpt.options import DemoOptions
from vidtok.config import VidTokConfig
from vidtok.data import build_episodes
from vidtok.run_options import check_options
from vidtok.schema import build_options, config_dir

CONF = Path(config_dir())
GIVEN = {
    "bair": ["data.root=a", "data.validation_root=b"],
    "kth": ["data.root=a", "data.validation_root=b"],
    "kth40": ["data.root=a", "data.validation_root=b"],
    "own": ["data=digits"],
}
BENCHMARKS = ("moving_mnist", "bair", "kth", "kth40", "atari")
TINY = [
    "tokenizer.width=8", "tokenizer.decoder_blocks=1", "model.hidden_size=32", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "tokenizer_training.max_steps=4", "tokenizer_training.unquantized_steps=2",
    "gpt_training.max_steps=2", "gpt_training.evaluation_clips=2", "evaluation.clips=2", "evaluation.rollout_clips=2",
    "evaluation.resamples=20", "pixel_clips=2", "shown_clips=1",
]  # fmt: skip


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    demo.register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        values = OmegaConf.to_container(compose("vidgpt_demo", overrides=list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("budget", presets("budget"))
@pytest.mark.parametrize("experiment", presets("experiment"))
def test_every_experiment_composes_with_every_budget(experiment: str, budget: str) -> None:
    values = composed(f"experiment={experiment}", f"budget={budget}", *GIVEN.get(experiment, []))
    assert (values["experiment"], values["budget"]) == (experiment, budget)
    options = build_options(DemoOptions, values)
    check_options(options.tokenizer_training)
    check_options(options.gpt_training)
    check_protocol(values)
    stride_t, window = VidTokConfig(**values["tokenizer"]).stride_t, VidGPTConfig(**values["model"]).window
    assert options.context + options.future <= 1 + (window - 1) * stride_t
    assert values["evaluation"]["context"] == options.context
    if experiment in BENCHMARKS:
        # Exactly the frames of the protocol, against frames of the source.
        assert window == options.context + options.future and options.evaluation.pixels
        assert options.evaluation.data == options.data == options.encoding.data == options.tokenizer_training.data
        assert {"context", "future", "data", "evaluation"} <= set(options.protocol)
        text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
        assert "arXiv:" in text or "as in kth.yaml" in text
    assert options.gpt_training.use_actions == (experiment == "atari")


def test_the_longer_kth_is_the_shorter_one_but_for_its_length() -> None:
    short, long = (composed(f"experiment={name}", *GIVEN[name]) for name in ("kth", "kth40"))
    assert (long["context"], long["future"], long["model"]["window"]) == (10, 40, 50)
    for values in (short, long):
        for key in ("experiment", "future"):
            values.pop(key)
            values["protocol"].pop(key, None)
        for part in (values, values["protocol"]):
            part["model"].pop("window")
        values["gpt_training"].pop("model", None)
    assert short == long


def test_a_budget_changes_the_networks_and_nothing_of_the_protocol() -> None:
    cpu, gpu = (composed("experiment=moving_mnist", f"budget={name}") for name in ("cpu", "gpu"))
    assert cpu["model"]["hidden_size"] < gpu["model"]["hidden_size"] and cpu["tokenizer"]["width"] < gpu["tokenizer"]["width"]
    for key in ("data", "context", "future", "evaluation", "protocol"):
        assert cpu[key] == gpu[key]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["experiment=moving_mnist", "context=5"],
            "context=5 (it has 10), evaluation.context=5 (it has 10) contradicts the protocol of",
        ),
        (
            ["experiment=moving_mnist", "data.num_digits=3", "future=9"],
            "future=9 (it has 10), data.num_digits=3 (it has 2) contradicts",
        ),
        (["experiment=bair", *GIVEN["bair"], "data.size=[32,32]"], "data.size=[32, 32] (it has [64, 64]) contradicts"),
        (["experiment=atari", "gpt_training.use_actions=false"], "gpt_training.use_actions=False (it has True) contradicts"),
        (["experiment=kth", *GIVEN["kth"], "evaluation.split=train"], "experiment=kth: leave it away, or give experiment=own"),
        (["experiment=kth", *GIVEN["kth"], "future=40"], "future=40 (it has 20) contradicts the protocol of experiment=kth"),
        (
            ["experiment=kth40", *GIVEN["kth40"], "future=20"],
            "future=20 (it has 40) contradicts the protocol of experiment=kth40",
        ),
        (["experiment=kth", "data.root=a"], "experiment=kth needs data.validation_root, since its held-out videos are fixed"),
        (["experiment=bair"], "experiment=bair needs data.root and data.validation_root, since its held-out videos are fixed"),
        (["experiment=kth40"], "give data.root=PATH data.validation_root=PATH, or experiment=own"),
        (["experiment=kth", *GIVEN["kth"], "data.stretch=false"], "data.stretch=False (it has True) contradicts the protocol of"),
        (["experiment=bair", "data.root=a", "data.validation_root=null"], "give data.validation_root=PATH, or experiment=own"),
        (["experiment=moving_mist"], "experiment=moving_mist: unknown preset, did you mean moving_mnist?"),
        (["budget=huge"], "budget=huge: unknown preset"),
    ],
)
def test_what_contradicts_a_protocol_is_refused_before_any_work(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo([*arguments, f"run_dir={tmp_path / 'run'}"])
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_moving_mnist_runs_from_digits_to_the_table_on_test_clips_of_a_file(tmp_path: Path) -> None:
    ready = np.random.default_rng(0).integers(0, 256, (20, 4, 64, 64)).astype(np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", ready)
    given = ["data.episodes=3", "data.validation_episodes=2", f"data.validation_file={tmp_path / 'mnist_test_seq.npy'}"]
    demo(["experiment=moving_mnist", f"run_dir={tmp_path / 'run'}", *TINY, *given])
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    pixels = metrics["pixels"]
    assert {"model", "copy_last_frame", "linear_extrapolation", "tokenizer_ceiling"} <= set(pixels)
    assert pixels["protocol"]["future_frames_count"] == 10 and metrics["protocol"]["context_latent_frames_count"] == 10
    real = ready[:, :2] / 255
    copied = ((real[10:] - real[9]) ** 2).sum((2, 3)).mean()
    assert pixels["copy_last_frame"]["mse_sum_over_pixels_moving_mnist"] == pytest.approx(copied, rel=1e-5)


def test_held_out_sequences_come_from_their_own_file(tmp_path: Path) -> None:
    ready = np.random.default_rng(0).integers(0, 256, (20, 4, 64, 64)).astype(np.uint8)
    np.save(tmp_path / "test.npy", ready)
    keys = {"name": "digits", "episodes": 3, "validation_episodes": 2, "frames": 20}
    drawn, mixed = build_episodes(keys), build_episodes({**keys, "validation_file": str(tmp_path / "test.npy")})
    for ours, theirs in zip(drawn.split("train"), mixed.split("train"), strict=True):
        np.testing.assert_array_equal(ours.frames[0:20], theirs.frames[0:20])
    for number, episode in enumerate(mixed.split("validation")):
        np.testing.assert_array_equal(episode.frames[0:20], np.repeat(ready[:, number, :, :, None], 3, axis=-1))
    assert drawn.manifest_hash == build_episodes({**keys, "validation_file": None}).manifest_hash != mixed.manifest_hash
    ready[0, 0, 0, 0] ^= 1
    np.save(tmp_path / "other.npy", ready)
    assert build_episodes({**keys, "validation_file": str(tmp_path / "other.npy")}).manifest_hash != mixed.manifest_hash
    for wrong, sentence in {"digits.npz": "give sequences as .npy", "none.npy": "cannot be read as sequences"}.items():
        with pytest.raises(ValueError, match=sentence):
            build_episodes({**keys, "validation_file": str(tmp_path / wrong)})
    with pytest.raises(ValueError, match=r"holds 4 sequences .* asks for 5"):
        build_episodes({**keys, "validation_episodes": 5, "validation_file": str(tmp_path / "test.npy")})
