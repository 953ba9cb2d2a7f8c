"""Calibration takes images in any form, and refuses what holds no images."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batude_fx
from batude_fx.errors import CalibrationError
from batude_fx.tucker.modules import TuckerModule
from tests.compression.common import EXAMPLE, photos, same_bits
from tests.toy_networks import varied_net


def test_images_of_another_size_are_refused_where_the_model_takes_one_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(1024, 4))
    with pytest.warns(UserWarning, match="12 x 12"), pytest.raises(CalibrationError, match="shape"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=torch.randn(4, 3, 10, 10))


def test_calibration_beats_weights_only_on_similar_images() -> None:
    model = varied_net().eval()
    basis = torch.randn(2, 3 * 12 * 12, generator=torch.Generator().manual_seed(5))
    images = (torch.randn(80, 2, generator=torch.Generator().manual_seed(6)) @ basis).view(80, 3, 12, 12)
    wanted = model(images[40:]).detach()

    def error(calibration: Tensor | None) -> float:
        small = batude_fx.compress(model, 0.45, example_inputs=EXAMPLE, calibration=calibration).eval()
        return float((small(images[40:]).detach() - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert error(images[:40]) < 0.7 * error(None)


@pytest.fixture(scope="module")
def from_a_tensor() -> nn.Module:
    return batude_fx.compress(varied_net(), 0.6, example_inputs=EXAMPLE, calibration=photos(16))


@pytest.mark.parametrize(
    "source",
    [
        lambda images: list(torch.split(images, 8)),
        lambda images: iter(torch.split(images, 8)),
        lambda images: DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=8),
    ],
    ids=["list", "iterator", "DataLoader with labels"],
)
def test_the_same_images_in_any_form_give_the_same_network(
    source: Callable[[Tensor], object], from_a_tensor: nn.Module
) -> None:
    small = batude_fx.compress(varied_net(), 0.6, example_inputs=EXAMPLE, calibration=source(photos(16)))
    assert same_bits(small, from_a_tensor)


@pytest.mark.parametrize("calibration", ["synthetic", None, photos(4)], ids=["synthetic", "none", "images"])
def test_new_tensors_may_lie_on_another_device_by_default(calibration: Tensor | str | None) -> None:
    model = varied_net()
    plan = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    with torch.device("meta"):
        other = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
        assert same_bits(other.apply(model), plan.apply(model))


def test_a_model_of_several_inputs_takes_synthetic_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.a(x) + self.b(y)}

    torch.manual_seed(0)
    example = (torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 12))
    plan = batude_fx.plan(Two(), 0.8, example_inputs=example, round_to=1)
    assert plan.ranks
    assert plan.apply(Two())(*example)["sum"].shape == (1, 16, 10, 10)


@pytest.mark.parametrize("images", [7, [{"image": torch.zeros(1, 3, 12, 12)}], [()]])
def test_calibration_without_images_is_refused(images: object) -> None:
    with pytest.raises(CalibrationError, match="not a tensor"):
        batude_fx.compress(varied_net(), 0.6, calibration=images, example_inputs=EXAMPLE)


@pytest.mark.parametrize("calibration", ["synthetic", photos()])
def test_a_classifier_is_calibrated_too(calibration: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 400))
    small = batude_fx.compress(
        model, 0.95, calibration=calibration, layers="conv+linear", ranks={"0": None}, example_inputs=EXAMPLE
    )
    assert isinstance(small[3], TuckerModule)
    assert small(EXAMPLE).shape == (1, 400)
