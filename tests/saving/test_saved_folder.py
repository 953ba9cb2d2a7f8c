"""Saved networks: bit-equal when read back, refused in one line when broken, and never executed."""

import json
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import batude_fx
from batude_fx.errors import SavedModelError, UnsupportedError
from batude_fx.graph.surgery import build_skeleton
from batude_fx.saving import saved_folder, weights
from batude_fx.support.atomic_files import atomic_file
from batude_fx.tucker.modules import TuckerModule
from batude_fx.tucker.ranks import Ranks

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _small(model: nn.Module, example: Tensor = IMAGES[:1], **options: Any) -> nn.Module:
    options = {"calibration": None, "example_inputs": example, **options}
    return batude_fx.compress(model, 0.6, **options).eval()


def _timm(name: str = "resnet10t", **args: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **args)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("saved") / "out"
    small = _small(_timm(num_classes=5))
    batude_fx.save(small, folder)
    return small, folder


@pytest.fixture
def folder(saved: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in saved[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _load(folder: Path) -> dict[str, Tensor]:
    return weights.read_weights(folder / "model.safetensors")


# Networks that come back


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
    small = _small(_timm(name, **args), images[:1], round_to=4)
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
    small = _small(torchvision.models.get_model(build, weights=None, **args))
    batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out")
    assert torch.equal(again(IMAGES), small(IMAGES))


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last), lambda m: m.half().float()]
)
def test_dtype_and_memory_format_come_back(change: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    small = change(_small(_timm()))
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
    small = _small(_timm())
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


def test_what_load_could_not_read_is_not_saved(tmp_path: Path) -> None:
    pruned, quantized = _small(_timm()), _small(_timm())
    name, layer = next((name, one) for name, one in pruned.named_modules() if isinstance(one, TuckerModule))
    prune.l1_unstructured(layer.last, "weight", 0.5)  # type: ignore[no-untyped-call]
    with pytest.raises(SavedModelError, match=rf"{name}\.\w+\.weight_orig is no weight that load knows; make .* plain"):
        batude_fx.save(pruned, tmp_path / "out")
    quantized.add_module("extra", _Packed())
    with pytest.raises(
        SavedModelError, match=r"'extra\..* is no tensor and cannot be saved; a network is saved before"
    ):
        batude_fx.save(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_threads_may_save_into_one_folder(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(50):
            with atomic_file(tmp_path / "file") as place:
                place.write_text(text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "file").read_text() in "abcd"
    assert len(list(tmp_path.iterdir())) == 1


def test_whoever_may_read_new_files_may_read_the_network(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
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


class Own(nn.Module):
    """A model of no library, with one layer under two names."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.second(self.first(x)))
        return out


def test_a_model_of_your_own_comes_back_with_a_fresh_one(tmp_path: Path) -> None:
    small = _small(Own())
    with pytest.warns(UserWarning, match=r"model=fresh_dense_model"):
        batude_fx.save(small, tmp_path / "out")
    again = batude_fx.load(tmp_path / "out", model=Own())
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert again.again is again.second
    with pytest.raises(SavedModelError, match=r"load\(folder, model=fresh\)"):
        batude_fx.load(tmp_path / "out")
    with pytest.raises(SavedModelError, match="is not the model that was saved"):
        batude_fx.load(tmp_path / "out", model=nn.Sequential(nn.Conv2d(3, 16, 3)))
    with pytest.raises(SavedModelError):
        batude_fx.load(tmp_path / "out", model=Own(24))


def test_a_network_changed_by_hand_is_not_passed_off_as_its_architecture(tmp_path: Path) -> None:
    small = _small(_timm())
    small.act1 = nn.GELU()
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")


def test_a_change_that_does_not_show_yet_is_seen_too(tmp_path: Path) -> None:
    small = _small(_timm())
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


FILES = ["config.json", "model.safetensors", "report.html", "report.json"]


def test_the_folder_holds_nothing_executable(saved: tuple[nn.Module, Path]) -> None:
    assert sorted(file.name for file in saved[1].iterdir()) == FILES
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["architecture"] == "batude_fx"
    assert config["params"] == sum(parameter.numel() for parameter in saved[0].parameters())
    header = (saved[1] / "model.safetensors").read_bytes()[:9]
    assert header[8:9] == b"{"


# Saving that fails


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match="holds no Tucker module"):
        batude_fx.save(_timm(), tmp_path / "out")
    with pytest.raises(SavedModelError, match="meta device"):
        batude_fx.save(_small(_timm()).to("meta"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedModelError, match="is a file"):
        batude_fx.save(_small(Own()), tmp_path / "file")


@pytest.mark.parametrize("failing", ["save_model", "_make_config"])
def test_a_save_that_fails_leaves_the_old_folder(
    saved: tuple[nn.Module, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saved_folder, failing, fail)
    with pytest.raises(SavedModelError, match="disk full"):
        batude_fx.save(_small(_timm(num_classes=3)), folder)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert torch.equal(batude_fx.load(folder)(IMAGES), saved[0](IMAGES))


# Folders that cannot be trusted


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


_BROKEN = {
    "another package": (_set("architecture", value="resnet50"), "its architecture is 'resnet50'"),
    "no architecture": (lambda config: config.pop("architecture"), "not a config of batude_fx"),
    "another format": (_set("format", value=2), "has format 2"),
    "unknown key": (_set("hook", value="os.system"), "hook"),
    "unknown inner key": (_set("model_args", "code", value="x"), "code"),
    "path as name": (_set("model_args", "base", value="../../etc/passwd"), "model_args.base"),
    "scheme as name": (_set("model_args", "base", value="hf-hub:someone/else"), "model_args.base"),
    "unknown name": (_set("model_args", "base", value="resnet10tt"), "no architecture that timm registers"),
    "itself": (_set("model_args", "base", value="batude_fx"), "no architecture that timm registers"),
    "unknown library": (_set("model_args", "library", value="os"), "model_args.library"),
    "a file to read": (_set("model_args", "args", value={"checkpoint_path": "/etc/passwd"}), "checkpoint_path"),
    "weights to fetch": (_set("model_args", "args", value={"pretrained": True}), "pretrained"),
    "url to fetch": (_set("pretrained_cfg", "url", value="http://x/y.pth"), "pretrained_cfg.url"),
    "nested value": (_set("model_args", "args", value={"num_classes": {"a": 1}}), "num_classes"),
    "path as site": (_set("model_args", "ranks", value={"../x": [8, 8]}), "is not the model that was saved"),
    "no such site": (_set("model_args", "ranks", value={"layer9.conv": [8, 8]}), "is not the model that was saved"),
    "rank zero": (_set("model_args", "ranks", value={"conv1.0": [0, 3]}), "greater than 0"),
    "rank too large": (_set("model_args", "ranks", value={"conv1.0": [9999, 3]}), "is not the model that was saved"),
    "a block as site": (_set("model_args", "ranks", value={"layer1": [8, 8]}), "is not the model that was saved"),
    "the root as site": (_set("model_args", "ranks", value={"": [8, 8]}), "is not the model that was saved"),
    "bias of no site": (_set("model_args", "biased", value=["fc"]), "which has no ranks"),
    "other ranks": (_set("model_args", "ranks", value={}), "the weights are not those"),
    "other classes": (_set("model_args", "args", value={"num_classes": 9}), "the weights are not those"),
    "other network": (_set("model_args", "base", value="resnet14t"), "is not the model that was saved"),
    "half an origin": (_set("model_args", "library", value=None), "given together"),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_a_config_that_is_wrong_is_refused_in_one_line(name: str, folder: Path) -> None:
    change, message = _BROKEN[name]
    _edit(folder, change)
    for read in (batude_fx.load, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)):
        if name == "another package" and read is not batude_fx.load:
            continue  # then timm is not asking us
        if name == "no architecture" and read is not batude_fx.load:
            continue
        with pytest.raises(SavedModelError, match=re.escape(message)) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": NaN}', "[" * 100_000, "\x00", '{"architecture": 1e999}']
)
def test_a_config_that_is_no_json_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SavedModelError):
        batude_fx.load(folder)


def test_missing_and_oversized_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"has no config\.json"):
        batude_fx.load(tmp_path / "nowhere")
    with (folder / "config.json").open("ab") as config:
        config.truncate(2**24 + 1)
    with pytest.raises(SavedModelError, match="is no config"):
        batude_fx.load(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SavedModelError, match="the folder is incomplete"):
        batude_fx.load(folder)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.weight"), "1 tensors are missing and 0 are unknown, 'fc.weight' first"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra' first"),
        (lambda state: state.update({"fc.bias": torch.zeros(6)}), "(6,) of torch.float32"),
        (lambda state: state.update({"fc.bias": torch.zeros(5, dtype=torch.int32)}), "torch.int32"),
        (lambda state: state.update({"bn1.num_batches_tracked": torch.tensor(1.5)}), "torch.float32"),
        (
            lambda state: state.update({"bn1.bias": state["bn1.bias"].to(torch.float8_e4m3fn)}),
            "no dtype that networks run in",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, saved: tuple[nn.Module, Path], folder: Path
) -> None:
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in _load(saved[1]).items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(SavedModelError, match=re.escape(message)):
        batude_fx.load(folder)


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
