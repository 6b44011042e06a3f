"""Where a tokenizer's training begins: at random weights, or at those of a trained one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from vidtok.config import TRAINING_ONLY, VidTokConfig
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.options import TrainTokenizerOptions
from vidtok.runner import Runner


def build_tokenizer(runner: Runner, options: TrainTokenizerOptions, tokenizer: Mapping[str, Any]) -> VidTokModel:
    """Build the tokenizer to train: of the keys of tokenizer=, or of init_from with its weights.

    tokenizer: with init_from only the keys that the user chose; those that only say how to train replace init_from's. A resumed run
    does not read init_from again: its weights come from the checkpoint, its architecture from what the first start noted. Raises
    ValueError for a key that contradicts init_from's network.
    """
    if options.init_from is None:
        model = VidTokModel(VidTokConfig(**tokenizer))
    elif runner.is_resumed:
        model = VidTokModel(VidTokConfig.from_dict(json.loads(runner.first_value("architecture", ""))))
    else:
        model = _load(options.init_from)
        check_same_architecture(model.config, tokenizer, options.init_from)
        changes = {key: value for key, value in tokenizer.items() if key in TRAINING_ONLY}
        if changes:
            # A quantizer reads its options when it is built.
            weights, model = model.state_dict(), VidTokModel(VidTokConfig.from_dict(model.config.to_diff_dict() | changes))
            model.load_state_dict(weights)
        runner.first_value("architecture", json.dumps(model.config.to_diff_dict()))
    if options.train_only == "decoder":
        freeze_indices(model)
    return model


def _load(folder: str) -> VidTokModel:
    try:
        return load_model(VidTokModel, folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init_from: {error}") from error


def check_same_architecture(found: VidTokConfig, given: Mapping[str, Any], folder: str) -> None:
    """Raise ValueError for the first given key of the network that the trained tokenizer has otherwise; null says nothing."""
    # A whole preset may leave values to be derived, which its config then holds; single keys stand for themselves.
    is_whole = {"stride_t", "stride_s", "quantizer", "width"} <= set(given)
    asked = VidTokConfig(**given).to_dict() if is_whole else given
    for key in given:
        if key not in TRAINING_ONLY and asked[key] is not None and asked[key] != getattr(found, key):
            raise ValueError(
                f"tokenizer.{key}={asked[key]}, but the tokenizer of init_from={folder} has {key}={getattr(found, key)}: "
                "leave tokenizer= out to go on with its architecture, or init_from= to train another one"
            )


def freeze_indices(model: VidTokModel) -> None:
    """Let only the decoder learn: no index changes, neither by weights nor by a codebook that follows what it sees."""
    for module in (model.encoder, model.quantizer):
        module.requires_grad_(False).eval()


def last_weight(model: VidTokModel) -> nn.Parameter:
    """Give the weight of the decoder's last layer."""
    weight = model.decoder.conv_out.weight
    assert isinstance(weight, nn.Parameter)
    return weight
