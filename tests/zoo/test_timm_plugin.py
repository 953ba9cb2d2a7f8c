"""Saved folders through the registries of timm and torchvision."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import batude_fx
from batude_fx.errors import SavedModelError
from batude_fx.tucker.modules import is_channels_last
from batude_fx.tucker.ranks import Ranks
from batude_fx.zoo import timm_plugin
from tests.zoo.saved_networks import IMAGES, save_compressed


@pytest.mark.parametrize("library", ["timm_folder", "torchvision_folder"])
def test_a_saved_network_is_the_same_by_every_way_to_load_it(library: str, request: pytest.FixtureRequest) -> None:
    small, folder = request.getfixturevalue(library)
    wanted = small(IMAGES)
    for network in (
        batude_fx.load(folder),
        batude_fx.create(str(folder)),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        torchvision.models.get_model("batude_fx", folder=folder),
    ):
        assert type(network) is type(small)
        assert torch.equal(network.eval()(IMAGES), wanted)


def _hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub gives the files of a folder."""

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "user/name"
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)


def test_a_saved_network_comes_back_from_a_hub(
    timm_folder: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, folder = timm_folder
    _hub(folder, monkeypatch)
    network = timm.create_model("hf-hub:user/name", pretrained=True)
    assert torch.equal(network.eval()(IMAGES), small(IMAGES))


def test_a_pickle_from_a_hub_is_not_executed(
    timm_folder: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, folder = timm_folder
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(small.state_dict(), tmp_path / "model.safetensors")
    _hub(tmp_path, monkeypatch)
    with pytest.raises(SavedModelError, match="safetensors"):
        timm.create_model("hf-hub:user/name", pretrained=True)


def test_timm_gives_fresh_weights_of_the_same_shapes(timm_folder: tuple[nn.Module, Path]) -> None:
    small, folder = timm_folder
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=False)
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in small.state_dict().items()}
    assert not torch.equal(fresh.eval()(IMAGES), small(IMAGES))
    assert torch.isfinite(fresh(IMAGES)).all()


@pytest.mark.parametrize("library", ["timm_folder", "torchvision_folder"])
def test_another_number_of_classes_keeps_all_other_weights(library: str, request: pytest.FixtureRequest) -> None:
    small, folder = request.getfixturevalue(library)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert network(IMAGES).shape == (2, 7)
    for name, value in network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, small.state_dict()[name])


def test_timm_adapts_the_stem_to_other_channels(timm_folder: tuple[nn.Module, Path]) -> None:
    network = timm.create_model(f"local-dir:{timm_folder[1]}", pretrained=True, in_chans=1)
    assert network.eval()(IMAGES[:, :1]).shape == (2, 1000)


@pytest.mark.parametrize(
    ("fixed", "args", "message"),
    [
        ({"conv1.0": Ranks(8, 3)}, {"in_chans": 1}, "is not the model that was saved"),
        ({"fc": Ranks(64, 64)}, {"num_classes": 900}, "do not fit the arguments"),
    ],
)
def test_arguments_that_the_weights_cannot_follow_are_refused(
    fixed: dict[str, Ranks], args: dict[str, int], message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": None, "example_inputs": IMAGES[:1], "layers": "conv+linear"}
    small = batude_fx.compress(timm.create_model("resnet10t"), 0.95, ranks=fixed, **options)
    batude_fx.save(small, tmp_path)
    with pytest.raises(SavedModelError, match=message):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **args)


@pytest.mark.parametrize(
    "args", [{"pretrained_model_args": {"pretrained_strict": False}}, {"checkpoint_path": "x.pth"}]
)
def test_model_args_that_batude_fx_does_not_write_are_refused(
    args: dict[str, Any], timm_folder: tuple[nn.Module, Path]
) -> None:
    with pytest.raises(SavedModelError, match="which batude_fx does not write"):
        timm_plugin.batude_fx(ranks={}, **args)


def test_features_are_those_of_the_saved_network(timm_folder: tuple[nn.Module, Path]) -> None:
    small, folder = timm_folder
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    wanted = small.forward_intermediates(IMAGES, indices=(1, 3), intermediates_only=True)
    for feature, expected in zip(network(IMAGES), wanted, strict=True):
        assert torch.equal(feature, expected)


def test_features_of_models_that_have_none_are_refused(torchvision_folder: tuple[nn.Module, Path]) -> None:
    with pytest.raises(SavedModelError, match="create_feature_extractor"):
        timm.create_model(f"local-dir:{torchvision_folder[1]}", pretrained=True, features_only=True)


def test_a_requested_dtype_is_used(timm_folder: tuple[nn.Module, Path]) -> None:
    network = timm.create_model(f"local-dir:{timm_folder[1]}", pretrained=True, dtype=torch.bfloat16)
    assert next(network.parameters()).dtype == torch.bfloat16


def test_a_loaded_network_has_the_methods_and_the_data_config_of_its_class(timm_folder: tuple[nn.Module, Path]) -> None:
    small, folder = timm_folder
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    resolve: Any = timm.data.resolve_data_config
    assert resolve(model=network) == resolve(model=small)
    network.reset_classifier(3)
    assert network(IMAGES).shape == (2, 3)


def test_the_entrypoint_asks_for_a_folder() -> None:
    assert timm.is_model("batude_fx")
    with pytest.raises(SavedModelError, match=r"local-dir:FOLDER"):
        timm.create_model("batude_fx")


def test_a_config_without_weights_is_not_filled_from_elsewhere(timm_folder: tuple[nn.Module, Path]) -> None:
    config = batude_fx.saving.config.read_config(timm_folder[1])
    arguments = config.model_args.model_dump()
    with pytest.raises(SavedModelError, match="no weights are known"):
        timm.create_model("batude_fx", pretrained=True, pretrained_cfg=config.pretrained_cfg, **arguments)
    with pytest.raises(SavedModelError, match="ranks"):
        timm.create_model("batude_fx", **{**arguments, "ranks": {"conv1": "all"}})


def test_torchvision_can_list_weights_of_every_model() -> None:
    assert list(torchvision.models.get_model_weights("batude_fx")) == []
    for name in torchvision.models.list_models():
        torchvision.models.get_model_weights(name)


def test_the_memory_format_comes_back_through_timm(tmp_path: Path) -> None:
    small = save_compressed(timm.create_model("resnet10t").to(memory_format=torch.channels_last), tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert is_channels_last(again.layer1[0].conv1.core.weight)


def test_saved_again_it_keeps_its_report(timm_folder: tuple[nn.Module, Path], tmp_path: Path) -> None:
    shutil.copytree(timm_folder[1], folder := tmp_path / "out")
    batude_fx.save(timm.create_model(f"local-dir:{folder}", pretrained=True), folder)
    assert (folder / "report.json").read_text() == (timm_folder[1] / "report.json").read_text()
