"""A trained transformer's folder, loaded with its card, and whether what is beside it belongs to it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidtok.card import Card, check_cards
from vidtok.folders import load_model, model_folder


def load_checkpoint(path: str | Path, tokens: str | None = None) -> tuple[VidGPTForCausalLM, Card]:
    """Load a run folder or model folder; gives the transformer and its card.

    tokens: a token dataset on which it is to be tried. Raises FileNotFoundError or ValueError for a folder that cannot be loaded, and for
    tokens of another tokenizer, or without the actions that the model knows.
    """
    folder = model_folder(path, VidGPTConfig.model_type)
    model, card = load_model(VidGPTForCausalLM, folder), Card.load(folder)
    check_model(card, model.config, str(folder))
    if tokens is not None:
        found = Card.load(tokens)
        if not model.config.num_actions:
            found = replace(found, num_actions=card.num_actions)  # nobody looks at them
        check_cards(card, f"the checkpoint {path}", found, f"the tokens {tokens}")
    return model, card


def check_model(card: Card, config: VidGPTConfig, name: str) -> None:
    """Raise ValueError when a transformer's config does not fit the card beside it; name: its folder."""
    keys = ("codebook_size", "grid_height", "grid_width")
    # A model trained with use_actions=false knows none, whatever the tokens record.
    check_fields(card, config, (*keys, "num_actions") if config.num_actions else keys, "its config.json has", name)


def check_fields(card: Card, sizes: object, keys: Sequence[str], owner: str, name: str) -> None:
    """Raise ValueError for the first of the keys that the card of folder `name` has otherwise; owner: whose sizes these are."""
    for key in keys:
        ours, theirs = getattr(sizes, key), getattr(card, key)
        if ours != theirs:
            raise ValueError(f"{name} has {key}={theirs} in its card.json, but {owner} {key}={ours}: copy or train it again")
