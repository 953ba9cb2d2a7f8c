"""Images in any form become batches, and bad ones are refused in one line."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from batude_fx.calibration.images import image_batches
from batude_fx.errors import CalibrationError
from batude_fx.support.inputs import Inputs


def test_images_come_as_tensor_batches_or_labelled_pairs() -> None:
    inputs = (torch.zeros(1, 3, 7, 7),)
    images = torch.randn(20, 3, 7, 7)
    pairs = [(part, torch.zeros(len(part))) for part in torch.split(images, 5)]
    for source in (images, list(torch.split(images, 7)), iter(torch.split(images, 7)), torch.split(images, 1), pairs):
        batches = [batch.args[0] for batch in image_batches(source, Inputs(inputs))]
        assert torch.equal(torch.cat(batches), images)
        assert [len(batch) for batch in batches] == [8, 8, 4]


def test_images_of_several_sizes_are_not_mixed() -> None:
    sizes = [7, 7, 9, 7]
    source = [torch.zeros(1, 3, size, size) for size in sizes]
    batches = [batch.args[0] for batch in image_batches(source, Inputs((torch.zeros(1, 3, 7, 7),)))]
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 7, 7), (1, 3, 9, 9), (1, 3, 7, 7)]


def test_a_loader_may_fill_the_same_tensor_again() -> None:
    page = torch.empty(3, 3, 7, 7)
    batches = [
        batch.args[0] for batch in image_batches((page.fill_(n) for n in range(4)), Inputs((torch.zeros(1, 3, 7, 7),)))
    ]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [n for n in range(4) for _ in range(3)]


def _one_nan() -> Iterator[Tensor]:
    images = torch.zeros(2, 3, 7, 7)
    images[1, 0, 0, 0] = float("nan")
    yield images


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(4, 1, 7, 7), r"shape \(4, 1, 7, 7\), the model takes \(N, 3, 7, 7\)"),
        (torch.zeros(3, 7, 7), "unsqueeze"),
        (torch.zeros(4, 3, 7, 7, dtype=torch.uint8), "normalize"),
        (_one_nan(), "NaN"),
        (["a.jpg"], "is of type str, not a tensor"),
        (torch.zeros(4, 3, 7, 7).numpy(), r"is of type ndarray, not a tensor .* Pass torch\.as_tensor\(array\)"),
        ([torch.zeros(4, 3, 7, 7).numpy()], r"batch 0 is of type ndarray, .* Pass torch\.as_tensor\(array\)"),
        (torch.zeros(4, 7, 7, 3), r"takes \(N, 3, \.\.\.\)\. If its last axis is the channels, .*movedim\(-1, 1\)"),
    ],
)
def test_bad_images_are_refused_in_one_line(source: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        list(image_batches(source, Inputs((torch.zeros(1, 3, 7, 7),))))
    assert "\n" not in str(error.value)


def test_images_for_a_model_of_several_inputs_are_refused() -> None:
    with pytest.raises(CalibrationError, match="one tensor"):
        list(image_batches(torch.zeros(4, 3, 7, 7), Inputs((torch.zeros(1, 3, 7, 7), torch.zeros(1, 3, 7, 7)))))
