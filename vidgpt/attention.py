"""Causal self-attention with rotary phases over (t, h, w).

Unusual: a query carries the phases of the position it predicts, the next one, and a key those of its own. So "the same place one
frame ago" is one constant offset for every token, also at the end of a row.
Travels with exported models (vidgpt.exporting), and keeps what an engine such as vLLM asks of a model that it serves.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout


class BranchEnd(nn.Linear):
    """The last layer of a residual branch, whose start is scaled down with depth."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32. Source: arXiv:1910.07467."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep shape and dtype."""
        return F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps).to(hidden_states.dtype)


class RotaryPhases(nn.Module):
    """Table of (cos, sin) for every position of the window; bands of the head are dealt to t, h, w in turn. Source: arXiv:2104.09864."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__()
        self.config = config
        shape = (int(config.max_position_embeddings or 0) + 1, int(config.head_dim or 0) // 2)
        self.register_buffer("cos", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(shape, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the table with the weights, but leave it fp32 where these become bf16, which would round its angles."""
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
            self.refill()
        return self

    def refill(self) -> None:
        """Compute the table; loading a model leaves it uninitialised."""
        cos, sin = self.compute(torch.arange(len(self.cos), device=self.cos.device))
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def forward(self, position_ids: Tensor, is_beyond: bool = False) -> tuple[Tensor, Tensor]:
        """Give cos and sin, each (B, 1, L, head_dim / 2), fp32. is_beyond: positions may lie behind the window."""
        cos, sin = self.compute(position_ids) if is_beyond else (self.cos[position_ids], self.sin[position_ids])
        return cos[:, None], sin[:, None]

    def compute(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Give cos and sin, each (..., head_dim / 2), fp32, of any positions (...): the table's values, and those behind it."""
        # Angles in fp64: a day of video is millions of radians, which fp32 knows to a quarter. Apple's GPUs have no fp64.
        device, near = position_ids.device, "cpu" if position_ids.device.type == "mps" else position_ids.device
        axes = TokenLayout.from_config(self.config).coordinates(position_ids.to(near))
        band = torch.arange(self.cos.shape[1], device=near)
        bands_per_axis = -(-len(band) // 3)
        frequency = self.config.rope_theta ** (-(band // 3).double() / bands_per_axis)
        angle = torch.stack(axes, dim=-1).double()[..., band % 3] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(states: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (first half, second half) of states (B, heads, L, head_dim)."""
    cos, sin = phases
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)


class Attention(nn.Module):
    """Multi-head attention; several query heads may share a key head (arXiv:2305.13245), queries and keys are normed."""

    is_causal = True

    def __init__(self, config: VidGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = int(config.head_dim or 0)
        heads, groups = config.num_attention_heads, int(config.num_key_value_heads or 1)
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=False)
        self.o_proj = BranchEnd(heads * self.head_dim, config.hidden_size, bias=False)
        norm = RMSNorm if config.use_qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(self.head_dim, config.rms_norm_eps), norm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        query_phases: tuple[Tensor, Tensor],
        key_phases: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix hidden_states (B, L, D); attention_mask: (B, 1, L, keys) True = may attend, None = causal.

        kwargs go on to the attention function: an engine hands over its own state there.
        """
        # Called one by one, and heads counted from the result: an engine joins the three matrices, or keeps a part of the heads.
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        query, key, value = (states.transpose(1, 2) for states in (self.q_norm(query), self.k_norm(key), value))
        query, key = rotate(query, query_phases), rotate(key, key_phases)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        # (B, L, heads, head_dim), or as vLLM gives it (L, heads * head_dim).
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1))
