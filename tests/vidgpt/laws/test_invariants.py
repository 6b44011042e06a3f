import re
from collections.abc import Callable

import pytest
import torch

from tests.vidgpt.conftest import net
from tests.vidgpt.laws.breaking import BROKEN, SLIDING, Patch
from vidgpt.laws import invariants as laws
from vidgpt.laws.comparing import Finding, compare
from vidgpt.laws.forced import GREEDY, RASTER, TOLERANCE, Subject
from vidgpt.laws.sampled_law import chi_square
from vidgpt.laws.verification import LAWS, make_subject
from vidgpt.options import VerifyOptions

MODELS = {
    "plain": {},
    "sliding": SLIDING,
    "sinks_actions": {**SLIDING, "sink_frames": 1, "num_actions": 3},
    "digits": {"factors": [3, 4]},
    "parallel": {"factors": [3, 4], "digits": "parallel", "use_qk_norm": False},
    "one_place": {"grid_height": 1, "grid_width": 1, "tie_word_embeddings": True},
}


def make(clips: int = 3, frames: int = 4, precision: str = "fp32", **options: object) -> Subject:
    return make_subject(net(**options), VerifyOptions("here", clips=clips, frames=frames, precision=precision))


@pytest.mark.parametrize("name", MODELS)
def test_every_law_holds(name: str) -> None:
    subject = make(**MODELS[name])
    findings = {law.__name__: law(subject) for law in LAWS}
    assert [str(finding) for finding in findings.values() if finding.is_kept is False] == []
    silent = {name for name, finding in findings.items() if finding.is_kept is None}
    expected = set() if "attention_frames" in MODELS[name] else {"beyond_window"}
    expected |= set() if "num_actions" in MODELS[name] else {"guidance"}
    expected |= {"sinks_actions": {"ragged_rows"}, "parallel": {"transformers_generate"}, "one_place": {"narrow_diagonal"}}.get(
        name, set()
    )
    assert silent == expected


@pytest.mark.parametrize("name", ["plain", "sinks_actions", "parallel"])
def test_every_law_holds_in_bf16_to_what_bf16_rounds(name: str) -> None:
    subject = make(precision="bf16", **MODELS[name])
    findings = {law.__name__: law(subject) for law in LAWS}
    assert [str(finding) for finding in findings.values() if finding.is_kept is False] == []
    assert findings["transformers_generate"].is_kept is None
    # Not a bound that anything keeps, nor one that fp32 would.
    assert 10 * TOLERANCE < subject.tolerance < 0.5
    assert f"bound {subject.tolerance:.0e}" in findings["cached"].seen
    difference = float(findings["cached"].seen.split()[2])
    assert TOLERANCE < difference < subject.tolerance
    found = re.search(r"; (\d+) of (\d+) draws are no near ties and were compared$", findings["speculative_greedy"].seen)
    assert found and int(found[2]) == 2 * 3 * 2 * subject.layout.slots_per_frame
    assert int(found[2]) > int(found[1]) > int(found[2]) // 4


def test_ids_that_are_all_near_ties_prove_nothing() -> None:
    model = net()
    with torch.no_grad():
        model.lm_head.weight[:12] = model.lm_head.weight[0] + 1e-6 * torch.randn(12, 32)
    subject = make_subject(model, VerifyOptions("here", precision="bf16"))
    assert laws.speculative_greedy(subject).is_kept is False


def test_two_frames_of_one_clip_are_enough() -> None:
    subject = make(clips=1, frames=2, **SLIDING)
    findings = [law(subject) for law in LAWS]
    assert [str(finding) for finding in findings if finding.is_kept is False] == []
    assert laws.ragged_rows(subject).is_kept is None


@pytest.mark.parametrize(("law", "broken", "options"), BROKEN, ids=[f"{law.__name__}-{how.__name__}" for law, how, _ in BROKEN])
def test_a_law_is_seen_to_be_broken(law: Callable[[Subject], Finding], broken: Patch, options: dict, monkeypatch) -> None:
    subject = make(**options)
    assert subject.logits.isfinite().all() and law(subject).is_kept
    broken(monkeypatch)
    assert law(subject).is_kept is False


def test_every_law_of_the_command_is_broken_here() -> None:
    assert {law for law, *_ in BROKEN} == set(LAWS)


def test_near_ties_are_told_and_larger_differences_are_not_excused() -> None:
    model = net()
    for is_tied in (False, True):
        if is_tied:
            with torch.no_grad():
                model.lm_head.weight[:12] = model.lm_head.weight[0]
        subject = make_subject(model, VerifyOptions("here"))
        ids = subject.rollout(RASTER, GREEDY)
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % 12
        finding = compare(subject, "law", ids, other, subject.sampler(GREEDY))
        assert finding.is_kept is is_tied
        assert finding.seen.startswith("1 of 72 ids differ") and f"{int(is_tied)} near ties" in finding.seen


def test_chi_square_knows_right_and_wrong_frequencies() -> None:
    law = torch.tensor([0.5, 0.3, 0.199, 0.001, 0.0], dtype=torch.double)
    right = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    value, freedom = chi_square(right, law)
    assert value < 1e-9 and freedom == 2
    wrong = torch.tensor([0] * 600 + [1] * 200 + [2] * 200)
    assert chi_square(wrong, law)[0] == pytest.approx(20 + 100**2 / 300, rel=0.05)
    assert chi_square(torch.tensor([0] * 99 + [4]), law)[0] == float("inf")
