"""The size of the images that a network is used on: flops are counted on it, and it is kept with the network."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batude_fx
from batude_fx import CalibrationError
from batude_fx.graph.example_inputs import example_inputs
from tests.toy_networks import TwoConvolutions

IMAGES = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is not supported:FutureWarning")


def _flops(network: nn.Module, image: Tensor) -> int:
    analysis = FlopCountAnalysis(network.eval(), image)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5).eval()


@pytest.mark.parametrize(
    "images",
    [
        lambda: IMAGES,
        lambda: [IMAGES[:4], IMAGES[4:]],
        lambda: (batch for batch in IMAGES.split(4)),  # type: ignore[no-untyped-call]
        lambda: DataLoader(TensorDataset(IMAGES, torch.zeros(8)), batch_size=4),
    ],
    ids=["tensor", "list", "generator", "loader"],
)
def test_the_budget_holds_at_the_size_of_the_images(images: Callable[[], Tensor | Iterable[Tensor]]) -> None:
    model = torchvision.models.vgg11_bn(num_classes=5).eval()  # its linear layers cost the same at every size
    small = batude_fx.compress(model, 0.7, calibration=images())
    assert _flops(small, IMAGES[:1]) <= 0.7 * _flops(model, IMAGES[:1])


def test_every_form_of_images_gives_the_same_plan() -> None:
    forms = (IMAGES, [IMAGES[:4], IMAGES[4:]], DataLoader(TensorDataset(IMAGES), batch_size=4))
    plans = [batude_fx.plan(_resnet(), 0.6, calibration=images) for images in forms]
    assert plans[0].ranks == plans[1].ranks == plans[2].ranks
    assert plans[0].losses == plans[1].losses == plans[2].losses


def test_looking_at_the_first_batch_leaves_the_random_generator_where_it_is() -> None:
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(IMAGES), batch_size=4, shuffle=True)
    batude_fx.plan(_resnet(), 0.6, calibration=loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_example_of_another_size_than_the_images_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"example input of 64 x 64 pixels, and the calibration images have 48 x 48"):
        plan = batude_fx.plan(_resnet(), 0.6, calibration=IMAGES, example_inputs=torch.zeros(1, 3, 64, 64))
    assert plan.dense_flops == _flops(_resnet(), torch.zeros(1, 3, 64, 64))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "flops are counted")
        batude_fx.plan(_resnet(), 0.6, calibration=IMAGES, example_inputs=torch.zeros(1, 3, 48, 48))


def test_a_model_of_ones_own_needs_no_example_beside_images() -> None:
    model = TwoConvolutions()
    plan = batude_fx.plan(model, 0.6, calibration=IMAGES)
    assert plan.dense_flops == _flops(model, IMAGES[:1])


def test_no_images_are_an_error_as_before() -> None:
    with pytest.raises(CalibrationError, match="the loader is empty"):
        batude_fx.plan(_resnet(), 0.6, calibration=[])


@pytest.mark.parametrize("build", [_resnet, lambda: torchvision.models.resnet18(num_classes=5).eval()])
def test_the_size_is_kept_with_the_network(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    side = example_inputs(model).image.shape[-1]
    small = batude_fx.compress(model, 0.6, calibration=None, example_inputs=IMAGES[:1])
    batude_fx.save(small, tmp_path / "small")
    loaded = batude_fx.load(tmp_path / "small")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True)
    for network in (small, loaded, by_timm):
        assert example_inputs(network).image.shape == (1, 3, 48, 48)
    batude_fx.export(loaded, tmp_path / "small.onnx")
    (input_,) = onnx.load(tmp_path / "small.onnx").graph.input
    assert [axis.dim_value for axis in input_.type.tensor_type.shape.dim][1:] == [3, 48, 48]
    assert example_inputs(model).image.shape[-1] == side != 48
