"""The transformer's options: the only home of their defaults. Travels with exported models (vidgpt.exporting)."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from vidtok.digits import check_factors

# Fields that the tokens' card decides; a user never sets them.
FIELDS_FROM_CARD = ("codebook_size", "grid_height", "grid_width", "num_actions", "vocab_size", "max_position_embeddings")
# Fields in which training notes what it showed the network; no user's to set either.
FIELDS_FROM_TRAINING = ("action_dropout", "diagonal_share", "diagonal_window", "diagonal_delay")

DEFAULT_WINDOW = 24
DIGITS = ("slots", "parallel")
# Beyond it one table of embeddings would take tens of gigabytes.
LARGEST_VOCABULARY = 1 << 24


@strict
class VidGPTConfig(PreTrainedConfig):
    """Options of VidGPTForCausalLM.

    window: latent frames that fit (context and future together); 0 is 24, or in training the longest clip where that is shorter.
    attention_frames: newest frames that each token sees, its own included, so that a sequence may be longer than the window; 0 is all.
    sink_frames: the first so many frames of a sequence stay visible to all. Their distance grows beyond what training showed.
    factors: an id of a large codebook as digits, coarsest first; [512,512] for 2**18 ids. null takes the tokenizer's own codebooks.
    digits: slots predicts the digits of a place one after the other, parallel all at once: fewer tokens, but independent digits.
    rope_theta: base of the rotary phases; small, because the axes are short. loss_chunk: logits (tokens x vocabulary) held at once
    by the loss. draft_head: also learn to guess each token a frame before it is due, which decoding=speculative verifies: the same
    tokens, sooner. action_dropout, diagonal_*: how it was trained, as the keys of vidgpt-train say it; 0 where it was not.
    """

    model_type = "vidgpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_slots": (["position_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    format_version: int = 1
    codebook_size: int = 1000
    grid_height: int = 8
    grid_width: int = 8
    num_actions: int = 0
    factors: list[int] | None = None
    digits: str = "slots"
    window: int = 0
    attention_frames: int = 0
    sink_frames: int = 0
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    use_qk_norm: bool = True
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    loss_chunk: int = 33_554_432
    draft_head: bool = False
    action_dropout: float = 0.0
    diagonal_share: float = 0.0
    diagonal_window: int = 0
    diagonal_delay: int = 0

    def __post_init__(self, **kwargs: object) -> None:
        """Derive what depends on other fields."""
        # Two special ids (first-frame lead, frame separator) follow the picture ids, then the actions: vidgpt.layout.
        self.window = self.window or DEFAULT_WINDOW
        self.factors = self.factors or [self.codebook_size]
        self.vocab_size = sum(self.factors) + 2 + self.num_actions
        slots_per_place = len(self.factors) if self.digits == "slots" else 1
        self.max_position_embeddings = self.window * (self.grid_height * self.grid_width * slots_per_place + 1)
        if self.num_attention_heads > 0:
            self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        # 8/3 keeps SwiGLU at the parameter count of a 4x MLP (arXiv:2002.05202); rounded for the hardware.
        self.intermediate_size = self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the rules across fields."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads or 1
        least = {"num_hidden_layers": 1, "hidden_size": 1, "intermediate_size": 1, "loss_chunk": 1, "codebook_size": 2}
        for name, value in least.items():
            if (getattr(self, name) or 0) < value:
                raise ValueError(f"{name}={getattr(self, name)} is below {value}: give a whole number of {value} or more")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is no probability below 1: 0 is off, 0.1 is usual")
        if self.rope_theta <= 1 or self.rms_norm_eps <= 0 or self.initializer_range <= 0:
            raise ValueError(
                f"rope_theta={self.rope_theta} must be above 1, rms_norm_eps={self.rms_norm_eps} and "
                f"initializer_range={self.initializer_range} above 0: leave them at their defaults unless you know why"
            )
        self._validate_digits(self.factors or [])
        if self.window < 2:
            raise ValueError(f"window={self.window} leaves nothing to predict: use 2 frames or more")
        self._validate_attention_frames()
        if heads < 1 or self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={heads}: change one of them")
        if groups < 1 or heads % groups:
            raise ValueError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}: change one of them")
        if (self.head_dim or 0) < 8 or (self.head_dim or 0) % 2:
            raise ValueError(f"head_dim={self.head_dim} cannot carry three rotary axes: it must be even and 8 or more")

    def _validate_attention_frames(self) -> None:
        if not 0 <= self.attention_frames <= self.window:
            raise ValueError(
                f"attention_frames={self.attention_frames} is not from 0 (all frames) to window={self.window}, the most that training "
                "shows: lower it or raise window"
            )
        if self.sink_frames < 0 or (self.sink_frames and not self.attention_frames):
            raise ValueError(
                f"sink_frames={self.sink_frames} keeps frames visible that attention_frames={self.attention_frames} would hide: "
                "give 0 or more, and above 0 only with an attention_frames above 0"
            )

    def _validate_digits(self, factors: list[int]) -> None:
        if self.digits not in DIGITS:
            raise ValueError(f"digits={self.digits!r} is not one of {', '.join(DIGITS)}: choose one of these")
        check_factors(factors)
        if min(factors) < 2 or math.prod(factors) != self.codebook_size:
            raise ValueError(
                f"factors={factors} multiply to {math.prod(factors)}, the tokens have a codebook_size of {self.codebook_size} ids: "
                "give factors of 2 or more whose product is that, or null for the tokenizer's own"
            )
        if sum(factors) > LARGEST_VOCABULARY:
            raise ValueError(
                f"factors={factors} need an embedding of {sum(factors)} rows, {LARGEST_VOCABULARY} are allowed: "
                "give more and smaller factors, as model.factors=[512,512] for 2**18 ids"
            )
        if self.tie_word_embeddings and self.digits == "parallel" and len(factors) > 1:
            raise ValueError(
                "tie_word_embeddings=true and digits=parallel exclude each other, because the head has no leads to predict: "
                "set one of them back"
            )
