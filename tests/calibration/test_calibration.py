"""Calibration: what becomes of images, and bad input."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from batude_fx.calibration.batch_norm import renormalize
from batude_fx.calibration.dead_leaves import dead_leaves
from batude_fx.calibration.images import image_batches
from batude_fx.calibration.statistics import average_metrics, statistics
from batude_fx.calibration.synthetic_inputs import falls_back_to_noise, synthetic_batches
from batude_fx.errors import CalibrationError
from batude_fx.tucker.spectra import Metric, ModeMetric
from tests.toy_networks import site_of, small_net


def test_a_copy_normalized_by_images_gives_standard_channels() -> None:
    net = small_net().eval()
    images = torch.randn(32, 3, 7, 7) * 5 + 3
    vars(net[1])["momentum"] = 0.3
    adapted = renormalize(net, [(images,)])
    assert adapted[1].momentum == 0.3
    after = adapted[:2](images)
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(6), atol=1e-2, rtol=0)
    assert torch.equal(net[1].running_mean, torch.zeros(6))


def test_mixing_statistics_with_themselves_changes_nothing() -> None:
    net = small_net().eval()
    measured = statistics(net, [site_of("0", net[0])], [(torch.randn(8, 3, 7, 7),)])
    both = average_metrics(measured, measured)["0"]
    for mode in ("out", "in_"):
        for field in ("covariance", "sensitivity"):
            mixture, single = (getattr(getattr(metric, mode), field) for metric in (both, measured["0"]))
            torch.testing.assert_close(mixture, single)


def test_mixing_is_half_and_half_on_the_scale_of_the_own_images() -> None:
    def metric(covariance: float, sensitivity: float) -> Metric:
        return Metric(ModeMetric(*(value * torch.eye(2)[None] for value in (covariance, sensitivity))), None)

    both = average_metrics({"a": metric(2, 1)}, {"a": metric(4, 3)})["a"].out
    assert both is not None
    torch.testing.assert_close(both.covariance[0], 3 * torch.eye(2))
    # All errors together cost 4 and 24: the synthetic sensitivity counts for a sixth.
    torch.testing.assert_close(both.sensitivity[0], (1 + 3 / 6) / 2 * torch.eye(2))


def test_images_come_as_tensor_batches_or_labelled_pairs() -> None:
    inputs = (torch.zeros(1, 3, 7, 7),)
    images = torch.randn(20, 3, 7, 7)
    pairs = [(part, torch.zeros(len(part))) for part in torch.split(images, 5)]
    for source in (images, list(torch.split(images, 7)), iter(torch.split(images, 7)), torch.split(images, 1), pairs):
        batches = [batch[0] for batch in image_batches(source, inputs)]
        assert torch.equal(torch.cat(batches), images)
        assert [len(batch) for batch in batches] == [8, 8, 4]


def test_images_of_several_sizes_are_not_mixed() -> None:
    sizes = [7, 7, 9, 7]
    source = [torch.zeros(1, 3, size, size) for size in sizes]
    batches = [batch[0] for batch in image_batches(source, (torch.zeros(1, 3, 7, 7),))]
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 7, 7), (1, 3, 9, 9), (1, 3, 7, 7)]


def test_a_loader_may_fill_the_same_tensor_again() -> None:
    page = torch.empty(3, 3, 7, 7)
    batches = [batch[0] for batch in image_batches((page.fill_(n) for n in range(4)), (torch.zeros(1, 3, 7, 7),))]
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
        (["a.jpg"], "is a str, not a tensor"),
    ],
)
def test_bad_images_are_refused_in_one_line(source: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        list(image_batches(source, (torch.zeros(1, 3, 7, 7),)))
    assert "\n" not in str(error.value)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        statistics(small_net(), [], [])


def test_images_for_a_model_of_several_inputs_are_refused() -> None:
    with pytest.raises(CalibrationError, match="one tensor"):
        list(image_batches(torch.zeros(4, 3, 7, 7), (torch.zeros(1, 3, 7, 7), torch.zeros(1, 3, 7, 7))))


def test_synthetic_inputs_have_the_structure_of_the_example() -> None:
    single = synthetic_batches(nn.Identity(), (torch.zeros(1, 1, 8, 9),))
    assert sum(len(batch[0]) for batch in single) == 96
    assert single[0][0].shape == (8, 1, 8, 9)
    nested = synthetic_batches(nn.Identity(), ([torch.zeros(3, 8, 9)], torch.zeros(1, dtype=torch.long)))
    assert nested[0][0][0].shape == (3, 8, 9)
    assert nested[0][1].dtype == torch.long


def test_synthetic_clips_pan_over_an_image() -> None:
    batches = synthetic_batches(nn.Identity(), (torch.zeros(1, 3, 4, 18, 19),))
    assert sum(len(batch[0]) for batch in batches) == 16
    clip = batches[0][0][0]  # (3, frames, H, W)
    assert clip.shape == (3, 4, 18, 19)
    for step in range(3):
        assert torch.equal(clip[:, step, 1:, 1:], clip[:, step + 1, :-1, :-1])
        assert not torch.equal(clip[:, step], clip[:, step + 1])
    (nested,) = {batch[0][0].shape for batch in synthetic_batches(nn.Identity(), ([torch.zeros(2, 3, 4, 18, 19)],))}
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
    assert falls_back_to_noise(inputs) is noise


def test_dead_leaves_are_reproducible_images() -> None:
    images = dead_leaves(3, (24, 32), seed=1)
    assert images.shape == (3, 3, 24, 32)
    assert torch.equal(images[:2], dead_leaves(2, (24, 32), seed=1))
    assert not torch.equal(images, dead_leaves(3, (24, 32), seed=2))
    assert 0 <= images.min() <= images.max() <= 1
    # Neighbouring pixels of photographs are alike, and so are their colour channels.
    flat = (images - images.mean((2, 3), keepdim=True)).flatten(0, 1)
    neighbours = torch.corrcoef(torch.stack([flat[..., 1:].flatten(), flat[..., :-1].flatten()]))[0, 1]
    colours = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert neighbours > 0.7
    assert colours.min() > 0.5
