"""Folders on disk: finding the model in a run folder, loading and saving without noise; what a command may write over."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from vidtok.run.checkpoints import write_text

Model = TypeVar("Model", bound=PreTrainedModel)

FORMAT_VERSION = 1
_WRITERS = {"vidtok": "vidtok-train", "vidgpt": "vidgpt-train"}


def model_folder(path: str | Path, model_type: str) -> Path:
    """Give the folder with weights of a run folder or model folder.

    Raises FileNotFoundError or ValueError, in one sentence, when there is none or it holds another kind of model.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist: give a run folder or its model/")
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        hint = "its training has not saved a model yet" if (path / "checkpoints").is_dir() else "give a run folder or its model/"
        raise ValueError(f"{path} is not a trained folder (no config.json with model.safetensors): {hint}")
    found = _read_config(folder)
    # Each of these makes transformers load something else than the safetensors beside it: another file, a kernel, a quantizing library.
    redirected = [
        key for key in ("transformers_weights", "attn_implementation", "quantization_config") if found.get(key) is not None
    ]
    if redirected:
        raise ValueError(
            f"{path} has {redirected[0]} in its config.json, which we never write: remove that key, if you trust the folder"
        )
    if found.get("model_type") != model_type:
        raise ValueError(
            f"{path} holds a model of type {found.get('model_type')!r}, not {model_type!r}: give one that {_WRITERS[model_type]} wrote"
        )
    version = found.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{path} has format {version!r}, this version reads up to {FORMAT_VERSION}: update the package")
    return folder


def load_model(model_class: type[Model], path: str | Path) -> Model:
    """Load a model in eval mode, fp32; any missing, unexpected or broken weight is a ValueError."""
    folder = model_folder(path, model_class.config_class.model_type)
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{folder} cannot be loaded ({_first_line(error)}): the folder is damaged, copy or train it again"
        ) from error
    except Exception as error:
        # safetensors and the strict config have error classes of their own, without a common base but Exception.
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise
        raise ValueError(
            f"{folder} cannot be loaded ({_first_line(error)}): the folder is damaged, copy or train it again"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(
                f"{folder} has {kind.replace('_', ' ')} {sorted(map(str, report[kind]))[:3]}: weights and config.json do not match"
            )
    return model.eval()


def save_model(model: PreTrainedModel, path: str | Path) -> None:
    """Write config.json and model.safetensors into path."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(path)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the JSON, safetensors and TorchScript files of a model folder, nothing else; none of them is opened."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jit"):
            shutil.copyfile(file, target / file.name)


@dataclass(frozen=True)
class OutputFolder:
    """Where a command writes: it replaces what an earlier run of its own wrote there, and no other file.

    record: the JSON file in it whose "files" lists what that run wrote. ours: all that such a list may name, for it is read from disk
    and what it names is deleted.
    """

    path: Path
    record: str
    ours: re.Pattern[str]

    def check(self, names: Sequence[str], **inputs: str | None) -> None:
        """Raise ValueError when writing these files would lose one that no earlier run wrote, an input above all.

        names: relative to the folder. inputs: file or folder that each key names.
        """
        for place in (*sorted({(self.path / name).parent for name in names}, reverse=True), self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(f"output={self.path} cannot be a folder, because {place} is a file: give another output folder")
        names, former = [*names, self.record], self._former()
        written = [(self.path / name).resolve() for name in {*names, *former}]
        for key, value in inputs.items():
            source = Path(value).expanduser().resolve() if value else None
            if any(source in (path, path.parent) for path in written):
                raise ValueError(f"{key}={value} lies where output={self.path} is written: give another output folder")
        foreign = [self.path / name for name in names if name not in former and (self.path / name).exists()]
        if foreign:
            run = Path(self.record).stem
            raise ValueError(f"{foreign[0]} is there already, and no {run} of this folder wrote it: give another output folder")

    def replace(self, names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """Delete what the earlier run wrote, and record values and what comes instead; gives the record.

        Before the files themselves: what an interruption leaves is then known as ours.
        """
        for name in self._former() - {self.record}:
            (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        record = {**values, "files": [*names, self.record]}
        write_text(self.path / self.record, json.dumps(record, indent=1) + "\n")
        return record

    def _former(self) -> set[str]:
        """Name the files that the record says an earlier run wrote; none without a record."""
        try:
            record = json.loads((self.path / self.record).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return set()
        files = record.get("files") if isinstance(record, dict) else None
        return (
            {name for name in files if isinstance(name, str) and self.ours.fullmatch(name)} if isinstance(files, list) else set()
        )


def _read_config(folder: Path) -> dict:
    try:
        values = json.loads((folder / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not valid JSON ({error}): the folder is damaged, copy or train it again"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} holds no options: the folder is damaged, copy or train it again")
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
