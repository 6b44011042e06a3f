import torch

from vidtok.losses import motion_weights, reconstruction_loss
from vidtok.options import LossOptions


def moving_dot() -> torch.Tensor:
    video = torch.zeros(1, 3, 4, 9, 9)
    for frame in range(4):
        video[:, :, frame, 4, 2 * frame] = 1.0
    return video


def test_the_plain_loss_is_the_mean_of_absolute_and_squared_error() -> None:
    video, error = torch.zeros(1, 3, 2, 4, 4), 0.5
    loss = reconstruction_loss(video + error, video, LossOptions(l1_weight=2.0, l2_weight=3.0))
    torch.testing.assert_close(loss, torch.tensor(2 * 0.5 + 3 * 0.25))


def test_motion_weights_average_to_one_and_favour_what_moves() -> None:
    weights = motion_weights(moving_dot(), LossOptions(motion_weight=10.0))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[0, 0, 0, 4, 0] / weights[0, 0, 0, 0, 8], torch.tensor(11.0))


def test_an_error_on_a_moving_thing_costs_more_than_on_the_background() -> None:
    video, options = moving_dot(), LossOptions(motion_weight=10.0)
    on_dot, on_background = video.clone(), video.clone()
    on_dot[0, :, 0, 4, 0] -= 0.5
    on_background[0, :, 0, 0, 8] -= 0.5
    ratio = reconstruction_loss(on_dot, video, options) / reconstruction_loss(on_background, video, options)
    torch.testing.assert_close(ratio, torch.tensor(11.0))
