"""Write a model folder that transformers loads by itself, with the code it needs beside the weights.

The code is this package's own: model.py and all that it imports, found by following its imports, which become relative ones. So what
travels cannot differ from what was trained, and no second copy is kept. A module of that closure may import torch, transformers and
the standard library alone, and names ours as `from vidgpt.module import`.
"""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from vidgpt.checkpoint import load_checkpoint
from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout
from vidgpt.options import ExportOptions
from vidtok.folders import OutputFolder, model_folder
from vidtok.run.checkpoints import write_text

RECORD_FILE = "export.json"
# Copied as they are, but for a draft head; config.json gets a line more.
_COPIED = ("generation_config.json", "card.json", "model.safetensors")
# Names that transformers' users look for; every other module keeps its own.
_STEMS = {"vidgpt.config": "configuration_vidgpt", "vidgpt.model": "modeling_vidgpt"}
AUTO_MAP = {
    "AutoConfig": "configuration_vidgpt.VidGPTConfig",
    "AutoModel": "modeling_vidgpt.VidGPTModel",
    "AutoModelForCausalLM": "modeling_vidgpt.VidGPTForCausalLM",
}
_IMPORT = re.compile(r"^from ((?:vidgpt|vidtok)\.[\w.]+) import", re.MULTILINE)
# What a record may name: it is read from disk, and what it names is deleted.
_OURS = re.compile(r"\w+\.py|(tokenizer/)?(\w+\.json|model\.safetensors)|README\.md")
_PAGE = """\
# A model that predicts video tokens

It continues clips of token ids below {codebook_size} on a grid of {height} x {width}, up to {window} latent frames, context included.
It needs torch, transformers and safetensors. trust_remote_code=True runs the .py files of this folder: read them first.
Run in this folder:

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
layout, context, future = model.model.layout, {context}, {future}  # latent frames
# Made up, in place of what the tokenizer gives of a video: (B, t, {height}, {width}), whole frames of the context.
torch.manual_seed(0)
indices = torch.randint(layout.codebook_size, (1, context, layout.height, layout.width))
{made}length = future * layout.tokens_per_frame
# The likeliest ids; without do_sample=False, generate draws them.
clip = layout.unflatten(model.generate(layout.flatten({prompt}), max_new_tokens=length, do_sample=False{actions}))
# Drawn from the model's distribution, another clip for each seed.
torch.manual_seed(1)
drawn = layout.unflatten(model.generate(layout.flatten({prompt}), max_new_tokens=length, do_sample=True{actions}))
print(clip.shape, drawn.shape)  # the context, and `future` frames more
```

{pictures}

{served}
"""


def export_checkpoint(options: ExportOptions) -> list[str]:
    """Write config.json, weights, code, card.json, tokenizer/ and README.md into options.output; gives the files' names.

    export.json there names them, so that a later export replaces them, and no other file. Raises ValueError for digits=parallel.
    """
    folder = model_folder(options.checkpoint, VidGPTConfig.model_type)
    tokenizer, code = _tokenizer_files(folder), travelling_code()
    names = ["config.json", *_COPIED, *tokenizer, *code, "README.md"]
    output = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    output.check(names, checkpoint=str(folder), tokenizer=str(folder / "tokenizer"))
    # Loaded to be sure that the folder is whole, before anything of an earlier export is deleted.
    model, _ = load_checkpoint(folder)
    if model.model.layout.is_parallel:
        raise ValueError(
            f"the checkpoint {options.checkpoint} has digits=parallel, whose logits are no distribution over ids, so neither generate "
            "nor an engine could draw from them: use vidgpt-predict, or train with model.digits=slots"
        )
    # No paths: the folder is made to be given away.
    output.replace(names, {"torch_version": torch.__version__, "transformers_version": transformers.__version__})
    for name in (*_COPIED, *tokenizer):
        (output.path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, output.path / name)
    _leave_out_draft_head(output.path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    texts = {"config.json": json.dumps({**config, "draft_head": False, "auto_map": AUTO_MAP}, indent=2) + "\n"}
    texts |= {**code, "README.md": _page(model.config, bool(tokenizer))}
    for name, text in texts.items():
        write_text(output.path / name, text)
    print(f"exported to {output.path}; {output.path / 'README.md'} shows how to load it")
    return names


def _leave_out_draft_head(weights: Path) -> None:
    """Drop from a file what neither generate nor an engine runs, and an engine would take for another model's."""
    found = load_file(weights)
    # Copies, because what was loaded may still lie in the file.
    kept = {name: value.clone() for name, value in found.items() if not name.startswith("draft_head.")}
    if len(kept) < len(found):
        save_file(kept, weights, metadata={"format": "pt"})


def travelling_code() -> dict[str, str]:
    """Give the name and text of every file of code that an exported model needs."""
    sources: dict[str, str] = {}
    waiting = ["vidgpt.model"]
    while waiting:
        module = waiting.pop()
        if module not in sources:
            spec = find_spec(module)
            assert spec is not None and spec.origin is not None
            sources[module] = Path(spec.origin).read_text(encoding="utf-8")
            waiting += _IMPORT.findall(sources[module])
    stems = {module: _STEMS.get(module, module.rpartition(".")[2]) for module in sorted(sources)}
    assert len(set(stems.values())) == len(stems), "two modules of one name cannot lie in one folder"
    return {
        f"{stem}.py": _IMPORT.sub(lambda found: f"from .{stems[found[1]]} import", sources[name]) for name, stem in stems.items()
    }


def _tokenizer_files(folder: Path) -> list[str]:
    """Name the tokenizer's files; none where it is more than JSON and safetensors, for TorchScript is code."""
    files = sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file())
    if all(path.suffix in (".json", ".safetensors") for path in files):
        return [f"tokenizer/{path.name}" for path in files]
    print(f"{folder / 'tokenizer'} is TorchScript, which is code, and is left out: decode with the checkpoint itself", flush=True)
    return []


def _page(config: VidGPTConfig, has_tokenizer: bool) -> str:
    layout = TokenLayout.from_config(config)
    made = "actions = torch.randint(layout.num_actions, (1, context + future))  # one a frame, those to come included\n"
    context = min(2, config.window - 1)
    pictures = (
        "card.json and tokenizer/ are the tokenizer that made the ids: vidgpt-predict takes this folder as its checkpoint, and\n"
        'vidtok.load_tokenizer("tokenizer"), in this folder, has encode(video), which gives indices, and decode(clip), the pictures.'
        if has_tokenizer
        else "The tokenizer that made the ids is not here, card.json tells which it was."
    )
    return _PAGE.format(
        codebook_size=layout.codebook_size,
        height=layout.height,
        width=layout.width,
        window=config.window,
        context=context,
        future=min(4, config.window - context),
        made=made if layout.num_actions else "",
        prompt="indices, actions[:, :context]" if layout.num_actions else "indices",
        actions=", actions=actions" if layout.num_actions else "",
        pictures=pictures,
        served=_served(config, layout),
    )


def _served(config: VidGPTConfig, layout: TokenLayout) -> str:
    """Say how an engine with attention of its own serves the model."""
    if config.attention_frames:
        return f"No engine with attention of its own can serve it, because attention_frames={config.attention_frames} hides whole frames."
    lead = f"{layout.separator_id + 1} + action" if layout.num_actions else str(layout.separator_id)
    legal = (
        f"allowed ids 0 to {layout.codebook_size - 1}"
        if layout.num_digits == 1
        else f"{layout.slots_per_place} digits a place, those of digit q within layout.spans[q]: generation.py has them as a processor"
    )
    return (
        "It is written for engines that serve transformers' models, such as vLLM (trust_remote_code, skip_tokenizer_init). These know\n"
        f"nothing of frames: put the lead of the next one ({lead}) behind the whole frames so far,\n"
        f"ask for that frame ({layout.slots_per_frame} tokens, {legal}), and so on."
    )
