from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vidgpt.bench import main as bench_gpt
from vidgpt.compare import main as compare
from vidgpt.config import VidGPTConfig
from vidgpt.demo import main as demo
from vidgpt.evaluate import main as evaluate
from vidgpt.export import main as export
from vidgpt.model import VidGPTForCausalLM
from vidgpt.predict import main as predict
from vidgpt.schema import register_schemas as register_model_schemas
from vidgpt.train import main as train_gpt
from vidgpt.verify import main as verify
from vidgpt.world import main as world
from vidtok.bench import main as bench_tokenizer
from vidtok.config import QUANTIZERS, VidTokConfig
from vidtok.encode import main as encode
from vidtok.evaluate import main as evaluate_tokenizer
from vidtok.model import VidTokModel
from vidtok.reconstruct import main as reconstruct
from vidtok.schema import config_dir, register_schemas
from vidtok.tokenizer import FAMILIES, SCRIPTS
from vidtok.train import main as train_tokenizer

CONF = Path(config_dir())
ENTRIES = (
    *(train_tokenizer, bench_tokenizer, encode, evaluate_tokenizer, reconstruct),
    *(train_gpt, predict, evaluate, export, bench_gpt, verify, demo, compare, world),
)


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(command: str, *overrides: str) -> dict:
    register_schemas()
    register_model_schemas()
    for entry in ENTRIES:
        entry.register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        values = OmegaConf.to_container(compose(command, overrides=list(overrides)), resolve=False)
    assert isinstance(values, dict)
    return values


def test_every_command_has_its_configuration() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == sorted(entry.config_name for entry in ENTRIES)
    assert presets("data") == ["atari", "digits", "files"]
    # Options have their defaults in their dataclasses alone; the demo's keys are those of other commands.
    for path in set(CONF.glob("vidtok_*.yaml")) | set(CONF.glob("vidgpt_[cepvw]*.yaml")):
        assert set(OmegaConf.load(path)) == {"defaults"}, path


@pytest.mark.parametrize("preset", presets("tokenizer"))
def test_every_tokenizer_preset_builds(preset: str) -> None:
    values = composed("vidtok_train", "data=digits", f"tokenizer={preset}")["tokenizer"]
    values["width"] = 8
    model = VidTokModel(VidTokConfig(**values))
    assert model.config.codebook_size > 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("preset", presets("tokenizer"))
def test_every_tokenizer_preset_takes_every_quantizer(preset: str, quantizer: str) -> None:
    values = composed("vidtok_train", "data=digits", f"tokenizer={preset}", f"tokenizer.quantizer={quantizer}")["tokenizer"]
    size = values["codebook_size"]
    if quantizer in ("lfq", "bsq") and size.bit_count() > 1:
        sentence = rf"codebook_size={size} is no power of two, which quantizer={quantizer} needs: use "
        with pytest.raises(StrictDataclassClassValidationError, match=sentence):
            VidTokConfig(**values)
        values["codebook_size"] = 1 << size.bit_length()
    config = VidTokConfig(**values)
    assert config.quantizer == quantizer
    assert config.codebook_factors == ([values["codebook_size"]] if quantizer not in ("kl", "none") else [])


@pytest.mark.parametrize("preset", presets("model"))
def test_every_model_preset_builds(preset: str) -> None:
    values = composed("vidgpt_train", f"model={preset}")["model"]
    config = VidGPTConfig(**{**values, "num_hidden_layers": 1})
    assert VidGPTForCausalLM(config).num_parameters() > 0
    assert "codebook_size" not in values


@pytest.mark.parametrize("preset", [*presets("data")])
def test_every_data_preset_composes_for_every_command_that_reads_data(preset: str) -> None:
    for command in ("vidtok_train", "vidtok_encode", "vidtok_evaluate"):
        assert composed(command, f"data={preset}")["data"]["name"] == preset


@pytest.mark.parametrize("preset", presets("pretrained"))
@pytest.mark.parametrize("command", ["vidtok_encode", "vidtok_evaluate", "vidtok_reconstruct"])
def test_every_tokenizer_of_another_project_composes_and_is_known(command: str, preset: str) -> None:
    overrides = [] if command == "vidtok_reconstruct" else ["data=digits"]
    values = composed(command, *overrides, f"pretrained@tokenizer={preset}", "tokenizer.path=somewhere")["tokenizer"]
    assert (values["name"], values["path"]) == (preset, "somewhere")
    assert preset in {*FAMILIES, SCRIPTS}


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_preset_says_its_purpose_and_cost_and_states_only_what_differs(path: Path) -> None:
    # Hydra reads the package of a preset from its first line.
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ") and lines[0].endswith(".")
    schema = {"tokenizer": VidTokConfig, "model": VidGPTConfig}.get(path.parent.name)
    if schema is not None:
        own = {key: value for key, value in OmegaConf.to_container(OmegaConf.load(path)).items() if key != "defaults"}
        assert set(own) <= set(schema.__dataclass_fields__)


def test_the_demo_hands_its_keys_to_every_stage() -> None:
    values = OmegaConf.create(composed("vidgpt_demo", "run_dir=somewhere", "seed=3"))
    assert values.tokenizer_training.run_dir == "somewhere/tokenizer"
    assert values.gpt_training.tokens == values.encoding.output == values.evaluation.tokens == "somewhere/tokens"
    assert values.tokenizer_training.seed == values.gpt_training.seed == 3
