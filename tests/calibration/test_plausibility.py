"""Calibration images that do not look like those of training are noticed, and others are not."""

import re
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx.graph.example_inputs import timm_config

PHOTOS = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # pixels from 0 to 1


def _own() -> nn.Module:
    """Return a network that has seen normalized images in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3))
    for _ in range(50):
        model((torch.rand(16, 3, 16, 16) - 0.5) / 0.25)
    return model


def _warnings(model: nn.Module, images: Tensor | list[Tensor]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batude_fx.plan(model, 0.8, calibration=images)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("build", "std"), [(_own, 0.25), (lambda: timm.create_model("test_resnet"), 0.5)])
def test_normalized_images_are_taken_in_silence(build: Callable[[], nn.Module], std: float) -> None:
    assert _warnings(build(), (PHOTOS - 0.48) / std) == []


@pytest.mark.parametrize(("scale", "words"), [
    (1, r"channels have means 0\.[45].*no value is negative, normalized by mean 0\.\d+, .* they would be near 0"),
    (255, r"channels have means 12\d.*normalized by mean .* 9\d% of their values are below black or above white"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_the_config_of_timm_tells_that_images_are_not_normalized(name: str, scale: float, words: str) -> None:
    (message,) = _warnings(timm.create_model(name), scale * PHOTOS)
    assert re.search(words, message), message


@pytest.mark.parametrize(("scale", "words"), [(1, r"are 0\.2\d* times"), (255, r"are \d\d\.?\d* times")])
def test_the_first_batch_norm_tells_it_of_other_networks(scale: float, words: str) -> None:
    (message,) = _warnings(_own(), scale * PHOTOS)
    assert re.search(rf"at 1, the first batch-norm, channel means .* {words} those of training", message), message


@pytest.mark.parametrize(("count", "words"), [(1, "1 image"), (4, "4 images")])
def test_a_handful_of_images_is_noticed(count: int, words: str) -> None:
    assert _warnings(timm.create_model("test_resnet"), torch.randn(count, 3, 16, 16)) == [
        f"calibration has only {words}; ranks chosen by so few are uncertain. Give 128 or more."
    ]


@pytest.mark.parametrize("mean", [None, 0.5, "abc", [1, [2]], [0.5], object(), [0.5, None, 0.5], 10**400])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_config_of_other_values_is_passed_over(key: str, mean: object) -> None:
    model = timm.create_model("test_resnet")
    vars(model)["pretrained_cfg"] = {**timm_config(model), key: mean}
    assert _warnings(model, torch.randn(16, 3, 16, 16)) == []


@pytest.mark.parametrize("compress", [batude_fx.plan, batude_fx.compress])
def test_a_warning_names_the_line_of_the_caller(compress: Callable[..., object]) -> None:
    with pytest.warns(UserWarning, match="4 images") as caught:
        compress(timm.create_model("test_resnet"), 0.8, calibration=torch.randn(4, 3, 16, 16))
    assert {warning.filename for warning in caught} == {__file__}


def test_several_sizes_are_noticed() -> None:
    images = [torch.randn(16, 3, 16, 16), torch.randn(16, 3, 12, 12)]
    (message,) = _warnings(timm.create_model("test_resnet"), images)
    assert message.startswith("calibration images have 12 x 12 and 16 x 16 pixels; flops are counted at 16 x 16")
