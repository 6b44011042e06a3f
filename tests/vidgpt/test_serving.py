"""The contract of engines that serve transformers' models, against a stand-in in small of what vLLM's back end does with one."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vidgpt.config import VidGPTConfig
from vidgpt.model import DecoderLayer, VidGPTForCausalLM, VidGPTModel

VARIANTS = [{}, {"num_key_value_heads": 2}, {"num_actions": 3}, {"tie_word_embeddings": True}, {"factors": [4, 5]}]
AutoModel.register(VidGPTConfig, VidGPTModel, exist_ok=True)


class PagedAttention:
    """One layer's attention over keys and values that it keeps itself, a list a request."""

    def __init__(self) -> None:
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.scale, self.heads, self.groups = 0.0, 4, 4
        self.batch: list[tuple[str, int]] = []  # which request, and how many of its tokens, lie behind each other

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = []
        counts = [count for _, count in self.batch]
        for (request, count), *states in zip(self.batch, *(part.split(counts) for part in (query, key, value)), strict=True):
            pages = self.kept.setdefault(request, [])
            pages.append((states[1], states[2]))
            keys, values = (torch.cat(part).unflatten(-1, (self.groups, -1)) for part in zip(*pages, strict=True))
            keys, values = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", states[0].unflatten(-1, (self.heads, -1)), keys) * self.scale
            hidden = torch.ones(count, len(keys), dtype=torch.bool).tril(len(keys) - count).logical_not()
            mixed.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values).flatten(1))
        return torch.cat(mixed)


def engine_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, PagedAttention] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hand (1, heads, L, head_dim) over as (L, heads * head_dim), and give the same back, without a batch, as vLLM does."""
    assert attention_instances is not None and scaling is not None
    instance = attention_instances[module.layer_idx]
    instance.scale = scaling
    query, key, value = (states.transpose(1, 2).reshape(states.shape[2], -1) for states in (query, key, value))
    return instance.forward(query, key, value), None


ALL_ATTENTION_FUNCTIONS.register("engine", engine_attention)


class MissingLayer(nn.Module):
    """Stands on a stage for what lies on another: gives its first argument back."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build models whose parameters have no memory, but whose buffers do."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Engine:
    """Loads the base model and runs flattened batches of requests through it; the head is its own.

    Source: vllm/model_executor/models/transformers/base.py and causal.py.
    """

    def __init__(self, weights: dict[str, Tensor], config: VidGPTConfig, stage: int = 0, stages: int = 1) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "engine"
        with parameters_on_meta():
            self.model = AutoModel.from_config(config, dtype=torch.float32)
        assert self.model.is_backend_compatible() and self.model.get_decoder() is self.model
        self.model.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size))
        self.stage, self.stages = stage, stages
        self._keep_stage(config)
        self.model.load_state_dict(
            {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")},
            strict=stages == 1,
            assign=True,
        )
        self.instances = {index: PagedAttention() for index in range(config.num_hidden_layers)}
        for instance in self.instances.values():
            instance.heads, instance.groups = config.num_attention_heads, config.num_key_value_heads
        self.head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        assert self.head.shape == (config.vocab_size, config.hidden_size)

    def _keep_stage(self, config: VidGPTConfig) -> None:
        """Take away what the plan puts on other stages."""
        names = list(self.model._pp_plan)
        at = names.index("layers")
        kept = [index * self.stages // config.num_hidden_layers == self.stage for index in range(config.num_hidden_layers)]
        for index, is_kept in enumerate(kept):
            if not is_kept:
                self.model.layers[index] = MissingLayer()
        first, last = self.stage == 0, self.stage == self.stages - 1
        # With tied weights the last stage keeps all that lies before the layers, as vLLM has it.
        away = [] if first or (config.tie_word_embeddings and last) else names[:at]
        for name in [*away, *(names[at + 1 :] if not last else [])]:
            setattr(self.model, name, MissingLayer())

    @torch.no_grad()
    def run(self, batch: list[tuple[str, int]], ids: Tensor | None, positions: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Give the hidden states (L, D) of ids (L,) at positions (L,)."""
        for instance in self.instances.values():
            instance.batch = batch
        outputs = self.model(
            input_ids=None if ids is None else ids[None],
            inputs_embeds=None if hidden is None else hidden[None],
            use_cache=False,
            position_ids=positions if len(batch) == 1 else positions[None],
            attention_instances=self.instances,
            return_dict=False,
        )
        return outputs[0][0, ...]

    def logits(self, requests: dict[str, Tensor], ends: dict[str, list[int]]) -> dict[str, Tensor]:
        """Read every request in parts that end at `ends`, in steps with the others; gives all logits of each."""
        found: dict[str, list[Tensor]] = {name: [] for name in requests}
        for step in range(max(map(len, ends.values()))):
            spans = {name: (([0, *at])[step], at[step]) for name, at in ends.items() if step < len(at)}
            batch = [(name, end - start) for name, (start, end) in spans.items()]
            ids = torch.cat([requests[name][start:end] for name, (start, end) in spans.items()])
            positions = torch.cat([torch.arange(start, end) for start, end in spans.values()])
            parts = F.linear(self.run(batch, ids, positions), self.head).split([count for _, count in batch])
            for (name, _), part in zip(batch, parts, strict=True):
                found[name].append(part)
        return {name: torch.cat(parts) for name, parts in found.items()}


def both(model: VidGPTForCausalLM, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[int]]]:
    """Give two requests of different length, what the model says of them alone, and where their parts end."""
    size = ids.shape[1]
    requests = {"a": ids[0], "b": ids[1, : size - 5]}
    expected = {name: model(request[None]).logits[0] for name, request in requests.items()}
    return requests, expected, {"a": [9, 10, 11, size], "b": [1, size - 6, size - 5]}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_engine_that_keeps_keys_itself_gives_the_same_logits(options, make_model, make_ids) -> None:
    model = make_model(**options)
    requests, expected, ends = both(model, make_ids(model, frames=3))
    logits = Engine(model.state_dict(), model.config).logits(requests, ends)
    for name in requests:
        torch.testing.assert_close(logits[name], expected[name], atol=1e-5, rtol=0)


def without_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    given = VidGPTModel._positions
    monkeypatch.setattr(VidGPTModel, "_positions", lambda self, tokens, _, *rest: given(self, tokens, None, *rest))


def without_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedAttention, "scale", property(lambda self: 1.0, lambda self, value: None), raising=False)


@pytest.mark.parametrize("damage", [without_positions, without_scale])
def test_the_comparison_sees_what_is_ignored(damage: Callable, make_model, make_ids, monkeypatch) -> None:
    model = make_model()
    requests, expected, ends = both(model, make_ids(model, frames=3))
    damage(monkeypatch)
    logits = Engine(model.state_dict(), model.config).logits(requests, ends)
    assert not torch.allclose(logits["a"], expected["a"], atol=1e-2)


def test_a_model_that_keeps_an_engines_arguments_to_itself_fails(make_model, make_ids, monkeypatch) -> None:
    model, forward = make_model(), DecoderLayer.forward

    def deaf(self: DecoderLayer, hidden_states: Tensor, **attention: Any) -> Tensor:
        attention.pop("attention_instances")
        return forward(self, hidden_states, **attention)

    monkeypatch.setattr(DecoderLayer, "forward", deaf)
    with pytest.raises(AssertionError):
        Engine(model.state_dict(), model.config).logits({"a": make_ids(model)[0]}, {"a": [35]})


def test_frames_asked_for_one_at_a_time_are_those_of_generate(make_model, make_ids) -> None:
    model = make_model()
    layout, ids = model.model.layout, make_ids(model, frames=2)[:1]
    expected = model.generate(ids, max_new_tokens=2 * layout.tokens_per_frame, do_sample=False)
    engine, done, written = Engine(model.state_dict(), model.config), 0, ids[0]
    for _ in range(2):
        written = torch.cat([written, torch.tensor([layout.separator_id])])
        for _ in range(layout.slots_per_frame):
            states = engine.run([("a", len(written) - done)], written[done:], torch.arange(done, len(written)))
            done = len(written)
            written = torch.cat([written, F.linear(states[-1:], engine.head)[:, : layout.codebook_size].argmax(-1)])
    assert torch.equal(written, expected[0])


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=str)
def test_two_pipeline_stages_give_the_states_of_one(options, make_model, make_ids) -> None:
    model = make_model(**options)
    ids, batch = make_ids(model)[0], [("a", 35)]
    stages = [Engine(model.state_dict(), model.config, stage, 2) for stage in range(2)]
    assert not isinstance(stages[0].model.layers[0], MissingLayer) and isinstance(stages[0].model.norm, MissingLayer)
    hidden = stages[0].run(batch, ids, torch.arange(35))
    passed_on = stages[1].run(batch, None, torch.arange(35), hidden)
    whole = Engine(model.state_dict(), model.config).run(batch, ids, torch.arange(35))
    torch.testing.assert_close(passed_on, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(F.linear(whole, stages[1].head), model(ids[None]).logits[0], atol=1e-5, rtol=0)


class Shards(nn.Module):
    """A block whose matrices are cut as the plan says, each part on a machine of its own; their outputs are added."""

    def __init__(self, block: nn.Module, plan: dict[str, str], parts: int) -> None:
        super().__init__()
        self.shards = nn.ModuleList(copy.deepcopy(block) for _ in range(parts))
        for part, shard in enumerate(self.shards):
            for name, style in plan.items():
                linear = shard.get_submodule(name)
                linear.weight = nn.Parameter(linear.weight.chunk(parts, dim=0 if style == "colwise" else 1)[part])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([shard(*args, **kwargs) for shard in self.shards]).sum(0)


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}], ids=str)
def test_matrices_cut_by_the_plan_give_the_same_logits(options, make_model, make_ids) -> None:
    model = make_model(**options)
    plan = model.model.tp_plan
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    styles = {name: [style for pattern, style in plan.items() if re.fullmatch(pattern, name)] for name in linears}
    assert all(len(found) == 1 for found in styles.values())
    ids = make_ids(model)
    expected = model(ids).logits
    for number, layer in enumerate(model.model.layers):
        for block in ("self_attn", "mlp"):
            prefix = f"layers.{number}.{block}."
            cut = {name.removeprefix(prefix): found[0] for name, found in styles.items() if name.startswith(prefix)}
            setattr(layer, block, Shards(getattr(layer, block), cut, 2))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


def test_the_base_model_compiles_whole_with_given_positions(make_model, make_ids) -> None:
    model = make_model()
    ids = make_ids(model, frames=2)
    compiled = torch.compile(model.model, fullgraph=True, backend="eager", dynamic=True)
    states = compiled(ids, position_ids=torch.arange(14), use_cache=False).last_hidden_state
    torch.testing.assert_close(states, model.model(ids).last_hidden_state, atol=1e-5, rtol=0)


def test_a_window_that_an_engine_would_not_keep_is_refused(make_model, make_ids) -> None:
    model = make_model(attention_frames=2)
    with pytest.raises(ValueError, match="attention_frames=2 hides whole frames, and an engine"):
        Engine(model.state_dict(), model.config).run([("a", 35)], make_ids(model)[0], torch.arange(35))


def test_one_kind_of_input_is_asked_for(make_model, make_ids) -> None:
    body = make_model().model
    ids, states = torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 7, 48)
    with pytest.raises(ValueError, match="both input_ids and inputs_embeds came"):
        body(ids, inputs_embeds=states)
    with pytest.raises(ValueError, match="no input_ids and inputs_embeds came"):
        body()
