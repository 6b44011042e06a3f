"""Where conf/ lies, and the schemas that make Hydra refuse a key or a value that no dataclass knows.

A preset (`conf/<group>/<preset>.yaml`) begins with `defaults: [schema]` and lists only what differs; `<group>=schema` is all defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

Options = TypeVar("Options")


def config_dir() -> str:
    """Find conf/: inside the installed package, or beside it in a checkout. Gives an absolute path."""
    here = Path(__file__).resolve().parent
    packaged, checkout = here / "conf", here.parent / "conf"
    return str(packaged if packaged.is_dir() else checkout)


def store_schema(group: str | None, name: str, cls: type) -> None:
    """Register a dataclass with Hydra as `<group>/<name>`; group None is the root of the configuration.

    A frozen dataclass is fine: what Hydra gets is a mutable copy of its fields. A field without a default becomes mandatory (`???`).
    """
    ConfigStore.instance().store(group=group, name=name, node=_copy_of_fields(cls))


def model_schema(config_class: type, left_out: frozenset[str] = frozenset()) -> type:
    """Make a dataclass of the fields that a @strict PreTrainedConfig adds to its parent, for store_schema.

    left_out: fields that are no user's to set.
    OmegaConf cannot read the class itself: its inherited annotations are strings that name torch.
    Needs real annotations, so no `from __future__ import annotations` where config_class is written.
    """
    from transformers import PreTrainedConfig

    inherited = frozenset(option.name for option in dataclasses.fields(PreTrainedConfig))
    return _copy_of_fields(config_class, inherited | left_out)


def register_schemas() -> None:
    """Register the schemas of vidtok's groups: `data/schema_<source>` for each source, and `tokenizer/schema`."""
    # Imported here because the model's configuration brings torch along, which --help of other commands need not wait for.
    from vidtok.config import VidTokConfig
    from vidtok.data.options import AtariOptions, DigitsOptions, FilesOptions

    store_schema("tokenizer", "schema", model_schema(VidTokConfig))
    register_pretrained()
    for options in (FilesOptions, AtariOptions, DigitsOptions):
        store_schema("data", f"schema_{options.name}", options)


def register_pretrained() -> None:
    """Register the schemas of conf/pretrained/: what `tokenizer=` chooses where no tokenizer is trained."""
    from vidtok.options import CosmosOptions, PretrainedOptions

    store_schema("pretrained", "schema", PretrainedOptions)
    store_schema("pretrained", "schema_cosmos", CosmosOptions)


def build_options(cls: type[Options], values: Mapping[str, Any]) -> Options:
    """Build an options dataclass, and those nested in it, from the plain dictionary that an entry receives."""
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if name in values:
            is_nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
            given[name] = build_options(hint, values[name]) if is_nested else values[name]
    return cls(**given)


def _copy_of_fields(cls: type, left_out: frozenset[str] = frozenset()) -> type:
    own = [option for option in dataclasses.fields(cls) if option.name not in left_out]
    hints = get_type_hints(cls) if any(isinstance(option.type, str) for option in own) else {}
    copies: list[tuple[str, Any, Any]] = []
    for option in own:
        hint, default = hints.get(option.name, option.type), _default_of(option)
        # OmegaConf makes a frozen dataclass read-only, also one inside another.
        if dataclasses.is_dataclass(hint):
            hint, default = _nested_copy(hint, default)
        copies.append((option.name, hint, default))
    return dataclasses.make_dataclass(cls.__name__, copies)


def _default_of(option: dataclasses.Field[Any]) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=option.default_factory)
    return dataclasses.field(default=MISSING if option.default is dataclasses.MISSING else option.default)


def _nested_copy(cls: Any, default: Any) -> tuple[type, Any]:
    copy = _copy_of_fields(cls)
    given = default.default if default.default_factory is dataclasses.MISSING else default.default_factory()
    if not dataclasses.is_dataclass(given):
        return copy, dataclasses.field(default=given)
    return copy, dataclasses.field(default_factory=lambda: _converted(given, copy))


def _converted(given: Any, copy: Any) -> Any:
    values = {}
    for option in dataclasses.fields(copy):
        value = getattr(given, option.name)
        values[option.name] = _converted(value, option.type) if dataclasses.is_dataclass(value) else value
    return copy(**values)
