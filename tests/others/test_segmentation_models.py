"""A U-Net of segmentation_models_pytorch."""

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import batude_fx
from tests.others.common import (
    assert_exported,
    assert_saved_and_loaded,
    assert_step_changes_factors,
    flops,
    noise,
    unchanged,
    with_trained_norms,
)

pytestmark = pytest.mark.others

BUDGET = 0.5
EXAMPLE = noise(1, 3, 64, 64)
IMAGES = noise(2, 3, 64, 64)
MASKS = (IMAGES[:, :1] > 0.5).float()
ENCODERS = ["resnet18", "tu-resnet10t"]  # the package's own, and one of timm


def fresh(encoder: str) -> smp.Unet:
    """Return a small U-Net with the same random weights at each call."""
    torch.manual_seed(0)
    model = smp.Unet(encoder, encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16), classes=1)
    return with_trained_norms(model)


def call(network: nn.Module) -> object:
    return network(IMAGES)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def small(encoder: str) -> smp.Unet:
    """The compressed network, which no test changes."""
    return batude_fx.compress(fresh(encoder), BUDGET, example_inputs=EXAMPLE)


def test_the_budget_holds_and_the_original_is_left_as_it_was(encoder: str) -> None:
    model = fresh(encoder)
    model.decoder.register_forward_hook(lambda *_: None)
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE)
    assert type(small) is type(model)
    assert flops(small, EXAMPLE) <= BUDGET * flops(model, EXAMPLE)
    assert small.config == model.config
    assert small.name == model.name
    assert small.encoder.out_channels == model.encoder.out_channels
    assert len(small.decoder._forward_hooks) == 1


def test_predict_gives_masks_of_the_size_of_the_images(small: smp.Unet) -> None:
    assert small.predict(IMAGES).shape == MASKS.shape


def test_a_step_on_its_own_loss_changes_the_factors(small: nn.Module) -> None:
    def loss(network: nn.Module) -> Tensor:
        dice: Tensor = smp.losses.DiceLoss("binary")(network(IMAGES), MASKS)
        return dice

    assert_step_changes_factors(small, loss)


def test_saved_and_loaded_it_is_the_same_to_the_bit(encoder: str, small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(encoder), call, tmp_path / "out")


def test_exported_it_computes_the_same_for_another_batch(small: nn.Module, tmp_path: Path) -> None:
    assert_exported(small, EXAMPLE, call, [IMAGES], tmp_path / "small.onnx")
