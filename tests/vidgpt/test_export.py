import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from tests.conftest import randomised
from vidgpt.export import main
from vidgpt.exporting import AUTO_MAP, export_checkpoint, travelling_code
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import ExportOptions
from vidgpt.rollout import Predictor, stream_tokens
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel

VARIANTS = {
    "plain": {"draft_head": True},
    "actions": {"num_actions": 3},
    "digits": {"factors": [4, 4]},
    "shared": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "sliding": {"attention_frames": 2, "sink_frames": 1},
}
CODE = {"configuration_vidgpt.py", "modeling_vidgpt.py", "attention.py", "cache.py", "digits.py", "generation.py", "layout.py"}
LOAD = """
import os
import sys
sys.path.insert(0, sys.argv[1])
from importlib.util import find_spec
from pathlib import Path
for name in ("vidgpt", "vidtok", "einops", "hydra", "omegaconf", "accelerate", "av", "datasets", "vector_quantize_pytorch"):
    assert find_spec(name) is None, name
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in map(Path, sys.argv[2:]):
    given = load_file(folder.with_suffix(".safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    layout, actions = model.model.layout, given.get("actions")
    prompt = layout.flatten(given["context"], None if actions is None else actions[:, :2])
    ids = model.generate(prompt, max_new_tokens=3 * layout.tokens_per_frame, do_sample=False, actions=actions)
    drawn = model.generate(prompt, max_new_tokens=3 * layout.tokens_per_frame, actions=actions)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    found = {"logits": model(given["ids"]).logits, "states": base(given["ids"])[0], "loss": model(given["ids"], labels=given["ids"]).loss}
    found |= {"clip": layout.unflatten(ids), "drawn": layout.unflatten(drawn)}
    os.chdir(folder)
    names, code = {}, Path("README.md").read_text().split("```python")[1].split("```")[0]
    for run in ("first", "second"):
        exec(code, names)
        found |= {f"{run}_{name}": names[name] for name in ("indices", "actions", "clip", "drawn") if name in names}
    save_file({name: value.detach().contiguous() for name, value in found.items()}, folder / "found.safetensors")
    assert type(model).__module__.endswith(".modeling_vidgpt") and "cuda" not in str(model.device)
"""


@pytest.fixture
def make_checkpoint(make_model, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "checkpoint", **options: object) -> Path:
        folder = tmp_path / name
        torch.manual_seed(1)
        tokenizer = randomised(VidTokModel(VidTokConfig(stride_t=1, width=8, encoder_blocks=1, quantizer="vq", codebook_size=16)))
        save_model(tokenizer, folder / "tokenizer")
        sizes = {"codebook_size": 16, "grid_height": 2, "grid_width": 2}
        save_model(make_model(**{**sizes, **options}), folder)
        frame = {"stride_t": 1, "stride_s": 8, "fps": 10.0, "frame_height": 16, "frame_width": 16, "num_actions": 3}
        factors = {"codebook_factors": [16], "encoder_fingerprint": tokenizer.encoder_fingerprint()}
        Card(tokenizer.fingerprint(), **sizes, **frame, **factors, data_name="files", manifest_hash="m").save(folder)
        return folder

    return make


def exported(checkpoint: Path, output: Path) -> Path:
    export_checkpoint(ExportOptions(str(checkpoint), str(output)))
    return output


def needed_by(*names: str) -> dict[str, metadata.Distribution]:
    """Find distributions and all that they need, without extras."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found[name] = metadata.distribution(name)
            needs = [Requirement(line) for line in found[name].requires or ()]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lend torch, transformers, safetensors and what they need to an environment that holds nothing else."""
    site = tmp_path_factory.mktemp("site")
    for distribution in needed_by("torch", "transformers", "safetensors").values():
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).exists() or (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return site


@pytest.fixture
def load_elsewhere(bare_site: Path, tmp_path: Path) -> Callable[..., None]:
    """Run LOAD in a new process that sees the bare site alone, and keeps what it caches in a folder of its own."""

    def load(*folders: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        environment = {**kept, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-I", "-S", "-c", LOAD, *map(str, (bare_site, *folders))]
        result = subprocess.run(command, cwd=bare_site, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    return load


def test_exported_folders_give_our_logits_and_ids_where_only_transformers_is_installed(
    make_checkpoint, make_ids, load_elsewhere, tmp_path
) -> None:
    generator, folders = torch.Generator().manual_seed(0), []
    for name, options in VARIANTS.items():
        folders.append(exported(make_checkpoint(f"checkpoint_{name}", **options), tmp_path / name))
        model = load_model(VidGPTForCausalLM, tmp_path / f"checkpoint_{name}")
        given = {"ids": make_ids(model), "context": torch.randint(16, (2, 2, 2, 2), generator=generator)}
        if model.config.num_actions:
            given["actions"] = torch.randint(3, (2, 5), generator=generator)
        save_file(given, tmp_path / f"{name}.safetensors")
    load_elsewhere(*folders)
    for folder in folders:
        model = load_model(VidGPTForCausalLM, tmp_path / f"checkpoint_{folder.name}")
        given, found = load_file(tmp_path / f"{folder.name}.safetensors"), load_file(folder / "found.safetensors")
        assert torch.equal(found["logits"], model(given["ids"]).logits)
        # Nobody there would know what to do with it.
        assert not any(key.startswith("draft_head") for key in load_file(folder / "model.safetensors"))
        assert torch.equal(found["states"], model.model(given["ids"]).last_hidden_state)
        assert torch.equal(found["loss"], model(given["ids"], labels=given["ids"]).loss)
        ours = torch.stack(list(stream_tokens(model, given["context"], 3, actions=given.get("actions"))), dim=1)
        assert torch.equal(found["clip"], torch.cat([given["context"], ours], dim=1))
        assert found["drawn"].shape == found["clip"].shape and not torch.equal(found["drawn"], found["clip"])
        # What the page shows runs as it stands, and gives the same every time.
        made = {name.removeprefix("first_"): value for name, value in found.items() if name.startswith("first_")}
        assert all(torch.equal(value, found[f"second_{name}"]) for name, value in made.items())
        shown = torch.stack(list(stream_tokens(model, made["indices"], 3, actions=made.get("actions"))), dim=1)
        assert torch.equal(made["clip"], torch.cat([made["indices"], shown], dim=1))
        assert made["drawn"].shape == made["clip"].shape and not torch.equal(made["drawn"], made["clip"])


def test_a_folder_whose_code_is_changed_gives_other_logits(make_checkpoint, make_ids, load_elsewhere, tmp_path) -> None:
    folder = exported(make_checkpoint(), tmp_path / "plain")
    model = load_model(VidGPTForCausalLM, tmp_path / "checkpoint")
    given = {"ids": make_ids(model), "context": torch.zeros(2, 2, 2, 2, dtype=torch.long)}
    save_file(given, tmp_path / "plain.safetensors")
    code = (folder / "modeling_vidgpt.py").read_text()
    assert "self.rotary(positions + 1, " in code
    (folder / "modeling_vidgpt.py").write_text(code.replace("self.rotary(positions + 1, ", "self.rotary(positions, "))
    load_elsewhere(folder)
    found = load_file(folder / "found.safetensors")["logits"]
    assert not torch.allclose(found, model(given["ids"]).logits, atol=1e-2)


def test_what_travels_imports_torch_and_transformers_alone(tmp_path) -> None:
    import ast

    code = travelling_code()
    assert set(code) > CODE
    imported = set()
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in code, name
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    # huggingface_hub is a part of transformers.
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "huggingface_hub"}


def test_the_folder_holds_no_pickle_and_is_still_a_checkpoint_of_ours(make_checkpoint, tmp_path) -> None:
    checkpoint = make_checkpoint()
    folder = exported(checkpoint, tmp_path / "out")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".py", ".json", ".safetensors", ".md"}
    assert files == set(json.loads((folder / "export.json").read_text())["files"])
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    context = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    clips = [
        torch.stack(list(Predictor.from_pretrained(path, device="cpu").stream(context, 2)), 1) for path in (checkpoint, folder)
    ]
    assert torch.equal(*clips)


@pytest.mark.parametrize(("options", "line"), [({}, "(4 tokens, allowed ids 0 to 15)"), ({"attention_frames": 2}, "No engine")])
def test_the_page_shows_how_to_load_and_serve(options: dict, line: str, make_checkpoint, tmp_path) -> None:
    page = (exported(make_checkpoint(**options), tmp_path / "out") / "README.md").read_text()
    assert "trust_remote_code=True" in page and line in page and "http" not in page
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")]
    assert not any(str(tmp_path) in text for text in texts)


def test_a_second_export_replaces_the_first_and_nothing_else(make_checkpoint, tmp_path) -> None:
    folder = exported(make_checkpoint(num_actions=3), tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    exported(make_checkpoint("other"), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["num_actions"] == 0
    (folder / "export.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is there already, and no export of this folder wrote it"):
        exported(tmp_path / "other", folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_not_exported_into_itself(make_checkpoint) -> None:
    checkpoint = make_checkpoint()
    with pytest.raises(ValueError, match=r"lies where output=.* is written"):
        exported(checkpoint, checkpoint)


def test_independent_digits_are_refused_in_one_sentence(make_checkpoint, tmp_path, capsys) -> None:
    checkpoint = make_checkpoint(factors=[4, 4], digits="parallel")
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}"])
    sentence = capsys.readouterr().err
    assert stop.value.code == 2 and sentence.count("\n") == 1
    assert "digits=parallel, whose logits are no distribution over ids" in sentence and "model.digits=slots" in sentence
    assert not (tmp_path / "out").exists()


def test_a_torchscript_tokenizer_stays_behind(make_checkpoint, tmp_path, capsys) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "tokenizer" / "decoder.jit").write_bytes(b"code")
    main([f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}"])
    assert "is TorchScript, which is code, and is left out" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert "is not here" in (tmp_path / "out" / "README.md").read_text()


def test_generate_takes_a_processor_of_the_caller_in_place_of_its_own(make_model, make_ids) -> None:
    from vidgpt.sampling import LayoutLogitsProcessor

    model = make_model(num_actions=3)
    layout, prompt = TokenLayout.from_config(model.config), make_ids(model, frames=1)
    actions = torch.tensor([[0, 2, 1], [1, 1, 0]])
    sizes = {"max_new_tokens": 2 * layout.tokens_per_frame, "do_sample": False}
    own = model.generate(prompt, actions=actions, **sizes)
    assert torch.equal(own, model.generate(prompt, logits_processor=[LayoutLogitsProcessor(layout, actions)], **sizes))
    assert not torch.equal(own, model.generate(prompt, actions=actions.flip(0), **sizes))
    with pytest.raises(ValueError, match="trained with 3 actions, and none came"):
        model.generate(prompt, **sizes)
