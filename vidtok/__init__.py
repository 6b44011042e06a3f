"""Causal VQ video tokenizer: frames to discrete tokens and back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidtok.config import VidTokConfig
    from vidtok.model import VidTokModel
    from vidtok.tokenizer import load_tokenizer
    from vidtok.video import read_video, write_video

__all__ = ["VidTokConfig", "VidTokModel", "load_tokenizer", "read_video", "write_video"]

_HOMES = {
    "VidTokConfig": "vidtok.config",
    "VidTokModel": "vidtok.model",
    "load_tokenizer": "vidtok.tokenizer",
    "read_video": "vidtok.video",
    "write_video": "vidtok.video",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vidtok' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
