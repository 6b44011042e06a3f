"""The protocol of a published benchmark: what conf/experiment/ lets nobody change under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidtok.page_parts import leaves

GIVEN = "*"  # in place of a value: the user's own, but there must be one


def check_protocol(config: Mapping[str, Any]) -> None:
    """Raise ValueError, in one sentence that names every key with both its values, where a configuration contradicts its protocol.

    config: of vidgpt-demo, whose "protocol" holds keys of its own that must have the values there, or any value where that is GIVEN.
    """
    wanted = dict(leaves(config["protocol"]))
    missing = [key for key, value in wanted.items() if value == GIVEN and not _found(config, key)]
    if missing:
        raise ValueError(
            f"experiment={config['experiment']} needs {' and '.join(missing)}, since its held-out videos are fixed: give "
            f"{' '.join(f'{key}=PATH' for key in missing)}, or experiment=own, which holds out a part of what it is given"
        )
    differing = [
        f"{key}={_found(config, key)} (it has {value})"
        for key, value in wanted.items()
        if value not in (GIVEN, _found(config, key))
    ]
    if differing:
        raise ValueError(
            f"{', '.join(differing)} contradicts the protocol of experiment={config['experiment']}: leave it away, or give "
            "experiment=own and your keys, so that nobody takes the figures for those of the benchmark"
        )


def _found(config: Mapping[str, Any], key: str) -> Any:
    """Give the value of a key such as data.size; None where there is no such key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
