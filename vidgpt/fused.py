"""The transformer's forward pass with as few operations as it takes: what decoding plans run.

A pass of one token is too small for a machine to be busy with arithmetic: calls and copies cost more. So projections of one input are
one matrix, norms give their weights to the matrix behind them, and matrices lie as a product reads them. Same function as
VidGPTForCausalLM.forward, up to rounding; the weights are a copy.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgpt.cache import SlotCache, SlotLayer
from vidgpt.model import DecoderLayer, VidGPTForCausalLM, embed_ids
from vidgpt.recording import Forward, Record, RecordedPasses, cuda_graph, is_small
from vidtok.compiling import compiling


@dataclass(frozen=True)
class FusedLayer:
    """The matrices of one layer, (out, in), laid out in memory as (in, out); the norms in front are multiplied in."""

    queries_keys_values: Tensor
    head_norm: Tensor | None  # (heads + groups, head_dim), fp32
    mixed: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class FusedDraftHead:
    """The matrices of the draft head, laid out alike; scale (size,) is what the final norm multiplies by."""

    scale: Tensor
    up: Tensor
    down: Tensor
    head: Tensor  # the same as of the transformer, without the scale


@dataclass(frozen=True)
class Turns:
    """Rotary phases of queries and keys side by side, (B or 1, n, heads + groups, head_dim), fp32."""

    cos: Tensor
    sin: Tensor  # its first half negated, for halves that change places


class FusedModel:
    """A copy of a VidGPTForCausalLM's weights, in the form in which decoding reads them.

    dtype: of the weights and the cache; None takes the model's. use_compile: let torch.compile join what lies between the products of
    small passes; one that cannot be compiled on this machine raises ValueError.
    cache_layer: how a layer of new caches stores keys and values. record: how small passes are recorded (vidgpt.recording): None
    records them as CUDA graphs where a GPU runs what is compiled, and nowhere else.
    """

    def __init__(
        self,
        model: VidGPTForCausalLM,
        dtype: torch.dtype | None = None,
        use_compile: bool = False,
        cache_layer: type[SlotLayer] = SlotLayer,
        record: Record | None = None,
    ) -> None:
        config, body = model.config, model.model
        self.source, self.config, self.layout, self.body = model, config, body.layout, body
        self.device, self.dtype = model.device, dtype or model.dtype
        self.cache_layer = cache_layer
        self.heads, self.groups = config.num_attention_heads, int(config.num_key_value_heads or 1)
        self.is_grouped = self.heads != self.groups
        self.head_dim = int(config.head_dim or 0)
        self._floors = {
            size: torch.tensor((size * config.rms_norm_eps) ** 0.5, device=self.device)
            for size in (config.hidden_size, self.head_dim)
        }
        with torch.no_grad():
            self.layers = [self._fuse(cast(DecoderLayer, layer)) for layer in body.layers]
            self.head = self._matrix(model.lm_head.weight * _scale(body.norm))
            self.draft_head = None if model.draft_head is None else self._fuse_draft_head(model)
            self.embed_tokens, self.embed_slots = (part.weight.detach().clone() for part in (body.embed_tokens, body.embed_slots))
        # Whose phases the heads take: those of queries, then those of keys.
        self._kinds = torch.tensor([0] * self.heads + [1] * self.groups, device=self.device)
        # A table, because they are asked for in every pass; with a sliding window positions have no end.
        known = torch.arange(config.window * self.layout.tokens_per_frame, device=self.device)[None]
        self._phases = None if config.attention_frames else [part[0] for part in self._compute_phases(known)]
        self.is_compiled = use_compile
        self.record = cuda_graph if record is None and use_compile and self.device.type == "cuda" else record
        self._forward = self._compiled() if use_compile else self._layers
        self._run_small = self._run_recorded if self.record is not None else self._run_compiled if use_compile else None

    def new_cache(self, num_slots: int, batch: int, sink_slots: int = 0) -> SlotCache:
        """Make an empty cache for `batch` rows."""
        cache = SlotCache(len(self.layers), num_slots, sink_slots, layer_class=self.cache_layer)
        states = torch.empty(batch, self.groups, 0, self.head_dim, dtype=self.dtype, device=self.device)
        for layer in cache.layers:
            layer.lazy_initialization(states, states)
        return cache

    def _compiled(self) -> Forward:
        run = torch.compile(self._layers)

        def forward(hidden: Tensor, cos: Tensor, sin: Tensor, cache: SlotCache, mask: Tensor | None) -> Tensor:
            with compiling("transformer"):
                return run(hidden, cos, sin, cache, mask)

        return forward

    def _run_recorded(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: SlotCache, mask: Tensor | None) -> Tensor:
        if cache.recorded is None:
            assert self.record is not None
            cache.recorded = RecordedPasses(self._forward, self.record)
        return cast(RecordedPasses, cache.recorded)(cache, mask, hidden, cos, sin)

    def _run_compiled(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: SlotCache, mask: Tensor | None) -> Tensor:
        # Copies, because views of other strides and offsets would each be compiled anew.
        mask = None if mask is None else mask.clone(memory_format=torch.contiguous_format)
        return self._forward(hidden, cos.clone(), sin.clone(), cache, mask)

    def turns(self, positions: Tensor) -> Turns:
        """Give the phases for positions (B, n): a query turns by those of the position it predicts, a key by its own."""
        phases = self._compute_phases(positions) if self._phases is None else (table[positions] for table in self._phases)
        return Turns(*(part.index_select(2, self._kinds) for part in phases))

    def read(
        self,
        input_ids: Tensor,
        places: Tensor,
        turns: Turns,
        cache: SlotCache,
        mask: Tensor | None,
        is_causal: bool = False,
        keep: int = 1,
    ) -> Tensor:
        """Read input_ids (B, n) into the cache, inside cache.writing; gives the states (B, keep, D) of the last ones, for `logits`.

        places: (B or 1, n), the slot within the frame. mask: (B or 1, 1, n, slots read), 0 or -inf in the weights' dtype; None: all
        that is read may be attended, or, with is_causal, what does not come behind.
        """
        hidden = embed_ids(self.layout, self._token_rows, input_ids) + self.embed_slots[places]
        hidden, length = hidden.to(self.dtype), input_ids.shape[1]
        first = length - keep
        if self._run_small is not None and is_small(length) and not is_causal:
            # Few kinds of shapes are worth more here than a last layer for fewer tokens.
            return self._norm(self._run_small(hidden, turns.cos, turns.sin, cache, mask)[:, first:])
        kept = mask if mask is None else mask[:, :, first:]
        if is_causal and first:
            kept = self._causal_mask(length, first)
        return self._norm(self._layers(hidden, turns.cos, turns.sin, cache, mask, is_causal, first, kept))

    def logits(self, states: Tensor) -> Tensor:
        """Give the logits (B, n, num_logits) of what comes next, from states (B, n, D)."""
        return F.linear(states, self.head)

    def draft_logits(self, states: Tensor) -> Tensor:
        """Give the draft head's logits (B, n, num_logits) of what comes a frame behind that, from states (B, n, D)."""
        draft = self.draft_head
        assert draft is not None, "a model without a draft head"
        guessed = states * draft.scale + F.linear(F.silu(F.linear(states, draft.up)), draft.down)
        return F.linear(guessed, draft.head)

    def _token_rows(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.embed_tokens)

    def _causal_mask(self, length: int, first: int) -> Tensor:
        """Give the mask (1, 1, length - first, length) of the tokens from `first` on."""
        hidden = torch.ones(length - first, length, dtype=torch.bool, device=self.device).triu_(first + 1)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))[None, None]

    def _compute_phases(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Give the phases (B, n, 2, head_dim) of a query and of a key at positions (B, n); see Turns."""
        parts = [self.body.rotary(moved, self.config.attention_frames > 0) for moved in (positions + 1, positions)]
        cos, sin = (torch.stack(pair, dim=3)[:, 0] for pair in zip(*parts, strict=True))
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def _layers(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: SlotCache,
        mask: Tensor | None,
        is_causal: bool = False,
        first: int = 0,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Give the last layer's states of the tokens from `first` on, which `kept` masks; those before leave their keys alone there."""
        batch, length = hidden.shape[:2]
        turned, half = self.heads + self.groups, self.head_dim // 2
        for number, layer in enumerate(self.layers):
            states = F.linear(self._norm(hidden), layer.queries_keys_values).view(batch, length, -1, self.head_dim)
            pairs, value = states[:, :, :turned].float(), states[:, :, turned:]
            if layer.head_norm is not None:
                pairs = self._norm(pairs) * layer.head_norm
            pairs = torch.addcmul(pairs * cos, pairs.roll(half, -1), sin).to(hidden.dtype)
            query, key = pairs[:, :, : self.heads].transpose(1, 2), pairs[:, :, self.heads :].transpose(1, 2)
            key, value = cache.update(key, value.transpose(1, 2), number)
            if number == len(self.layers) - 1 and first:
                query, hidden, length, mask, is_causal = query[:, :, first:], hidden[:, first:], length - first, kept, False
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=self.is_grouped
            )
            hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), layer.mixed)
            gate, up = F.linear(self._norm(hidden), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        return hidden

    def _norm(self, states: Tensor) -> Tensor:
        """Norm of length 1 over the last axis, in fp32: a root-mean-square norm, but for its weights and sqrt(size), which they carry."""
        wide = states.float()
        # The length with the floor under it in three calls, where a mean of squares takes six.
        length = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), self._floors[states.shape[-1]])
        return (wide / length).to(states.dtype)

    def _fuse(self, layer: DecoderLayer) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        norm = None
        if self.config.use_qk_norm:
            norms = ((attention.q_norm, self.heads), (attention.k_norm, self.groups))
            norm = torch.cat([_scale(part).expand(count, -1) for part, count in norms]).float()
        projections = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        return FusedLayer(
            self._matrix(projections * _scale(layer.input_layernorm)),
            norm,
            self._matrix(attention.o_proj.weight),
            self._matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * _scale(layer.post_attention_layernorm)),
            self._matrix(mlp.down_proj.weight),
        )

    def _fuse_draft_head(self, model: VidGPTForCausalLM) -> FusedDraftHead:
        assert model.draft_head is not None
        scale = _scale(self.body.norm)
        return FusedDraftHead(
            scale.to(self.dtype),
            self._matrix(model.draft_head.up_proj.weight * scale),
            self._matrix(model.draft_head.down_proj.weight),
            self._matrix(model.lm_head.weight),
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().T.to(self.dtype, copy=True).contiguous().T


def _scale(norm: nn.Module) -> Tensor:
    """Give the weights (size,) of a root-mean-square norm times sqrt(size)."""
    weight = cast(Tensor, norm.weight)
    return weight * len(weight) ** 0.5
