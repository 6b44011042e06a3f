import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from vidgpt.attention import rotate
from vidgpt.cache import SlotCache
from vidgpt.config import VidGPTConfig
from vidgpt.layout import IGNORED
from vidgpt.loss import chunked_cross_entropy
from vidgpt.model import VidGPTForCausalLM
from vidtok.folders import load_model, save_model

VARIANTS = [{}, {"num_key_value_heads": 2}, {"use_qk_norm": False}, {"tie_word_embeddings": True}, {"num_actions": 3}]
SPLITS = [[35], [34, 1], [1, 34], [7, 7, 7, 7, 7], [5, 1, 1, 13, 15], [1] * 35]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_changed_token_changes_no_earlier_logit(options, make_model, make_ids) -> None:
    model = make_model(**options).double()
    input_ids = make_ids(model)
    before = model(input_ids).logits
    for place in (1, 9, 20):
        edited = input_ids.clone()
        edited[:, place] = (edited[:, place] + 1) % 20
        after = model(edited).logits
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place:], after[:, place:])


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_cached_logits_equal_uncached_ones(options, split, make_model, make_ids) -> None:
    model = make_model(**options)
    input_ids = make_ids(model, batch=3)
    cache = SlotCache(2, 35)
    parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in input_ids.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-5, rtol=0)


def test_transformers_own_cache_gives_the_same_logits(make_model, make_ids) -> None:
    from transformers import DynamicCache

    model = make_model()
    input_ids, cache = make_ids(model), DynamicCache()
    parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in input_ids.split([9, 1, 25], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-5, rtol=0)


def test_two_interleaved_caches_do_not_disturb_each_other(make_model, make_ids) -> None:
    model = make_model()
    first, second = make_ids(model, seed=1), make_ids(model, seed=2)
    caches, parts = (SlotCache(2, 35), SlotCache(2, 35)), ([], [])
    for a, b in zip(first.split(7, dim=1), second.split(7, dim=1), strict=True):
        for ids, cache, kept in ((a, caches[0], parts[0]), (b, caches[1], parts[1])):
            kept.append(model(ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts[0], dim=1), model(first).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(parts[1], dim=1), model(second).logits, atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours(make_model, make_ids) -> None:
    model = make_model()
    input_ids = make_ids(model, batch=3)
    torch.testing.assert_close(model(input_ids).logits[1:2], model(input_ids[1:2]).logits, atol=1e-5, rtol=0)


def test_a_hidden_position_has_no_influence(make_model, make_ids) -> None:
    model = make_model()
    input_ids = make_ids(model, batch=2)
    mask = torch.ones_like(input_ids)
    mask[:, :7] = 0
    edited = input_ids.clone()
    edited[:, :7] = input_ids[:, 7:14]
    before, after = (model(ids, attention_mask=mask).logits for ids in (input_ids, edited))
    torch.testing.assert_close(before[:, 7:], after[:, 7:], atol=1e-5, rtol=0)
    assert not torch.allclose(model(input_ids).logits[:, 7:], model(edited).logits[:, 7:])
    assert not before.isnan().any()


def test_a_left_padded_row_equals_the_row_alone(make_model, make_ids) -> None:
    model = make_model()
    input_ids = make_ids(model, batch=2, frames=3)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), input_ids], dim=1)
    padded[1] = torch.cat([input_ids[1], input_ids[1, :5]])
    mask, positions = torch.ones_like(padded), torch.arange(26).repeat(2, 1)
    mask[0, :5], positions[0] = 0, (positions[0] - 5).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0, 5:], model(input_ids[:1]).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], model(padded[1:]).logits[0], atol=1e-5, rtol=0)


def test_evaluation_twice_is_equal_with_dropout_configured(make_model, make_ids) -> None:
    model = make_model(attention_dropout=0.5)
    input_ids = make_ids(model)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_rotary_phases_depend_on_offsets_only_and_start_at_identity(make_model) -> None:
    model = make_model()
    cos, sin = model.model.rotary(torch.tensor([[1, 8, 15]]))
    torch.testing.assert_close(cos[0, 0, 0], torch.ones(6))
    torch.testing.assert_close(sin[0, 0, 0], torch.zeros(6))
    query, key = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(at: int, other: int) -> torch.Tensor:
        phases = [(c[:, :, [i]], s[:, :, [i]]) for i in (at, other) for c, s in [model.model.rotary(torch.arange(35)[None])]]
        return (rotate(query, phases[0]) * rotate(key, phases[1])).sum()

    # The same place one frame apart, from different frames and places.
    torch.testing.assert_close(score(8, 1), score(15, 8))
    torch.testing.assert_close(score(12, 5), score(33, 26))


def test_rotary_phases_stay_fp32_where_weights_are_bf16(make_model, tmp_path) -> None:
    model = make_model()
    before = model.model.rotary.cos.clone()
    save_model(model, tmp_path)
    for narrow in (VidGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)):
        assert narrow.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(narrow.model.rotary.cos, before)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_loss_is_the_cross_entropy_of_the_shifted_logits(options, make_model, make_ids) -> None:
    model = make_model(**options)
    input_ids = make_ids(model)
    labels = model.model.layout.labels(input_ids)
    logits = model(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)


@pytest.mark.parametrize("options", [{}, {"loss_chunk": 22 * 5}, {"num_actions": 3}], ids=str)
def test_the_loss_reaches_every_picture_token_and_no_lead(options, make_model, make_ids) -> None:
    model, hidden_states = make_model(**options), []
    model.model.norm.register_forward_hook(lambda _, __, output: hidden_states.append(output))
    input_ids = make_ids(model)
    loss = model(input_ids, labels=model.model.layout.labels(input_ids)).loss
    (gradient,) = torch.autograd.grad(loss, hidden_states)
    # Logits at p are for p + 1, and leads stand at 0, 7, 14, ...; the lead at 0 predicts the first picture token.
    is_silent = (gradient == 0).all(-1)
    assert is_silent[0].nonzero().flatten().tolist() == [6, 13, 20, 27, 34]
    assert torch.equal(is_silent[0], is_silent[1])


@pytest.mark.parametrize("max_logits", [1, 7 * 11, 7 * 40, 10**6])
def test_a_chunked_loss_has_the_value_and_gradients_of_the_whole(max_logits: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    labels = torch.randint(0, 7, (40,))
    labels[::5] = IGNORED
    expected = torch.autograd.grad(F.cross_entropy(hidden @ head.T, labels), (hidden, head))
    loss = chunked_cross_entropy(hidden, head, labels, max_logits)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.T, labels))
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_loss_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="no label is left"):
        chunked_cross_entropy(torch.randn(4, 5), torch.randn(7, 5), torch.full((4,), IGNORED), 100)


@pytest.mark.parametrize("options", VARIANTS)
def test_a_saved_model_loads_equal_in_a_new_process(options, make_model, make_ids, tmp_path) -> None:
    model = make_model(**options)
    input_ids = make_ids(model)
    save_model(model, tmp_path)
    torch.save({"ids": input_ids, "logits": model(input_ids).logits.detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; from vidtok.folders import load_model; from vidgpt.model import VidGPTForCausalLM\n"
        "m = load_model(VidGPTForCausalLM, sys.argv[1]); e = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(m(e['ids']).logits, e['logits'])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_generate_of_a_saved_model_draws_from_every_id(make_model, tmp_path) -> None:
    save_model(make_model(), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 0
    assert load_model(VidGPTForCausalLM, tmp_path).generation_config.top_k == 0


def test_one_batch_overfits(make_model, make_ids) -> None:
    model = make_model(initializer_range=0.02).train()
    input_ids = make_ids(model)
    labels = model.model.layout.labels(input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(40):
        loss = model(input_ids, labels=labels).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_gradient_checkpointing_changes_no_gradient(make_model, make_ids) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        input_ids = make_ids(model)
        model(input_ids, labels=model.model.layout.labels(input_ids)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_sequence_past_the_window_is_refused(make_model, make_ids) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="42 tokens do not fit the window of 5 frames"):
        model(make_ids(model, frames=6))


@pytest.mark.parametrize(("position", "sentence"), [(-1, "from -1 to 6 do not fit"), (35, r"to 35 do not fit .* \(0 to 34\)")])
def test_positions_outside_the_window_are_refused(position: int, sentence: str, make_model, make_ids) -> None:
    model, positions = make_model(), torch.arange(7)
    assert model(make_ids(model, frames=1), position_ids=positions).logits.isfinite().all()
    positions[0] = position
    with pytest.raises(ValueError, match=sentence):
        model(make_ids(model, frames=1), position_ids=positions)


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"window": 1},
        {"head_dim": 7},
        {"num_hidden_layers": -2},
        {"attention_dropout": 7.0},
        {"rope_theta": -3.0},
    ],
)
def test_an_impossible_architecture_is_refused(options: dict) -> None:
    with pytest.raises(Exception, match="|".join(options)):
        VidGPTConfig(**options)


def test_missing_weights_are_an_error_not_a_warning(make_model, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(make_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys .*model\.norm\.weight"):
        load_model(VidGPTForCausalLM, tmp_path)
