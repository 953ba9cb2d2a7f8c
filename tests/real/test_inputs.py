"""Holds the converted networks against photos with known classes: a wrong mapping loads without complaint."""

import pytest
import torch
from torch import Tensor, nn

from tests.real import inputs

pytestmark = pytest.mark.real


@torch.inference_mode()
def _right(model: nn.Module, photos: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the photos whose class is the model's first choice, and one of its first five."""
    best = model(photos).topk(5).indices  # (N, 5)
    hits = best == labels[:, None]
    return int(hits[:, 0].sum()), int(hits.any(1).sum())


def test_resnet50_recognises_the_labelled_photos() -> None:
    assert _right(inputs.resnet50_torchvision(), *inputs.labelled_photos()) == (19, 20)


def test_timm_and_torchvision_copies_of_resnet50_are_bit_equal() -> None:
    photos, _ = inputs.labelled_photos()
    with torch.inference_mode():
        assert torch.equal(inputs.resnet50_timm()(photos), inputs.resnet50_torchvision()(photos))


def test_efficientnet_lite0_recognises_the_labelled_photos() -> None:
    photos, labels = inputs.labelled_photos(mean=inputs.HALF, std=inputs.HALF)
    assert _right(inputs.efficientnet_lite0(), photos, labels) == (17, 19)


def test_mobilenet_v2_recognises_the_labelled_photos() -> None:
    assert _right(inputs.mobilenet_v2(), *inputs.labelled_photos()) == (18, 20)


def test_shop_photos_are_all_different_and_the_same_at_every_count() -> None:
    many, few = inputs.shop_photos("test", 400), inputs.shop_photos("test", 40)
    assert torch.equal(many[:40], few)
    assert len(torch.unique(many[:, :, ::32, ::32].flatten(1), dim=0)) == 400


def test_calibration_and_test_photos_do_not_overlap() -> None:
    train, test = (inputs.shop_photos(split, 200)[:, :, ::32, ::32].flatten(1) for split in ("train", "test"))
    assert len(torch.unique(torch.cat([train, test]), dim=0)) == 400


def test_asking_for_more_photos_than_there_are_says_how_many() -> None:
    with pytest.raises(ValueError, match="has 57, asked for 58"):
        inputs.shop_photos("val", 58)
