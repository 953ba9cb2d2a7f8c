"""A network comes back by name only if it is what that name builds."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import batude_fx
from batude_fx.graph.surgery import build_skeleton
from batude_fx.tucker.ranks import Ranks
from tests.saving.networks import IMAGES, compressed, timm_net


def test_a_network_changed_by_hand_is_not_passed_off_as_its_architecture(tmp_path: Path) -> None:
    small = compressed(timm_net())
    small.act1 = nn.GELU()
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")


def test_a_changed_layer_is_noticed_though_the_outputs_are_still_equal(tmp_path: Path) -> None:
    small = compressed(timm_net())
    example = small(IMAGES)
    small.layer2[0].act1 = nn.GELU()  # the branch ends in a batch norm whose weight starts at zero
    assert torch.equal(small(IMAGES), example)
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path)


def test_a_network_built_in_another_file_than_its_class_comes_back(tmp_path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    ranks = {"backbone.features.0.0.0": Ranks(8, 3)}
    small = build_skeleton(model, ranks).eval()
    for parameter in small.get_submodule(*ranks).parameters():
        nn.init.normal_(parameter)
    batude_fx.save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["base"] == name
    again = batude_fx.load(tmp_path)
    for key, value in again([IMAGES[0]])[0].items():
        assert torch.equal(value, small([IMAGES[0]])[0][key])
