"""Each term against plain NumPy, and what holds for all of them: means, not sums, in fp32."""

import numpy as np
import pytest
import torch

from vidtok.losses import gradient_error, motion_weights, multiscale_error, reconstruction_loss, temporal_error
from vidtok.options import LossOptions


def moving_dot() -> torch.Tensor:
    video = torch.zeros(1, 3, 4, 9, 9)
    for frame in range(4):
        video[:, :, frame, 4, 2 * frame] = 1.0
    return video


def pair(shape: tuple[int, ...] = (2, 3, 5, 13, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.rand(shape, generator=generator) * 2 - 1


def terms_of(reconstruction: torch.Tensor, video: torch.Tensor, **weights: float) -> dict[str, torch.Tensor]:
    return reconstruction_loss(reconstruction, video, LossOptions(**weights))[1]


def test_the_plain_loss_is_the_mean_of_absolute_and_squared_error() -> None:
    video, error = torch.zeros(1, 3, 2, 4, 4), 0.5
    loss, terms = reconstruction_loss(video + error, video, LossOptions(l1_weight=2.0, l2_weight=3.0))
    torch.testing.assert_close(loss, torch.tensor(2 * 0.5 + 3 * 0.25))
    assert {name: float(value) for name, value in terms.items()} == {"l1": 0.5, "l2": 0.25}


def test_every_term_equals_plain_numpy() -> None:
    reconstruction, video = pair()
    everything = {"charbonnier_weight": 0.1, "multiscale_weight": 0.2, "gradient_weight": 0.3, "temporal_weight": 0.4}
    loss, terms = reconstruction_loss(
        reconstruction, video, LossOptions(l1_weight=1.0, l2_weight=1.0, multiscale_levels=2, **everything)
    )
    a, b = reconstruction.double().numpy(), video.double().numpy()
    halves = [x[..., :12, :].reshape(2, 3, 5, 6, 2, 5, 2).mean(axis=(4, 6)) for x in (a, b)]
    quarters = [x[..., :4].reshape(2, 3, 5, 3, 2, 2, 2).mean(axis=(4, 6)) for x in halves]
    expected = {
        "l1": np.abs(a - b).mean(),
        "l2": ((a - b) ** 2).mean(),
        "charbonnier": np.sqrt((a - b) ** 2 + 1e-6).mean(),
        "multiscale": (np.abs(halves[0] - halves[1]).mean() + np.abs(quarters[0] - quarters[1]).mean()) / 2,
        "gradient": (
            np.abs(np.diff(a, axis=4) - np.diff(b, axis=4)).mean() + np.abs(np.diff(a, axis=3) - np.diff(b, axis=3)).mean()
        )
        / 2,
        "temporal": np.abs(np.diff(a, axis=2) - np.diff(b, axis=2)).mean(),
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)
    weights = {"l1": 1.0, "l2": 1.0, **{name.removesuffix("_weight"): value for name, value in everything.items()}}
    assert float(loss) == pytest.approx(sum(weights[name] * value for name, value in expected.items()), rel=1e-5)


def test_terms_are_means_so_a_weight_holds_for_every_size() -> None:
    reconstruction, video = pair((1, 3, 4, 8, 8))
    weights = {"charbonnier_weight": 1.0, "multiscale_weight": 1.0, "gradient_weight": 1.0, "temporal_weight": 1.0}
    small = terms_of(reconstruction, video, **weights)
    large = terms_of(*(x.repeat(3, 1, 1, 1, 1) for x in (reconstruction, video)), **weights)
    for name, value in small.items():
        torch.testing.assert_close(large[name], value)


def test_a_term_without_a_weight_is_not_computed() -> None:
    assert set(terms_of(*pair(), l1_weight=1.0, l2_weight=0.0, gradient_weight=0.1)) == {"l1", "gradient"}


def test_one_frame_and_one_pixel_have_nothing_to_differ_from() -> None:
    error = torch.ones(1, 3, 1, 1, 1)
    assert float(temporal_error(error)) == float(gradient_error(error)) == float(multiscale_error(error, 3)) == 0.0


def test_a_pyramid_ends_where_the_picture_does() -> None:
    error = pair((1, 3, 1, 4, 6))[0]
    torch.testing.assert_close(multiscale_error(error, 9), multiscale_error(error, 2))


def test_under_autocast_the_loss_is_that_of_fp32() -> None:
    reconstruction, video = pair()
    options = LossOptions(charbonnier_weight=1.0, gradient_weight=1.0, multiscale_weight=1.0, temporal_weight=1.0)
    expected, _ = reconstruction_loss(reconstruction.bfloat16().float(), video, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = reconstruction_loss(reconstruction.bfloat16(), video, options)
    assert torch.equal(loss, expected)
    assert {value.dtype for value in terms.values()} == {torch.float32}


def test_motion_weights_average_to_one_and_favour_what_moves() -> None:
    weights = motion_weights(moving_dot(), LossOptions(motion_weight=10.0))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[0, 0, 0, 4, 0] / weights[0, 0, 0, 0, 8], torch.tensor(11.0))


@pytest.mark.parametrize("weights", [{}, {"l1_weight": 0.0, "l2_weight": 0.0, "charbonnier_weight": 1.0}])
def test_an_error_on_a_moving_thing_costs_more_than_on_the_background(weights: dict[str, float]) -> None:
    video, options = moving_dot(), LossOptions(motion_weight=10.0, **weights)
    on_dot, on_background = video.clone(), video.clone()
    on_dot[0, :, 0, 4, 0] -= 0.5
    on_background[0, :, 0, 0, 8] -= 0.5
    nothing = reconstruction_loss(video, video, options)[0]
    costs = [reconstruction_loss(other, video, options)[0] - nothing for other in (on_dot, on_background)]
    torch.testing.assert_close(costs[0] / costs[1], torch.tensor(11.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"l1_weight": -1.0}, r"^loss\.l1_weight=-1\.0 is not allowed: give a number of 0 or more"),
        ({"gradient_weight": float("nan")}, r"^loss\.gradient_weight=nan"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "are all 0: give one of them"),
        ({"multiscale_levels": 0}, "multiscale_levels=0"),
        ({"lpips_weight": 0.5}, r"^loss\.lpips_weight=0\.5 weighs nothing without a network: give loss\.lpips_weights=FILE"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossOptions(**weights)
