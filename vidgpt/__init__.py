"""Causal GPT over video tokens: the next frame's tokens from those before it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgpt.config import VidGPTConfig
    from vidgpt.model import VidGPTForCausalLM
    from vidgpt.rollout import Predictor

__all__ = ["Predictor", "VidGPTConfig", "VidGPTForCausalLM"]

_HOMES = {"Predictor": "vidgpt.rollout", "VidGPTConfig": "vidgpt.config", "VidGPTForCausalLM": "vidgpt.model"}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vidgpt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
