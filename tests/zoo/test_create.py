"""`create` builds models of both libraries, and saved folders, by name."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torchvision import models

import batude_fx
from batude_fx.errors import BatudeError
from batude_fx.tucker.modules import TuckerModule
from tests.zoo.saved_networks import IMAGES, save_compressed


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("resnet18", "timm"),
        ("timm:resnet18", "timm"),
        ("torchvision:resnet18", "torchvision"),
        ("raft_small", "torchvision"),
    ],
)
def test_names_are_looked_up_in_both_libraries(name: str, library: str) -> None:
    assert type(batude_fx.create(name)).__module__.startswith(f"{library}.")


def test_arguments_reach_the_model() -> None:
    assert batude_fx.create("resnet10t", num_classes=3)(IMAGES).shape == (2, 3)
    assert batude_fx.create("torchvision:resnet18", num_classes=3)(IMAGES).shape == (2, 3)


def test_a_head_of_other_classes_starts_fresh_on_torchvisions_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = models.inception_v3(weights=None, init_weights=False).state_dict()
    entry = models.Inception_V3_Weights
    monkeypatch.setattr(entry, "get_state_dict", lambda *_, **__: published)
    model = batude_fx.create("torchvision:inception_v3", pretrained=True, num_classes=3)
    assert model.fc.out_features == model.AuxLogits.fc.out_features == 3
    assert model.transform_input  # as torchvision sets it with these weights
    for name, value in model.state_dict().items():
        assert ("fc." in name and "conv" not in name) or torch.equal(value, published[name])


def test_torchvisions_auxiliary_outputs_can_be_switched_off_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    published = models.inception_v3(weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(models.Inception_V3_Weights, "get_state_dict", lambda *_, **__: published)
    model = batude_fx.create("torchvision:inception_v3", pretrained=True, aux_logits=False)
    assert model.train()(torch.zeros(2, 3, 299, 299)).shape == (2, 1000)
    assert model.state_dict().keys() == {name for name in published if not name.startswith("AuxLogits.")}


def test_a_saved_folder_takes_no_arguments(timm_folder: tuple[nn.Module, Path]) -> None:
    with pytest.raises(BatudeError, match=r'takes no num_classes; timm\'s "local-dir:.*" does'):
        batude_fx.create(str(timm_folder[1]), num_classes=3)
    assert batude_fx.create(f"local-dir:{timm_folder[1]}", num_classes=3).num_classes == 3


def test_a_saved_folder_is_created_by_its_path(timm_folder: tuple[nn.Module, Path]) -> None:
    network = batude_fx.create(str(timm_folder[1]))
    assert any(isinstance(module, TuckerModule) for module in network.modules())


def test_a_dense_network_in_a_local_folder_can_be_compressed_and_saved(tmp_path: Path) -> None:
    own = timm.create_model("resnet10t", num_classes=3).eval()
    save_for_hf(own, str(tmp_path / "own"), safe_serialization=True)
    network = batude_fx.create(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval()
    assert torch.equal(network(IMAGES), own(IMAGES))
    small = save_compressed(network, tmp_path / "small")
    assert torch.equal(batude_fx.load(tmp_path / "small")(IMAGES), small(IMAGES))


@pytest.mark.parametrize("name", ["resnet51", "torchvision:resnet51", "keras:resnet50", "batude_fx", ""])
def test_an_unknown_name_is_refused_with_close_ones(name: str) -> None:
    with pytest.raises(BatudeError, match=re.escape(f"{name!r} is no saved folder")) as caught:
        batude_fx.create(name)
    if "51" in name:
        assert "resnet50" in str(caught.value)
