"""VidGPTForCausalLM: a decoder-only transformer over the tokens of a clip.

Unusual: rotary phases over (t, h, w) computed from the plain 1-D position, queries aligned to the position they predict, and a
learned embedding of the slot within the frame, because a place's law may depend on where it is (a lane, the sky) and, where an id
has several digits, on which of them is due.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vidgpt.attention import Attention, BranchEnd, RMSNorm, RotaryPhases
from vidgpt.cache import SlotCache
from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout
from vidgpt.loss import place_cross_entropy
from vidgpt.masks import build_mask, causal


class MLP(nn.Module):
    """SwiGLU. Source: arXiv:2002.05202."""

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__()
        width = int(config.intermediate_size or 0)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = BranchEnd(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep the shape (B, L, D)."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VidGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """Keep the shape (B, L, D); attention: what Attention.forward takes."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class VidGPTPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = VidGPTConfig
    config: VidGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for leaves only: transformers passes over a module without weights of its own.
        if isinstance(module, nn.Linear | nn.Embedding):
            # Residual branches start small so that depth does not change the scale (GPT-2).
            shrink = (2 * self.config.num_hidden_layers) ** 0.5 if isinstance(module, BranchEnd) else 1.0
            nn.init.normal_(module.weight, std=self.config.initializer_range / shrink)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RotaryPhases):
            module.refill()


class VidGPTModel(VidGPTPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__(config)
        self.layout = TokenLayout.from_config(config)
        self.embed_tokens = nn.Embedding(self.layout.vocab_size, config.hidden_size)
        self.embed_slots = nn.Embedding(self.layout.tokens_per_frame, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryPhases(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Give last_hidden_state (B, L, D) of input_ids (B, L).

        position_ids: (B, L) or (L,), counted on from the cache by default. attention_mask: (B, keys), 0 hides a position.
        Raises ValueError past the window, and for given positions outside it.
        """
        if use_cache and past_key_values is None:
            past_key_values = SlotCache(self.config.num_hidden_layers, int(self.config.max_position_embeddings or 0))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = self._positions(input_ids, position_ids, past)
        mask = self._mask(attention_mask, positions, past)
        query_phases, key_phases = self.rotary(positions + 1), self.rotary(positions)
        hidden_states = self._embed(input_ids) + self.embed_slots(positions % self.layout.tokens_per_frame)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                query_phases=query_phases,
                key_phases=key_phases,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Give the embedding (B, L, D) of input_ids (B, L); an id that holds several digits has the sum of theirs."""
        if not self.layout.is_parallel:
            return self.embed_tokens(input_ids)
        rows, is_lead = self.layout.embedding_rows(input_ids)
        # Digit by digit: all at once would take Q times the memory.
        summed = reduce(torch.add, map(self.embed_tokens, rows.unbind(-1)))
        return torch.where(is_lead[..., None], self.embed_tokens(rows[..., 0]), summed)

    def _positions(self, input_ids: Tensor, position_ids: Tensor | None, past: int) -> Tensor:
        size = int(self.config.max_position_embeddings or 0)
        if position_ids is not None:
            # Only here the values must be looked at, which waits for a GPU.
            low, high = torch.stack(torch.aminmax(position_ids)).tolist()
            if low < 0 or high >= size:
                raise ValueError(
                    f"position_ids from {low} to {high} do not fit the window of {self.config.window} frames (0 to {size - 1}): "
                    "give fewer context frames, predict fewer, or train with a larger model.window"
                )
            return position_ids.expand(input_ids.shape)
        end = past + input_ids.shape[1]
        if end > size:
            raise ValueError(
                f"{end} tokens do not fit the window of {self.config.window} frames ({size} tokens): "
                "give fewer context frames, predict fewer, or train with a larger model.window"
            )
        return torch.arange(past, end, device=input_ids.device).expand(input_ids.shape)

    def _mask(self, attention_mask: Tensor | None, positions: Tensor, past: int) -> Tensor | None:
        """None where SDPA's own causal flag, or a single query over a cache, is exact: its flag aligns top-left otherwise."""
        is_padded = attention_mask is not None and not bool(attention_mask.all())
        if not is_padded and (past == 0 or positions.shape[1] == 1):
            return None
        queries = torch.arange(past, past + positions.shape[1], device=positions.device).expand(positions.shape)
        keys = torch.arange(past + positions.shape[1], device=positions.device).expand(positions.shape[0], -1)
        mask = build_mask(causal, queries, keys)
        if is_padded and attention_mask is not None:
            # A row that may attend nothing would be NaN: every token keeps itself.
            mask = (mask & attention_mask[:, None, None, :].bool()) | build_mask(torch.eq, queries, keys)
        return mask


class VidGPTForCausalLM(VidGPTPreTrainedModel, GenerationMixin):
    """VidGPTModel and a head over the vocabulary; logits at p are for position p + 1."""

    edge_layers = ("embed_tokens", "embed_slots", "lm_head")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__(config)
        self.model = VidGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, self.model.layout.num_logits, bias=False)
        self.post_init()
        # Without top_k = 0 transformers keeps only the 50 likeliest ids; it accepts the key in a sampling config alone.
        self.generation_config.do_sample, self.generation_config.top_k = True, 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Give logits (B, L or logits_to_keep, V), or, when labels (B, L) are given, the loss alone: a scalar in nats a place.

        V is the layout's num_logits; TokenLayout.due_logits cuts out those of each digit. Labels are ids at their own places (they
        are shifted here) and IGNORED where nothing is to be learned.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            loss = place_cross_entropy(hidden_states, self.lm_head.weight, labels, self.model.layout, self.config.loss_chunk)
            return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue sequences with transformers' generate; needs vidgpt.sampling.LayoutLogitsProcessor.

        Raises ValueError for digits=parallel, whose logits are no distribution over ids.
        """
        if self.model.layout.is_parallel:
            raise ValueError(
                "generate draws one id from one distribution, but a model of digits=parallel predicts several digits at once: "
                "use Predictor or vidgpt.rollout.stream_tokens, or train with model.digits=slots"
            )
        return super().generate(*args, **kwargs)
