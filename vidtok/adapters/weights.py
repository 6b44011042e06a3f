"""A network's weights out of a folder, also where they are a part of a larger model's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

Network = TypeVar("Network", bound=PreTrainedModel)


def options_in(values: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Give the options of one part of a larger model's config.json, or of a config.json that is that part's own; null means defaults."""
    return (values[part] or {}) if part in values else values


def load_network(network_class: type[Network], options: Mapping[str, Any], folder: Path, unused: str | None = None) -> Network:
    """Build a network of its config's options and fill it from the safetensors files of a folder, in fp32; other tensors are not read.

    The names there may have any common prefix, such as `model.vqmodel.` in a language model's folder. unused: a part of the network
    that is taken out. Raises ValueError when a weight is missing, of another shape or left over.
    """
    # Random values for 270 M weights take seconds, and every one of them is replaced below.
    with no_init_weights():
        network = network_class(network_class.config_class.from_dict(dict(options)))
    if unused is not None:
        delattr(network, unused)
    _load(network, folder, unused)
    return network.float().eval()


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
    places = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                places.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again") from error
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
