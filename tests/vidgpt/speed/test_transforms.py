"""What is done to weights, and what it costs in nats."""

import math
import sys
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from vidgpt.evaluation import teacher_forced_scores
from vidgpt.fused import FusedModel
from vidgpt.int8 import Int8Layer
from vidgpt.model import VidGPTForCausalLM
from vidgpt.speed.transforms import (
    TeacherForced,
    Transforms,
    cache_bytes_per_position,
    cross_entropy,
    prune_,
    quantize_,
    weight_bytes,
)

MakeModel = Callable[..., VidGPTForCausalLM]
MakeIds = Callable[..., Tensor]


def layer_matrices(model: VidGPTForCausalLM) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.model.layers.named_parameters() if weight.ndim == 2}


def clips_of(model: VidGPTForCausalLM, make_ids: MakeIds, count: int = 2) -> list[tuple[Tensor, Tensor | None]]:
    layout = model.model.layout
    clips = []
    for seed in range(count):
        ids = make_ids(model, 2, 4, seed)
        leads = ids[:, :: layout.tokens_per_frame] - layout.separator_id - 1
        clips.append((layout.unflatten(ids), leads.clamp(min=0) if layout.num_actions else None))
    return clips


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1])
def test_exactly_the_smallest_weights_become_zero(share: float, make_model: MakeModel) -> None:
    model, before = make_model(), make_model()
    prune_(model, share)
    for (name, pruned), kept in zip(layer_matrices(model).items(), layer_matrices(before).values(), strict=True):
        count = round(share * kept.numel())
        expected = kept.numpy().copy().ravel()
        expected[np.argsort(np.abs(expected))[:count]] = 0.0
        np.testing.assert_array_equal(pruned.numpy().ravel(), expected, err_msg=name)
        assert int((pruned == 0).sum()) == count
    assert len(layer_matrices(model)) == 7 * model.config.num_hidden_layers
    matrices = {f"model.layers.{name}" for name in layer_matrices(model)}
    others = {name: weight for name, weight in before.state_dict().items() if name not in matrices}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.embed_slots.weight"} < others.keys()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in others.items())


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share: float, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"prune=.* is no share of the weights: give 0 \(none\) to 1 \(all\)"):
        prune_(make_model(), share)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_actions": 3}, {"attention_frames": 2, "sink_frames": 1}, {"num_key_value_heads": 2, "use_qk_norm": False}],
    ids=str,
)
def test_the_decoding_model_scores_as_the_transformer_itself(options: dict, make_model: MakeModel, make_ids: MakeIds) -> None:
    model = make_model(**options)
    fused, clips = FusedModel(model), clips_of(model, make_ids)
    ids = model.model.layout.flatten(*clips[0])
    torch.testing.assert_close(TeacherForced(fused)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    nats = [teacher_forced_scores(model, model.model.layout, *clip).nats for clip in clips]
    assert cross_entropy(fused, clips) == pytest.approx(float(torch.stack(nats).mean()), abs=1e-5)


def test_every_transform_that_rounds_or_forgets_shows_in_nats_and_leaves_the_model_alone(
    make_model: MakeModel, make_ids: MakeIds
) -> None:
    model = make_model()
    clips, before = clips_of(model, make_ids), {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = cross_entropy(Transforms().apply(model), clips)
    transforms = {"bf16": Transforms("bf16"), "int8": Transforms(cache_dtype="int8"), "prune": Transforms(prune=0.5)}
    changes = {name: abs(cross_entropy(each.apply(model), clips) - plain) for name, each in transforms.items()}
    assert 1e-6 < changes["bf16"] < 0.05 and 1e-6 < changes["int8"] < 0.05
    assert changes["prune"] > 0.01
    assert cross_entropy(Transforms().apply(model), clips) == plain
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_generate_gets_the_same_precision_and_zeros(make_model: MakeModel) -> None:
    model = make_model()
    reference = Transforms("bf16", prune=0.5, cache_dtype="int8").reference(model)
    assert reference.source.dtype == torch.bfloat16 and reference.cache_layer is not Int8Layer
    assert all((weight == 0).double().mean() >= 0.5 for weight in layer_matrices(reference.source).values())
    assert model.dtype == torch.float32 and all((weight != 0).all() for weight in layer_matrices(model).values())
    assert Transforms("bf16", cache_dtype="int8").apply(model).cache_layer is Int8Layer


def test_each_transform_has_a_turn_alone() -> None:
    assert Transforms().each() == {}
    every = Transforms("bf16", True, True, 0.25, "int8").each()
    assert every == {
        "bf16": Transforms(precision="bf16"),
        "compiled": Transforms(compile=True),
        "int8 weights": Transforms(int8=True),
        "25% zeros": Transforms(prune=0.25),
        "int8 cache": Transforms(cache_dtype="int8"),
    }


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_bytes_of_a_pass_are_those_of_the_matrices(precision: str, size: int, make_model: MakeModel) -> None:
    model = make_model(num_key_value_heads=2, use_qk_norm=True)
    fused = Transforms(precision).apply(model)
    config, head_dim, width = model.config, 12, int(model.config.intermediate_size or 0)
    layer = 48 * (4 + 2 * 2) * head_dim + 48 * 48 + 3 * 48 * width
    assert weight_bytes(fused) == size * (2 * layer + 48 * model.model.layout.vocab_size) + 2 * 4 * (4 + 2) * head_dim
    assert cache_bytes_per_position(fused) == size * config.num_hidden_layers * 2 * 2 * head_dim
    quarter = cache_bytes_per_position(Transforms(precision, cache_dtype="int8").apply(model))
    assert quarter == config.num_hidden_layers * 2 * 2 * (head_dim + 2)


def test_a_tensor_made_of_tensors_counts_what_it_holds(make_model: MakeModel) -> None:
    fused = FusedModel(make_model())
    before = weight_bytes(fused)
    fused.head = TwoTensor(fused.head, fused.head.clone())
    assert weight_bytes(fused) == before + 4 * fused.head.a.numel()


def test_every_matrix_is_quantised_as_outputs_by_inputs(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(linear: nn.Linear, config: SimpleNamespace) -> None:
        assert config.set_inductor_config is False and linear.weight.is_contiguous()
        step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        linear.weight = nn.Parameter((linear.weight / step).round() * step, requires_grad=False)

    fake = SimpleNamespace(quantize_=quantize, Int8WeightOnlyConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=fake))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    model = make_model()
    plain, rounded = FusedModel(model), FusedModel(model)
    quantize_(rounded)
    pairs = [(plain.head, rounded.head)]
    for before, after in zip(plain.layers, rounded.layers, strict=True):
        assert torch.equal(before.head_norm, after.head_norm)
        pairs += [
            (getattr(before, field.name), getattr(after, field.name)) for field in fields(before) if field.name != "head_norm"
        ]
    for before, after in pairs:
        bound = before.abs().amax(dim=1, keepdim=True) / 254 + 1e-7
        assert ((before - after).abs() <= bound).all() and not torch.equal(before, after)


def test_without_torchao_one_sentence_says_what_to_install(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        ValueError, match=r"int8=true needs torchao.*beside torch 2.*: pip install vidtok-vidgpt.int8., or leave int8 out$"
    ):
        Transforms(int8=True).apply(make_model())


def test_torchao_itself_keeps_the_cross_entropy(make_model: MakeModel, make_ids: MakeIds) -> None:
    pytest.importorskip("torchao")
    model = make_model()
    clips, int8 = clips_of(model, make_ids), Transforms(int8=True).apply(model)
    assert abs(cross_entropy(int8, clips) - cross_entropy(FusedModel(model), clips)) < 0.05
    assert weight_bytes(int8) < 0.5 * weight_bytes(FusedModel(model))
