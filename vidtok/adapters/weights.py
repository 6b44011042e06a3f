"""A network's weights out of a folder, also where they are a part of a larger model's."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

Network = TypeVar("Network", bound=PreTrainedModel)


def options_in(values: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Give the options of one part of a larger model's config.json, or of a config.json that is that part's own; null means defaults.

    Raises ValueError where the part holds something else than options.
    """
    options = values.get(part, values)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"config.json has {part}={options!r:.40}, which are no options: the folder is damaged, copy it again")
    return options or {}


def load_network(network_class: type[Network], options: Mapping[str, Any], folder: Path, unused: str | None = None) -> Network:
    """Build a network of its config's options and fill it from the safetensors files of a folder, in fp32; other tensors are not read.

    The names there may have any common prefix, such as `model.vqmodel.` in a language model's folder. unused: a part of the network
    that is taken out. Raises ValueError for options of no network, and when a weight is missing, of another shape, not finite or left
    over.
    """
    try:
        # Random values for 270 M weights take seconds, and every one of them is replaced below.
        with no_init_weights():
            network = network_class(network_class.config_class(**_own(options, network_class.config_class)))
    except (StrictDataclassError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the config.json of {folder} describes no {network_class.__name__} ({reason}): the folder is damaged, copy it again"
        ) from error
    if unused is not None:
        delattr(network, unused)
    _load(network, folder, unused)
    return network.float().eval()


def _own(options: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Give the options of the network itself.

    Those that every config inherits say how to load it, attn_implementation for example a kernel to fetch and run.
    """
    own = {option.name for option in fields(config_class)} | set(config_class.attribute_map)
    own -= {option.name for option in fields(PreTrainedConfig)}
    return {name: value for name, value in options.items() if name in own}


def _load(network: PreTrainedModel, folder: Path, unused: str | None) -> None:
    places = _places(folder)
    wanted = list(network.state_dict())
    prefix = _prefix(wanted, places, folder)
    left_over = {name.removeprefix(prefix) for name in places if name.startswith(prefix)} - set(wanted)
    left_over = {name for name in left_over if name.partition(".")[0] != unused}
    if left_over:
        raise ValueError(
            f"{folder} has weights {sorted(left_over)[:3]} that its config.json does not: weights and config.json do not match"
        )
    tensors = {name: _read(places[prefix + name], prefix + name) for name in wanted}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{folder} has weights {broken[:3]} with values that are not finite: the folder is damaged, copy it again"
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{folder}: weights and config.json do not match ({reason})") from error


def _places(folder: Path) -> dict[str, Path]:
    """Say in which file every tensor lies; reads the headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file: weights in other formats are not read, convert them to safetensors")
    places: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again") from error
        twice = sorted(places.keys() & names)
        if twice:
            raise ValueError(
                f"{file.name} and {places[twice[0]].name} in {folder} both hold {twice[0]!r}: leave one set of weights there"
            )
        places.update(dict.fromkeys(names, file))
    return places


def _prefix(wanted: list[str], places: dict[str, Path], folder: Path) -> str:
    """Find what the names begin with: the candidate under which most of them are there."""
    first = wanted[0]
    candidates = [name.removesuffix(first) for name in places if name == first or name.endswith(f".{first}")]
    missing = {prefix: [name for name in wanted if prefix + name not in places] for prefix in candidates}
    if not missing:
        raise ValueError(f"{folder} has no weight {first!r}: weights and config.json do not match, or the download is incomplete")
    prefix = min(missing, key=lambda prefix: len(missing[prefix]))
    if missing[prefix]:
        names = [prefix + name for name in missing[prefix][:3]]
        raise ValueError(f"{folder} lacks weights {names}: weights and config.json do not match, or the download is incomplete")
    return prefix


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor = tensors.get_tensor(name)
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
