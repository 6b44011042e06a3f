"""Where a transformer's training begins: at random weights, or at those of a trained one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vidgpt.config import DEFAULT_WINDOW, VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import TrainGPTOptions
from vidtok.card import Card, check_cards
from vidtok.folders import load_model, model_folder
from vidtok.runner import Runner
from vidtok.tokens import longest_row

# Training may go on with another value: every weight of the transformer itself fits all of them.
CHANGEABLE = frozenset(
    {"window", "attention_frames", "sink_frames", "attention_dropout", "loss_chunk", "use_cache", "draft_head"}
)


def build_gpt(runner: Runner, options: TrainGPTOptions, card: Card, model: Mapping[str, Any]) -> VidGPTForCausalLM:
    """Build the transformer to train: of the keys of model=, or of init_from with its weights. Its config notes how it is trained.

    model: with init_from only the keys that the user chose. A resumed run does not read init_from again: its weights come from the
    checkpoint, its architecture from what the first start noted. Raises ValueError for a key that contradicts init_from's network, and
    for other tokens than it was trained on.
    """
    if options.init_from is None:
        return VidGPTForCausalLM(noted(config_for(card, with_window(options, model), options.use_actions), options))
    if runner.is_resumed:
        config = noted(VidGPTConfig.from_dict(json.loads(runner.first_value("architecture", ""))), options)
        return _frozen(VidGPTForCausalLM(config), options)
    trained = _load(options, card)
    _check_same_architecture(trained.config, model, options.init_from)
    if options.use_actions != bool(trained.config.num_actions):
        raise ValueError(
            f"use_actions={str(options.use_actions).lower()}, but the transformer of init_from={options.init_from} knows "
            f"{trained.config.num_actions} actions: set it to {str(not options.use_actions).lower()}, or train without init_from"
        )
    changes = {key: value for key, value in model.items() if key in CHANGEABLE and value is not None}
    window = with_window(options, changes, default=trained.config.window)
    config = noted(VidGPTConfig.from_dict(trained.config.to_diff_dict() | window), options)
    if options.train_only and model.get("draft_head") is False:
        raise ValueError("train_only=draft_head trains a head that model.draft_head=false leaves out: leave one of them away")
    if options.train_only:
        config.draft_head = True
    network = VidGPTForCausalLM(config)
    missing, unexpected = network.load_state_dict(trained.state_dict(), strict=False)
    # A draft head may be new, or left out; load_model has seen that nothing else is amiss.
    assert all(key.startswith("draft_head.") for key in (*missing, *unexpected))
    runner.first_value("architecture", json.dumps(config.to_diff_dict()))
    return _frozen(network, options)


def _frozen(network: VidGPTForCausalLM, options: TrainGPTOptions) -> VidGPTForCausalLM:
    """Leave only what train_only names to be trained."""
    if options.train_only:
        network.requires_grad_(False)
        assert network.draft_head is not None
        network.draft_head.requires_grad_(True)
    return network


def config_for(card: Card, model: Mapping[str, Any], use_actions: bool = False) -> VidGPTConfig:
    """Join a preset with what the tokens' card decides. Raises ValueError for actions that were not recorded."""
    if use_actions and not card.num_actions:
        raise ValueError(
            "use_actions=true, but these tokens carry no actions: encode data that records them, or set use_actions=false"
        )
    return VidGPTConfig(
        **{**model, "factors": model.get("factors") or card.codebook_factors or None},
        codebook_size=card.codebook_size,
        grid_height=card.grid_height,
        grid_width=card.grid_width,
        num_actions=card.num_actions if use_actions else 0,
    )


def noted(config: VidGPTConfig, options: TrainGPTOptions) -> VidGPTConfig:
    """Note in a config how this run trains; what an earlier training showed the network, and this one does not, stays noted."""
    if options.action_dropout:
        config.action_dropout = float(options.action_dropout)
    if options.diagonal.share:
        plan = options.diagonal
        config.diagonal_share, config.diagonal_window, config.diagonal_delay = float(plan.share), plan.window, plan.delay
    return config


def with_window(options: TrainGPTOptions, model: Mapping[str, Any], default: int = DEFAULT_WINDOW) -> dict[str, Any]:
    """Choose the window where the user did not. Raises ValueError for one that no clip fills."""
    longest = longest_row(options.tokens, "train")
    if longest < 2:
        raise ValueError(
            f"the training clips of {options.tokens} have one latent frame, and nothing to predict: encode longer clips"
        )
    window = model.get("window") or min(default, longest)
    if window > longest:
        raise ValueError(
            f"model.window={window} latent frames, but the longest training clip of {options.tokens} has {longest}: "
            f"use model.window={longest} or less, or encode longer clips"
        )
    return {**model, "window": window}


def _load(options: TrainGPTOptions, card: Card) -> VidGPTForCausalLM:
    """Load init_from, once its card is seen to be that of the tokens."""
    try:
        folder = model_folder(str(options.init_from), VidGPTConfig.model_type)
        check_cards(Card.load(folder), str(options.init_from), card, options.tokens)
        return load_model(VidGPTForCausalLM, folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init_from: {error}") from error


def _check_same_architecture(found: VidGPTConfig, given: Mapping[str, Any], folder: str) -> None:
    """Raise ValueError for the first given key of the network that the trained one has otherwise; null says nothing."""
    for key, value in given.items():
        if key not in CHANGEABLE and value is not None and value != getattr(found, key):
            raise ValueError(
                f"model.{key}={value}, but the transformer of init_from={folder} has {key}={getattr(found, key)}: "
                "leave model= out to go on with its architecture, or init_from= to train another one"
            )
