"""Synthetic inputs have the structure of the example input."""

import pytest
import torch
from torch import nn

from batude_fx.calibration.synthetic_inputs import falls_back_to_noise, synthetic_batches
from batude_fx.support.inputs import Inputs


def test_synthetic_inputs_have_the_structure_of_the_example() -> None:
    single = synthetic_batches(nn.Identity(), Inputs((torch.zeros(1, 1, 8, 9),)))
    assert sum(len(batch.args[0]) for batch in single) == 96
    assert single[0].args[0].shape == (8, 1, 8, 9)
    nested = synthetic_batches(nn.Identity(), Inputs(([torch.zeros(3, 8, 9)], torch.zeros(1, dtype=torch.long))))
    assert nested[0].args[0][0].shape == (3, 8, 9)
    assert nested[0].args[1].dtype == torch.long


def test_synthetic_clips_pan_over_an_image() -> None:
    batches = synthetic_batches(nn.Identity(), Inputs((torch.zeros(1, 3, 4, 18, 19),)))
    assert sum(len(batch.args[0]) for batch in batches) == 16
    clip = batches[0].args[0][0]  # (3, frames, H, W)
    assert clip.shape == (3, 4, 18, 19)
    for step in range(3):
        assert torch.equal(clip[:, step, 1:, 1:], clip[:, step + 1, :-1, :-1])
        assert not torch.equal(clip[:, step], clip[:, step + 1])
    (nested,) = {
        batch.args[0][0].shape for batch in synthetic_batches(nn.Identity(), Inputs(([torch.zeros(2, 3, 4, 18, 19)],)))
    }
    assert nested == (2, 3, 4, 18, 19)


@pytest.mark.parametrize(
    ("inputs", "noise"),
    [
        ((torch.zeros(1, 3, 8, 9),), False),
        ((torch.zeros(1, 1, 4, 8, 9),), False),
        ((torch.zeros(1, 5, 8, 9),), True),
        ((torch.zeros(1, 3, 9),), True),
        (([torch.zeros(3, 8, 9)], torch.zeros(1, dtype=torch.long)), False),
        ((torch.zeros(1, 3, 8, 9), torch.zeros(1, 7)), True),
    ],
)
def test_noise_stands_in_where_no_image_fits(inputs: tuple[object, ...], noise: bool) -> None:
    assert falls_back_to_noise(Inputs(inputs)) is noise
