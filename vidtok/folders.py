"""Trained folders on disk: finding the model in a run folder, loading and saving without noise."""

import json
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

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
    if found.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {found['format_version']}, this version reads up to {FORMAT_VERSION}: update the package"
        )
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
