"""The stages of networks of timm, of torchvision and of one's own."""

import timm
import torch
import torchvision
from torch import nn

from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.stages import find_stages
from batude_fx.support.inputs import Inputs
from tests.toy_networks import VariedNet

_IMAGE = Inputs((torch.zeros(1, 3, 64, 64),))


def test_timm_names_the_stages_of_its_networks() -> None:
    model = timm.create_model("resnet18").eval()
    assert find_stages(model, _IMAGE) == ["act1", "layer1", "layer2", "layer3", "layer4"]


def test_of_others_it_is_the_last_shallow_module_of_each_size() -> None:
    resnet = torchvision.models.resnet18(weights=None).eval()
    assert find_stages(resnet, _IMAGE) == ["relu", "layer1", "layer2", "layer3", "layer4"]
    mobilenet = torchvision.models.mobilenet_v2(weights=None).eval()
    stages = ["features.1", "features.3", "features.6", "features.13", "features"]
    assert find_stages(mobilenet, Inputs((torch.zeros(1, 3, 224, 224),))) == stages
    vit = torchvision.models.vit_b_32(weights=None).eval()
    assert "encoder" in find_stages(vit, example_inputs(vit))


def test_modules_that_are_called_twice_are_no_stages() -> None:
    assert "shared" not in find_stages(VariedNet().eval(), _IMAGE)


def test_a_perceptron_has_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_stages(model, Inputs((torch.zeros(1, 4),))) == []
