"""Where clips come from: video files, Atari games, moving digits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vidtok.data import atari, digits, files
from vidtok.data.episodes import ClipDataset, Episode, EpisodeSet, Reject, write_rejects
from vidtok.data.options import AtariOptions, DigitsOptions, FilesOptions

__all__ = ["SOURCES", "ClipDataset", "Episode", "EpisodeSet", "Reject", "build_episodes", "write_rejects"]


SOURCES: dict[str, type[FilesOptions | AtariOptions | DigitsOptions]] = {
    "files": FilesOptions,
    "atari": AtariOptions,
    "digits": DigitsOptions,
}


def build_episodes(options: Mapping[str, Any]) -> EpisodeSet:
    """Build the episodes of the source named options["name"]: files, atari or digits.

    The other keys are the fields of that source's options; missing ones take their defaults.
    Raises ValueError for an unknown source, a wrong option, or data that cannot be used.
    """
    name = options.get("name")
    if name == "files":
        return files.build(FilesOptions(**_known(options, FilesOptions)))
    if name == "atari":
        return atari.build(AtariOptions(**_known(options, AtariOptions)))
    if name == "digits":
        return digits.build(DigitsOptions(**_known(options, DigitsOptions)))
    raise ValueError(f"The data source is {name!r}: it must be files, atari or digits.")


def _known(options: Mapping[str, Any], kind: type[FilesOptions | AtariOptions | DigitsOptions]) -> Mapping[str, Any]:
    names = [field.name for field in fields(kind)]
    for name in options:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(names)}."
            raise ValueError(f"data={options['name']} has no option {name!r}: {advice}")
    return options
