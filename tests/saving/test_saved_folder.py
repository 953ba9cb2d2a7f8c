"""Saved networks come back bit-equal, a save that fails changes nothing, and nothing that is read is executed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import batude_fx
from batude_fx.errors import SavedModelError, UnsupportedError
from batude_fx.saving import saved_folder
from batude_fx.tucker.modules import TuckerModule
from tests.saving.networks import IMAGES, compressed, timm_net
from tests.toy_networks import OwnNet


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        ("resnet10t", {"num_classes": 7, "in_chans": 1, "global_pool": "max"}),
        ("resnet10t", {"num_classes": 0, "drop_rate": 0.1}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_timm_networks_come_back_bit_equal(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    images = IMAGES[:, : args.get("in_chans", 3)]
    small = compressed(timm_net(name, **args), images[:1], round_to=4)
    batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out")
    assert type(again) is type(small)
    assert torch.equal(again(images), small(images))
    for key, value in dict(small.pretrained_cfg).items():
        assert key == "num_classes" or again.pretrained_cfg[key] == value


@pytest.mark.parametrize(
    ("build", "args"),
    [
        ("resnet18", {"num_classes": 4}),
        ("squeezenet1_1", {}),
        ("googlenet", {"aux_logits": False, "init_weights": False}),
    ],
)
def test_torchvision_networks_come_back_bit_equal(build: str, args: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compressed(torchvision.models.get_model(build, weights=None, **args))
    batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out")
    assert torch.equal(again(IMAGES), small(IMAGES))


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last), lambda m: m.half().float()]
)
def test_dtype_and_memory_format_come_back(change: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    small = change(compressed(timm_net()))
    batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out")
    images = IMAGES.to(next(small.parameters()).dtype)
    assert torch.equal(again(images), small(images))


def test_half_precision_comes_back_with_buffers_that_are_not_saved(tmp_path: Path) -> None:
    model = timm.create_model("coatnet_rmlp_nano_rw_224")
    small = batude_fx.compress(model, 0.9, calibration=None).bfloat16().eval()
    batude_fx.save(small, tmp_path)
    image = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
    assert torch.equal(batude_fx.load(tmp_path)(image), small(image))


def test_compiled_networks_are_saved_and_wrapped_ones_refused(tmp_path: Path) -> None:
    small = compressed(timm_net())
    small.compile(backend="eager")
    batude_fx.save(small, tmp_path)
    assert torch.equal(batude_fx.load(tmp_path)(IMAGES), small(IMAGES))
    for wrapped in (torch.compile(small, backend="eager"), nn.DataParallel(small)):
        with pytest.raises(UnsupportedError, match="hides the layers of a network; save its"):
            batude_fx.save(wrapped, tmp_path)


class _Packed(nn.Identity):
    """As torch's quantized layers: the state is no tensor."""

    def get_extra_state(self) -> object:
        return {"dtype": torch.qint8}


def test_networks_that_load_could_not_read_are_not_saved(tmp_path: Path) -> None:
    pruned, quantized = compressed(timm_net()), compressed(timm_net())
    name, layer = next((name, module) for name, module in pruned.named_modules() if isinstance(module, TuckerModule))
    prune.l1_unstructured(layer.last, "weight", 0.5)  # type: ignore[no-untyped-call]
    with pytest.raises(SavedModelError, match=rf"{name}\.\w+\.weight_orig is no weight that load knows; make .* plain"):
        batude_fx.save(pruned, tmp_path / "out")
    quantized.add_module("extra", _Packed())
    with pytest.raises(
        SavedModelError, match=r"'extra\..* is no tensor and cannot be saved; a network is saved before"
    ):
        batude_fx.save(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saved_files_have_the_permissions_of_new_files(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    wanted = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in saved[1].iterdir()} == {wanted}


def test_a_trained_network_is_saved_as_it_is_and_replaces_the_old(saved: tuple[nn.Module, Path], folder: Path) -> None:
    small = batude_fx.load(folder).train()
    small(IMAGES).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()
    batude_fx.save(small, folder)
    assert small.training
    again = batude_fx.load(folder)
    assert torch.equal(again(IMAGES), small.eval()(IMAGES))
    assert not torch.equal(again(IMAGES), saved[0](IMAGES))


def test_a_model_of_your_own_comes_back_with_a_fresh_one(tmp_path: Path) -> None:
    small = compressed(OwnNet())
    with pytest.warns(UserWarning, match=r"model=fresh_dense_model"):
        batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out", model=OwnNet())
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert again.again is again.second
    with pytest.raises(SavedModelError, match=r"load\(folder, model=fresh\)"):
        batude_fx.load(tmp_path / "out")
    with pytest.raises(SavedModelError, match="is not the model that was saved"):
        batude_fx.load(tmp_path / "out", model=nn.Sequential(nn.Conv2d(3, 16, 3)))
    with pytest.raises(SavedModelError):
        batude_fx.load(tmp_path / "out", model=OwnNet(24))


FILES = ["config.json", "model.safetensors", "report.html", "report.json"]


def test_the_folder_holds_nothing_executable(saved: tuple[nn.Module, Path]) -> None:
    assert sorted(file.name for file in saved[1].iterdir()) == FILES
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["architecture"] == "batude_fx"
    assert config["params"] == sum(parameter.numel() for parameter in saved[0].parameters())
    header = (saved[1] / "model.safetensors").read_bytes()[:9]
    assert header[8:9] == b"{"


def test_networks_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match="holds no Tucker module"):
        batude_fx.save(timm_net(), tmp_path / "out")
    with pytest.raises(SavedModelError, match="meta device"):
        batude_fx.save(compressed(timm_net()).to("meta"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedModelError, match="is a file"):
        batude_fx.save(compressed(OwnNet()), tmp_path / "file")


@pytest.mark.parametrize("failing", ["save_model", "_make_config"])
def test_a_save_that_fails_leaves_the_old_folder(
    saved: tuple[nn.Module, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saved_folder, failing, fail)
    with pytest.raises(SavedModelError, match="disk full"):
        batude_fx.save(compressed(timm_net(num_classes=3)), folder)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert torch.equal(batude_fx.load(folder)(IMAGES), saved[0](IMAGES))


@given(place=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "flip"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_anywhere_is_an_error_of_ours_or_harmless(
    name: str, saved: tuple[nn.Module, Path], folder: Path, place: float, kind: str
) -> None:
    content = bytearray((saved[1] / name).read_bytes())
    at = int(place * min(len(content), 20_000))  # the header, where damage can confuse
    if kind == "cut":
        del content[at:]
    else:
        content[at] ^= 0x15
    (folder / name).write_bytes(content)
    try:
        network = batude_fx.load(folder)
    except SavedModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most damage is an error, and some is a harmless network
    else:
        assert any(isinstance(module, TuckerModule) for module in network.modules())


class _Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth", "model.pt"])
def test_a_pickle_in_the_folder_is_never_opened(name: str, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(_Trap(marker)))
    readers: list[Callable[[], nn.Module]] = [
        lambda: batude_fx.load(folder),
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        lambda: torchvision.models.get_model("batude_fx", folder=folder),
    ]
    for read in readers:
        if name == "model.safetensors":
            with pytest.raises(SavedModelError, match="is broken"):
                read()
        else:
            read()
    assert not marker.exists()
