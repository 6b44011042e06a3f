"""The loss of the 1X challenge against values computed by hand, and the evaluation's against it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vidgpt.conftest import net
from vidgpt.challenge import challenge_figures, challenge_loss
from vidgpt.evaluation import evaluate_tokens
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.metrics import TokenMeter
from vidgpt.regimes import PlainFrames, temporally_forced
from vidgpt.sampling import SamplingOptions

SIZE = 512


def test_a_blind_guess_costs_twice_the_logarithm_of_512() -> None:
    indices = torch.randint(SIZE**2, (2, 16, 2, 3), generator=torch.Generator().manual_seed(0))
    assert (
        challenge_loss(torch.zeros(2, SIZE, 2, 15, 2, 3), indices)
        == pytest.approx(2 * math.log(SIZE))
        == pytest.approx(12.4766, abs=1e-4)
    )


def test_the_digits_are_remainder_and_quotient_and_the_first_frame_is_not_scored() -> None:
    # Two clips of two frames of one place: ids 3 + 512 * 7 and 500 + 512 * 0.
    indices = torch.tensor([[1, 3587], [2, 500]]).view(2, 2, 1, 1)
    logits = torch.zeros(2, SIZE, 2, 1, 1, 1)
    logits[0, 3, 0] = 2.0
    logits[0, 7, 1] = 3.0
    logits[1, 500, 1] = 4.0  # the right value of the wrong digit
    sure = [math.log(math.exp(value) + SIZE - 1) for value in (2.0, 3.0, 4.0)]
    by_hand = ((sure[0] - 2) + (sure[1] - 3) + math.log(SIZE) + sure[2]) / 2
    assert challenge_loss(logits, indices) == pytest.approx(by_hand, rel=1e-6)


def test_an_evaluation_gives_the_challenges_loss_of_the_logits_that_stand_behind_the_models_own_tokens(tmp_path: Path) -> None:
    model = net(codebook_size=SIZE**2, factors=[SIZE, SIZE], digits="parallel", grid_height=2, grid_width=2, window=16)
    fused, layout = FusedModel(model), model.model.layout
    indices = torch.randint(SIZE**2, (3, 16, 2, 2), generator=torch.Generator().manual_seed(1))

    def force(ids: Tensor, actions: Tensor | None) -> object:
        return temporally_forced(fused, layout, ids, actions)

    report = evaluate_tokens(model, layout, [{"indices": indices, "actions": None}], None, 1, None, force=force)  # type: ignore[arg-type]
    report.write(tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["world_model_challenge_1x"]
    generated = temporally_forced(fused, layout, indices, None, SamplingOptions(0.0)).generated
    reader = PlainFrames(model, layout, layout.flatten(indices))
    own = torch.cat([torch.full((3, 15, 1), layout.separator_id), generated.flatten(2)], dim=2)
    with torch.no_grad():
        logits = torch.stack([reader.read(slot, own[:, :, slot]) for slot in range(4)], dim=-1)
    factored = logits.view(3, 15, 2, SIZE, 2, 2).permute(0, 3, 2, 1, 4, 5)
    assert figures["loss_nats_per_token"] == pytest.approx(challenge_loss(factored, indices), rel=1e-6)
    assert figures["token_accuracy_fraction"] == pytest.approx(float((generated == indices[:, 1:]).double().mean()))
    assert (figures["clip_frames_count"], figures["is_challenge_protocol"]) == (16, True)
    full = report.teacher_forced["model"].summary()["cross_entropy_nats_per_token"]
    assert figures["loss_nats_per_token"] != pytest.approx(full, rel=1e-5)


def test_other_digits_and_shapes_are_refused() -> None:
    for layout in (TokenLayout(SIZE**2, 2, 2, factors=(SIZE, SIZE)), TokenLayout(SIZE, 2, 2)):
        with pytest.raises(ValueError, match=r"two independent digits of 512 values, this model has \[512.* predicted in turn"):
            challenge_figures(layout, TokenMeter((2, 2), has_generated=True), 16)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 512, 1, 1, 1\)"):
        challenge_loss(torch.zeros(1, 2, SIZE, 1, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="outside"):
        challenge_loss(torch.zeros(1, SIZE, 2, 1, 1, 1), torch.full((1, 2, 1, 1), SIZE**2))
