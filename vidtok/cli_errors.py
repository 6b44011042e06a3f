"""What the user can change, in one sentence: errors of Hydra and OmegaConf, and those of the work, translated."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

TYPE_WORDS = {"Integer": "an integer", "Float": "a number", "bool": "true or false"}
_TEXTS = {"runs": ["A", "B"], "trackers": ["tensorboard"]}  # of lists of texts that cannot be any: the shortest example
_NO_LIST = ("is not a ListConfig, list or tuple", "Cannot merge DictConfig with ListConfig")


def explain(error: BaseException, example: str, keys: Mapping[str, str]) -> str:
    """Say in one sentence what the user can change. keys: of folders whose presets another name chooses."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, preset = error.missing_cfg_file.rpartition("/")
        group = keys.get(group, group)
        options = [name for name in error.options or () if not name.startswith("schema")]
        return f"{group}={preset}: unknown preset, {_nearest(preset, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value, a value with special characters needs quotes as in 'key=\"value\"'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    culprit = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(culprit, OmegaConfBaseException) and culprit.full_key:
        where = re.match(r"In '(.+?)': ", str(error))
        return (f"in {where[1]}.yaml, " if where else "") + _explain_value(culprit)
    if must := re.match(r"You must specify '(.+?)'.*Available options:(.*)", str(error), re.DOTALL):
        options = [name for name in must[2].split() if not name.startswith("schema")]
        return f"{must[1]} must be given, one of {', '.join(options)}, for example: {example}"
    if nowhere := re.match(r"Could not override '(.+?)'", str(error)):
        return f"{nowhere[1]}: unknown key, this command has no such group of presets, see --help"
    if ambiguous := re.match(r"Ambiguous value for argument '((.+?)=(.+))'$", str(error), re.MULTILINE):
        key = f"{ambiguous[2]}=" if _is_list(ambiguous[2]) else ""
        return f"{ambiguous[1]}: a list is written {key}[{ambiguous[3]}], and a text with a comma needs quotes"
    if type(error).__module__ == "huggingface_hub.errors" and error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__


def _explain_value(error: OmegaConfBaseException) -> str:
    key, parent = str(error.full_key), error.parent_node
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(parent, DictConfig):
        return unknown_key(key, [str(name) for name in parent if name != "hydra"], parent)
    first_line = str(error).partition("\n")[0]
    typed = f"{key}={_typed(error.value)}"
    if isinstance(error, ValidationError):
        if "not Optional" in first_line:
            return f"{key}=null: a value is needed here"
        if wrong := re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", first_line):
            return f"{key}={wrong[1]}: expected {TYPE_WORDS.get(wrong[2], wrong[2])}"
    if any(words in first_line for words in _NO_LIST):
        # OmegaConf does not say what was typed where it was a mapping.
        return f"{key if error.value is None else typed}: expected a list, for example {key}={_example_list(error)}"
    if first_line.startswith("Invalid type assigned") and isinstance(group := _former(error), DictConfig):
        return f"{typed}: expected one of its keys, for example {key}.{next(iter(group))!s}=VALUE"
    return f"{key}: {first_line}"


def _former(error: OmegaConfBaseException) -> Any:
    """Give what the key that was to be set held before."""
    parent = error.parent_node
    return parent._get_node(error.key) if isinstance(parent, DictConfig) else None


def _typed(value: Any) -> str:
    return str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


def _is_list(key: str) -> bool:
    """Tell whether a key of this command is known to be a list, that of a group too."""
    store, (group, _, name) = ConfigStore.instance(), key.rpartition(".")
    schemas = [(path, word) for path, word in (("", key), (group, name)) if store.get_type(path) is ObjectType.GROUP]
    nodes = [
        (store.load(f"{path}/{file}".lstrip("/")).node, word)
        for path, word in schemas
        for file in store.list(path)
        if file.startswith("schema_") and file.endswith(".yaml")
    ]
    return any(isinstance(_node_of(node, word), ListConfig) for node, word in nodes)


def _node_of(config: Any, key: str) -> Any:
    """Give the node of a dotted key, also of a value that is null or missing; None where there is none."""
    for name in key.split("."):
        is_group = isinstance(config, DictConfig) and not config._is_none()
        config = config._get_node(name, validate_access=False) if is_group else None
    return config


def _example_list(error: OmegaConfBaseException) -> str:
    """Give what was typed as a list, numbers as two or more, else the list that was there."""
    former, value = _former(error), error.value
    # Where a mapping was typed, the parent is the list itself.
    lists = [found for found in (former, error.parent_node) if isinstance(found, ListConfig)]
    if lists and lists[0]._metadata.element_type is str:
        texts = _TEXTS.get(str(error.full_key).partition("[")[0], [])
        if value not in (None, ""):
            return f"[{','.join([str(value), *texts[1:]])}]"
        there = [] if lists[0]._is_none() or lists[0]._is_missing() else [str(text) for text in lists[0]]
        return f"[{','.join(texts or there)}]"
    numbers: list[str] = re.findall(r"\d+(?:\.\d+)?", _typed(error.value))
    if len(numbers) < 2 and isinstance(former, ListConfig) and not former._is_none() and len(former):
        numbers = [str(value) for value in former]
    numbers = numbers * 2 if len(numbers) == 1 else numbers or ["1", "2"]
    return f"[{','.join(numbers)}]"


def unknown_key(full_key: str, known: list[str], parent: DictConfig) -> str:
    """Say which key was meant. known: the keys that `parent`, the group it was looked for in, has."""
    group, _, key = full_key.rpartition(".")
    prefix = f"{group}." if group else ""
    nested = [f"{prefix}{name}.{key}" for name in known if _has(parent, name, key)]
    if nested:
        return f"{full_key}: unknown key, did you mean {' or '.join(nested)}?"
    if owners := _owners(group, key):
        return f"{full_key}: unknown key here, it belongs to {' and '.join(owners)}"
    return f"{full_key}: unknown key, {_nearest(key, known if group else [*known, 'debug'], prefix)}"


def _has(parent: DictConfig, name: str, key: str) -> bool:
    return not OmegaConf.is_missing(parent, name) and isinstance(parent[name], DictConfig) and key in parent[name]


def _owners(group: str, key: str) -> list[str]:
    """Find the other sources of a group that know a key, as `data=files`."""
    store = ConfigStore.instance()
    names = [name.removesuffix(".yaml") for name in store.list(group)] if group in store.repo else []
    sources = [name for name in names if name.startswith("schema_") and key in store.load(f"{group}/{name}.yaml").node]
    return [f"{group}={name.removeprefix('schema_')}" for name in sources]


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{matches[0]}?" if matches else f"the known ones are {', '.join(sorted(known)) or 'none'}"
