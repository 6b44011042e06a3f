"""VidGPTForCausalLM: a decoder-only transformer over the tokens of a clip.

Unusual: rotary phases over (t, h, w) computed from the plain 1-D position, queries aligned to the position they predict, and a
learned embedding of the slot within the frame, because a place's law may depend on where it is (a lane, the sky) and, where an id
has several digits, on which of them is due.

Travels with exported models (vidgpt.exporting), so the modules of this file's closure import torch and transformers alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vidgpt.attention import Attention, BranchEnd, RMSNorm, RotaryPhases
from vidgpt.cache import SlotCache
from vidgpt.config import VidGPTConfig
from vidgpt.generation import LayoutLogitsProcessor
from vidgpt.layout import TokenLayout
from vidgpt.loss import place_cross_entropy
from vidgpt.masks import build_mask, causal, rule_of


class MLP(nn.Module):
    """SwiGLU. Source: arXiv:2002.05202."""

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__()
        width = int(config.intermediate_size or 0)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = BranchEnd(width, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()  # a module, because engines look for one between the matrices that they join

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep the shape (B, L, D)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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


def embed_ids(layout: TokenLayout, table: Callable[[Tensor], Tensor], input_ids: Tensor) -> Tensor:
    """Give the embedding (B, L, D) of input_ids (B, L) by a table of rows; an id that holds several digits has the sum of theirs."""
    if not layout.is_parallel:
        return table(input_ids)
    rows, is_lead = layout.embedding_rows(input_ids)
    # Digit by digit: all at once would take Q times the memory.
    summed = reduce(torch.add, map(table, rows.unbind(-1)))
    return torch.where(is_lead[..., None], table(rows[..., 0]), summed)


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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Give last_hidden_state (B, L, D) of input_ids (B, L), or of inputs_embeds (B, L, D): what the first layer reads, slots added.

        position_ids: (B, L) or (L,), counted on from the cache by default. attention_mask: (B, keys), 0 hides a position, or
        (B, 1, L, keys), True = may attend, as it is, with position_ids that are then not checked. kwargs go to the attention function;
        attention_instances among them marks an engine (vLLM) that keeps keys and positions itself: these are then not checked either.
        Raises ValueError past the window, and for given positions outside it, unless attention_frames is set: then any length will do.
        """
        given = self._check_inputs(input_ids, inputs_embeds, "attention_instances" in kwargs)
        if use_cache and past_key_values is None:
            past_key_values = SlotCache(self.config.num_hidden_layers, int(self.config.max_position_embeddings or 0))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        is_planned = attention_mask is not None and attention_mask.ndim == 4
        positions = self._positions(given, position_ids, past, is_planned, "attention_instances" in kwargs)
        mask = self._mask(attention_mask, positions, past, position_ids is not None)
        is_beyond = self.config.attention_frames > 0 and (position_ids is not None or past + given.shape[1] > self._size)
        query_phases, key_phases = self.rotary(positions + 1, is_beyond), self.rotary(positions, is_beyond)
        if inputs_embeds is None:
            inputs_embeds = self.embed(given) + self.embed_slots(positions % self.layout.tokens_per_frame)
        hidden_states = inputs_embeds
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

    def embed(self, input_ids: Tensor) -> Tensor:
        """Give the embedding (B, L, D) of input_ids (B, L)."""
        return embed_ids(self.layout, self.embed_tokens, input_ids)

    @property
    def _size(self) -> int:
        """Positions in a window."""
        return int(self.config.max_position_embeddings or 0)

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, is_served: bool) -> Tensor:
        """Give the one that came, of which the first two axes count here."""
        if is_served and self.config.attention_frames:
            raise ValueError(
                f"attention_frames={self.config.attention_frames} hides whole frames, and an engine's own attention would show them: "
                "generate with transformers or vidgpt, or train with model.attention_frames=0"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"{'no' if given is None else 'both'} input_ids and inputs_embeds came: give one of them")
        return given

    def _positions(
        self, given: Tensor, position_ids: Tensor | None, past: int, is_planned: bool, is_served: bool = False
    ) -> Tensor:
        size, is_endless = self._size, self.config.attention_frames > 0
        if position_ids is not None and is_planned:
            return position_ids
        if position_ids is not None and (is_served or torch.compiler.is_compiling()):
            return position_ids.expand(given.shape[:2])
        if position_ids is not None:
            # Only here the values must be looked at, which waits for a GPU.
            low, high = torch.stack(torch.aminmax(position_ids)).tolist()
            if low < 0 or (high >= size and not is_endless):
                raise ValueError(
                    f"position_ids from {low} to {high} do not fit the window of {self.config.window} frames (0 to {size - 1}): "
                    "give fewer context frames, predict fewer, or train with a larger model.window"
                )
            return position_ids.expand(given.shape[:2])
        end = past + given.shape[1]
        if end > size and not is_endless:
            raise ValueError(
                f"{end} tokens do not fit the window of {self.config.window} frames ({size} tokens): "
                "give fewer context frames, predict fewer, or train with a larger model.window"
            )
        return torch.arange(past, end, device=given.device).expand(given.shape[:2])

    def _mask(self, attention_mask: Tensor | None, positions: Tensor, past: int, is_given: bool) -> Tensor | None:
        """None where SDPA's own causal flag, or a single query over a cache, is exact: its flag aligns top-left otherwise.

        is_given: positions are the caller's, not slots. Those of cached keys then count on, over tokens that are not padding.
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            return attention_mask
        is_padded, end = attention_mask is not None and not bool(attention_mask.all()), past + positions.shape[1]
        window = self.config.attention_frames
        sees_all = not window or (end <= (window + self.config.sink_frames) * self.layout.tokens_per_frame and not is_given)
        if not is_padded and sees_all and (past == 0 or positions.shape[1] == 1):
            return None
        if not is_padded and not is_given:
            # All rows are alike.
            positions = positions[:1]
        slots = torch.arange(end, device=positions.device).expand(positions.shape[0], -1)
        if sees_all:
            mask = build_mask(causal, slots[:, past:], slots)
        else:
            counted = attention_mask.long().cumsum(dim=1) - 1 if is_padded and is_given and attention_mask is not None else slots
            earlier = counted[:, :past] + positions[:, :1] - counted[:, past : past + 1]
            mask = build_mask(rule_of(self.config), positions, torch.cat([earlier, positions], dim=1))
        if is_padded and attention_mask is not None:
            # A row that may attend nothing would be NaN: every token keeps itself.
            mask = (mask & attention_mask[:, None, None, :].bool()) | build_mask(torch.eq, slots[:, past:], slots)
        return mask


class DraftHead(nn.Module):
    """From what predicts a token to what predicts the token of that place one frame later: one residual block before the same lm_head.

    It begins as a copy of the token of now. Source: the heads of Medusa, arXiv:2401.10774, with the distance of a frame.
    """

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down_proj = BranchEnd(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep the shape (B, L, D)."""
        return hidden_states + self.down_proj(F.silu(self.up_proj(hidden_states)))


@dataclass
class VidGPTOutput(CausalLMOutputWithPast):
    """What transformers gives, and draft_loss: that of the draft head, a scalar in nats a place."""

    draft_loss: Tensor | None = None


class VidGPTForCausalLM(VidGPTPreTrainedModel, GenerationMixin):
    """VidGPTModel and a head over the vocabulary; logits at p are for position p + 1."""

    edge_layers = ("embed_tokens", "embed_slots", "lm_head")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VidGPTConfig) -> None:
        super().__init__(config)
        self.model = VidGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, self.model.layout.num_logits, bias=False)
        self.draft_head = DraftHead(config) if config.draft_head else None
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
        draft_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> VidGPTOutput:
        """Give logits (B, L or logits_to_keep, V), or, when labels (B, L) are given, the loss alone: a scalar in nats a place.

        V is the layout's num_logits; TokenLayout.due_logits cuts out those of each digit. Labels are ids at their own places (they
        are shifted here) and IGNORED where nothing is to be learned. draft_labels: those of the draft head, which are the ids a frame
        later, shifted likewise; nothing but that head learns from them (where gradients are clipped, their common norm counts it too).
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            loss = place_cross_entropy(hidden_states, self.lm_head.weight, labels, self.model.layout, self.config.loss_chunk)
            draft_loss = None if draft_labels is None else self.draft_loss(hidden_states, draft_labels)
            return VidGPTOutput(loss=loss, draft_loss=draft_loss, past_key_values=outputs.past_key_values)
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        return VidGPTOutput(logits=logits, past_key_values=outputs.past_key_values)

    def draft_loss(self, hidden_states: Tensor, draft_labels: Tensor) -> Tensor:
        """Give the loss of the draft head over the last hidden states (B, L, D), in nats a place; draft_labels as in forward."""
        if self.draft_head is None:
            raise ValueError("draft_labels came for a model without a draft head: train with model.draft_head=true")
        # Detached: guesses are there to be verified, and must not bend what verifies them.
        states, head = self.draft_head(hidden_states.detach()), self.lm_head.weight.detach()
        return place_cross_entropy(states, head, draft_labels, self.model.layout, self.config.loss_chunk)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        *args: Any,
        actions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue whole sequences (B, L) from position 0 with transformers' generate, which then writes only legal ids.

        actions: (B, t) up to the last frame to write, exactly where the model knows actions. See vidgpt.generation.
        Raises ValueError for digits=parallel, whose logits are no distribution over ids.
        """
        if self.model.layout.is_parallel:
            raise ValueError(
                "generate draws one id from one distribution, but a model of digits=parallel predicts several digits at once: "
                "use Predictor or vidgpt.rollout.stream_tokens, or train with model.digits=slots"
            )
        processors = LogitsProcessorList(logits_processor or ())
        if not any(isinstance(processor, LayoutLogitsProcessor) for processor in processors):
            processors.append(LayoutLogitsProcessor(self.model.layout, actions))
        return super().generate(inputs, generation_config, processors, *args, **kwargs)
