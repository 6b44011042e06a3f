"""Names of trained weights: hashes that change when what they name changes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vidtok.config import TRAINING_ONLY

# Those of the first format. An option that came later counts where it differs from its default, which means what was before it:
# so a model of then keeps its name.
_FIRST_OPTIONS = {
    *("model_type", "format_version", "stride_t", "stride_s", "patch_s", "width", "channel_multipliers", "encoder_kernel"),
    *("encoder_blocks", "decoder_blocks", "quantizer", "fsq_levels", "codebook_size", "codebook_dim", "vq_decay"),
    *("vq_kmeans_init", "commitment_weight", "dead_code_ratio"),
}
# The decoder's, and what only says how to train; an option that is not named here counts.
_WITHOUT_EFFECT_ON_INDICES = {"decoder_blocks", "temporal_decoder"} | TRAINING_ONLY


def fingerprint(model: PreTrainedModel) -> str:
    """Give 16 hex digits that name a model's weights and architecture."""
    return _digest(model, dict(model.state_dict()), set())


def encoder_fingerprint(model: PreTrainedModel) -> str:
    """Give 16 hex digits that name what decides over indices: encoder and codebook, not the decoder."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}
    return _digest(model, weights, _WITHOUT_EFFECT_ON_INDICES)


def _digest(model: PreTrainedModel, weights: dict[str, Tensor], left_out: set[str]) -> str:
    inherited = {option.name for option in fields(PreTrainedConfig)}
    defaults = {option.name: option.default for option in fields(type(model.config)) if option.name not in inherited}
    own = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name in _FIRST_OPTIONS or (name in defaults and value != defaults[name])
    }
    return hash_weights({name: value for name, value in own.items() if name not in left_out}, weights)


def hash_weights(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Give 16 hex digits of SHA-256 over the options (sorted JSON) and every weight (name and bytes, sorted by name)."""
    digest = hashlib.sha256()
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
