"""Example inputs of timm and torchvision models have the size that the models were built for."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import models

import batude_fx
from batude_fx.errors import DiscoveryError
from batude_fx.graph.example_inputs import example_inputs, published_images
from batude_fx.support.inputs import Inputs


def shapes(inputs: Inputs) -> list[tuple[int, ...]]:
    assert inputs.tensors() == list(inputs.args)
    return [tuple(tensor.shape) for tensor in inputs.tensors()]


@pytest.mark.parametrize(
    ("name", "changes", "shape"),
    [
        ("resnet18", {}, (1, 3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (1, 1, 224, 224)),
        ("resnet18", {"features_only": True, "in_chans": 2}, (1, 2, 224, 224)),
        ("tresnet_m", {}, (1, 3, 224, 224)),  # its first convolution has 48 input channels, from space to depth
        ("inception_v3", {}, (1, 3, 299, 299)),
        ("tf_efficientnet_b1", {}, (1, 3, 240, 240)),
        ("vit_tiny_patch16_224", {"img_size": (96, 64), "in_chans": 5}, (1, 5, 96, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": 112}, (1, 3, 112, 112)),
        ("mixer_s32_224", {}, (1, 3, 224, 224)),
    ],
)
def test_timm_models_get_inputs_of_their_size(name: str, changes: dict[str, Any], shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **changes)
    assert shapes(example_inputs(model)) == [shape]


@pytest.mark.parametrize(
    ("builder", "changes", "expected"),
    [
        (models.resnet18, {}, [(1, 3, 224, 224)]),
        (models.efficientnet_b1, {}, [(1, 3, 240, 240)]),
        (models.efficientnet_b3, {}, [(1, 3, 300, 300)]),
        (models.efficientnet_b3, {"num_classes": 5}, [(1, 3, 300, 300)]),
        (
            models.inception_v3,
            {"init_weights": False, "num_classes": 5},
            [(1, 3, 299, 299)],
        ),  # the only one of its file
        (models.vit_b_32, {}, [(1, 3, 224, 224)]),
        (models.vit_b_16, {"image_size": 384}, [(1, 3, 384, 384)]),
        (models.segmentation.lraspp_mobilenet_v3_large, {"weights_backbone": None}, [(1, 3, 224, 224)]),
        (models.video.r3d_18, {}, [(1, 3, 16, 112, 112)]),
        (models.video.s3d, {}, [(1, 3, 16, 224, 224)]),
        (models.optical_flow.raft_small, {}, [(1, 3, 128, 128)] * 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_torchvision_models_get_inputs_of_their_size(
    builder: Callable[..., nn.Module], changes: dict[str, Any], expected: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        model = builder(**{"weights": None} | changes)
    assert shapes(example_inputs(model)) == expected


def test_a_compressed_network_of_torchvision_remembers_its_size() -> None:
    small = batude_fx.compress(models.efficientnet_b1(), 0.9, calibration=None)
    assert shapes(example_inputs(small)) == [(1, 3, 240, 240)]


def test_detection_takes_a_list_of_images() -> None:
    with torch.device("meta"):
        model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    (images,) = example_inputs(model).args
    assert isinstance(images, list)
    assert [tuple(image.shape) for image in images] == [(3, 320, 320)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_seeded_noise_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = timm.create_model("test_resnet").to(dtype)
    state = torch.get_rng_state()
    (first,), (again,) = example_inputs(model).args, example_inputs(model).args
    assert isinstance(first, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(first, again)
    assert first.dtype == dtype
    assert abs(first.float().mean()) < 0.05
    assert abs(first.float().std() - 1) < 0.05
    assert torch.equal(torch.get_rng_state(), state)
    assert model(first).dtype == dtype


def test_inputs_are_on_the_device_of_the_model() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    (x,) = example_inputs(model).args
    assert isinstance(x, Tensor)
    assert x.is_meta


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU()])
def test_other_models_need_their_inputs_given(model: nn.Module) -> None:
    with pytest.raises(DiscoveryError, match=f"{type(model).__name__} is no timm or torchvision.*Pass example_inputs="):
        example_inputs(model)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_v2_l", "mobilenet_v3_large", "regnet_x_400mf"])
def test_torchvisions_classifiers_see_images_as_they_were_published_for(name: str) -> None:
    shown = published_images(name)
    published = models.get_model_weights(name).DEFAULT.transforms()
    ours = create_transform(**resolve_data_config(shown), is_training=False)  # type: ignore[no-untyped-call]
    resize, crop, _, normalize = ours.transforms
    assert (resize.size, list(crop.size)) == (published.resize_size[0], published.crop_size * 2)
    assert resize.interpolation == published.interpolation
    assert [*normalize.mean, *normalize.std] == pytest.approx([*published.mean, *published.std])


def test_torchvisions_other_networks_say_nothing_of_images() -> None:
    assert published_images("raft_small") == published_images("fcn_resnet50") == {}
    assert batude_fx.create("torchvision:resnet18").pretrained_cfg["crop_pct"] == 224 / 256
