"""Saved networks: they come back to the bit, and a broken or hostile folder gives a SavedModelError, nothing else."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import batude_fx
from batude_fx import serialization
from batude_fx.errors import SavedModelError
from batude_fx.modules import TuckerModule
from batude_fx.sites import Ranks
from batude_fx.surgery import build_skeleton
from batude_fx.zoo import example_inputs


def tucker(model: nn.Module, *, biased: bool = False) -> nn.Module:
    """The model with two of its convolutions at half their ranks, and statistics that are not the initial ones."""
    convolutions = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Conv3d) and m.groups == 1 and max(m.kernel_size) > 1
    }
    sites = {name: convolutions[name] for name in [*convolutions][1:3] or convolutions}
    ranks = {name: Ranks(m.out_channels // 2, max(m.in_channels // 2, 1)) for name, m in sites.items()}
    small = build_skeleton(model, ranks, ranks if biased else ())
    for module in small.modules():
        if isinstance(module, TuckerModule):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    for name, buffer in small.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return small.eval()


def outputs(model: nn.Module, *inputs: object) -> list[Tensor]:
    with torch.no_grad():
        return list(tree_leaves(model(*inputs)))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written_config(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "config.json").read_text()))


class Toy(nn.Module):
    """A class that no library knows; one layer has two names, and another one's weight is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.again = self.body[0]
        self.plain = nn.Conv2d(4, 4, 1)
        self.tied = nn.Conv2d(4, 4, 1)
        self.tied.weight = self.plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.tied(self.plain(self.again(self.body(self.first(x))))))


class Toy3d(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3))


def save_foreign(model: nn.Module, folder: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(model, folder)


# What is saved comes back


def small_timm(name: str = "test_resnet", **args: Any) -> nn.Module:
    return timm.create_model(name, **args)


@pytest.mark.parametrize(
    ("library", "base", "args"),
    [
        ("timm", "test_resnet", {}),
        ("timm", "test_resnet", {"num_classes": 7, "in_chans": 1}),
        ("timm", "test_resnet", {"num_classes": 0}),
        ("timm", "test_resnet", {"global_pool": "max"}),
        ("timm", "test_resnet", {"global_pool": "catavgmax", "num_classes": 3}),
        ("timm", "test_resnet", {"num_classes": 0, "global_pool": ""}),
        ("timm", "test_resnet", {"output_stride": 16}),
        ("timm", "test_resnet", {"drop_rate": 0.2}),
        ("timm", "test_vit", {"img_size": (64, 64)}),
        ("timm", "resnet10t", {}),
        ("torchvision", "squeezenet1_1", {}),
        ("torchvision", "shufflenet_v2_x0_5", {}),
        ("torchvision", "resnet18", {"num_classes": 5}),
        ("torchvision", "googlenet", {"aux_logits": True, "transform_input": True, "num_classes": 5}),
        ("torchvision", "googlenet", {"aux_logits": False, "transform_input": False}),
        ("torchvision", "lraspp_mobilenet_v3_large", {"num_classes": 3}),
        ("torchvision", "deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_a_library_model_is_found_again(library: str, base: str, args: dict[str, Any], tmp_path: Path) -> None:
    none = {"weights": None} | ({"weights_backbone": None} if "v3_large" in base else {})
    model = timm.create_model(base, **args) if library == "timm" else torchvision.models.get_model(base, **none, **args)
    small = tucker(model)
    batude_fx.save(small, tmp_path)
    saved = written_config(tmp_path)["model_args"]
    assert (saved["library"], saved["base"]) == (library, base)
    again = batude_fx.load(tmp_path)
    assert type(again) is type(small)
    assert not any(module.training for module in again.modules())
    assert str(again) == str(small)
    x = torch.randn(2, args.get("in_chans", 3), 64, 64)
    assert same(outputs(again, x), outputs(small, x))


@pytest.mark.parametrize("base", ["raft_small", "ssdlite320_mobilenet_v3_large"])
def test_networks_with_other_inputs_are_found_again(base: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(base, weights=None, **({"weights_backbone": None} if "ssd" in base else {}))
    small = tucker(model)
    batude_fx.save(small, tmp_path)
    inputs = example_inputs(small)
    assert same(outputs(batude_fx.load(tmp_path), *inputs), outputs(small, *inputs))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("setting", [torch.float64, torch.bfloat16, torch.channels_last])
def test_dtype_memory_format_and_biases_are_kept(
    setting: torch.dtype | torch.memory_format, biased: bool, tmp_path: Path
) -> None:
    model = small_timm()
    model = model.to(setting) if isinstance(setting, torch.dtype) else model.to(memory_format=setting)
    small = tucker(model, biased=biased)
    batude_fx.save(small, tmp_path)
    again = batude_fx.load(tmp_path)
    assert layout(again) == layout(small)
    x = example_inputs(small)
    assert same(outputs(again, *x), outputs(small, *x))


def layout(model: nn.Module) -> dict[str, object]:
    return {name: (value.shape, value.stride(), value.dtype) for name, value in model.state_dict().items()}


def test_channels_last_in_three_dimensions(tmp_path: Path) -> None:
    small = tucker(Toy3d()).to(memory_format=torch.channels_last_3d)
    save_foreign(small, tmp_path)
    assert layout(batude_fx.load(tmp_path, model=Toy3d())) == layout(small)


def test_a_compressed_network_comes_back(tmp_path: Path) -> None:
    small = batude_fx.compress(small_timm(), 0.6, calibration=None)
    batude_fx.save(small, tmp_path)
    x = example_inputs(small)
    assert same(outputs(batude_fx.load(str(tmp_path)), *x), outputs(small.eval(), *x))


def test_a_network_that_was_trained_further(tmp_path: Path) -> None:
    small = tucker(small_timm(num_classes=3)).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    batude_fx.save(small, tmp_path)
    before = contents(tmp_path)
    small(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    batude_fx.save(small, tmp_path)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    x = torch.randn(2, 3, 64, 64)
    assert same(outputs(batude_fx.load(tmp_path), x), outputs(small.eval(), x))


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    small = tucker(small_timm()).train()
    small.get_submodule("layer1").eval()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    flags = [module.training for module in small.modules()]
    batude_fx.save(small, tmp_path)
    assert [module.training for module in small.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_the_settings_of_preprocessing_are_kept(tmp_path: Path) -> None:
    changes = {"mean": (0.1, 0.2, 0.3), "label_names": ["cat", "dog"], "url": "https://example.com/weights.pth"}
    small = tucker(small_timm(pretrained_cfg_overlay=changes))
    batude_fx.save(small, tmp_path)
    again: Any = batude_fx.load(tmp_path)
    assert again.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert list(again.pretrained_cfg["label_names"]) == ["cat", "dog"]
    assert not {"url", "file", "hf_hub_id", "source"} & written_config(tmp_path)["pretrained_cfg"].keys()


# Networks of other classes


def test_another_class_needs_a_fresh_model(tmp_path: Path) -> None:
    small = tucker(Toy())
    save_foreign(small, tmp_path)
    with pytest.raises(SavedModelError, match=r"load\(folder, model=fresh\)"):
        batude_fx.load(tmp_path)
    fresh = Toy()
    before = copy.deepcopy(fresh.state_dict())
    again: Any = batude_fx.load(tmp_path, model=fresh)
    assert again.again is again.body[0]
    assert again.tied.weight is again.plain.weight
    x = torch.randn(2, 3, 8, 8)
    assert same(outputs(again, x), outputs(small, x))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert isinstance(fresh.again, nn.Conv2d)


def squashing(model: Any) -> nn.Module:
    model.act1 = nn.Tanh()  # not a single tensor more or less
    return cast("nn.Module", model)


def with_another_head(model: Any) -> nn.Module:
    model.fc = nn.Linear(model.fc.in_features, 11)
    return cast("nn.Module", model)


def that_fails(model: nn.Module) -> nn.Module:
    def refuse(*_: object) -> None:
        raise ValueError("not today")

    model.register_forward_hook(refuse)
    return model


@pytest.mark.parametrize("change", [squashing, with_another_head, that_fails])
def test_a_model_changed_by_hand_is_not_taken_for_the_original(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    save_foreign(change(tucker(small_timm())), tmp_path)
    assert written_config(tmp_path)["model_args"]["library"] is None


@pytest.mark.parametrize("name", ["test_resnet", "no_such_model", "batude_fx"])
def test_a_claim_to_be_a_library_model_is_checked(name: str, tmp_path: Path) -> None:
    small = tucker(Toy())
    vars(small)["pretrained_cfg"] = {"architecture": name, "input_size": (3, 8, 8)}
    save_foreign(small, tmp_path)


# The folder


def test_a_folder_holds_json_and_safetensors_and_nothing_else_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    batude_fx.save(tucker(small_timm()), folder)
    files = contents(tmp_path)
    assert set(files) == {"new/out/config.json", "new/out/model.safetensors"}
    json.loads(files["new/out/config.json"])
    length = int.from_bytes(files["new/out/model.safetensors"][:8], "little")
    assert json.loads(files["new/out/model.safetensors"][8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("tensors overlap"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tucker(small_timm())
    batude_fx.save(small, tmp_path)
    before = contents(tmp_path)

    def fail(model: nn.Module, filename: str, *_: object) -> None:
        Path(filename).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(serialization, "save_model", fail)
    with pytest.raises(SavedModelError if isinstance(error, Exception) else type(error)):
        batude_fx.save(small, tmp_path)
    assert contents(tmp_path) == before


def sharing_memory() -> nn.Module:
    small: Any = tucker(Toy())
    memory = torch.zeros(6)
    small.first.bias.data, small.plain.bias.data = memory[:4], memory[2:]
    return cast("nn.Module", small)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Toy(), "Toy holds no Tucker module; save what compress returned"),
        (tucker(Toy()).to("meta"), "'first.weight' is on the meta device"),
        (sharing_memory(), "Toy cannot be saved to"),
    ],
)
def test_what_cannot_be_saved(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=message):
        batude_fx.save(model, tmp_path)
    assert contents(tmp_path) == {}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SavedModelError, match=r"Toy cannot be saved to .*out"):
        batude_fx.save(tucker(Toy()), tmp_path / "out")
    assert contents(tmp_path) == {"out": b"mine"}


# Broken and hostile folders


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    batude_fx.save(tucker(small_timm()), folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound folder, to be broken."""
    for name, data in contents(sound).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(SavedModelError) as caught:
        batude_fx.load(folder, model=model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def change_config(folder: Path, changes: Mapping[str, object], *, below: str | None = None) -> None:
    config = written_config(folder)
    (config[below] if below else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_missing_files(folder: Path) -> None:
    assert "Give the folder that save wrote" in refusal(folder / "nowhere")
    assert "Give the folder that save wrote" in refusal(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing; save or copy the folder again" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1, 2", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"architecture": "batude_fx", "params": NaN}', "NaN is not JSON"),
        ('{"architecture": "batude_fx", "params": -Infinity}', "-Infinity is not JSON"),
        ("1" * 5000, "cannot be read as JSON"),
        (" " * (2**24 + 1), "16777217 bytes, more than 16777216"),
        ("[]", "its architecture is 'list', not 'batude_fx'"),
        ('{"architecture": "resnet18"}', "reads folders of timm itself"),
        ('{"architecture": "batude_fx"}', "has format None, this batude_fx reads 1"),
        ('{"architecture": "batude_fx", "format": 2}', "has format 2, this batude_fx reads 1"),
        ('{"architecture": "batude_fx", "format": 1}', "Field required"),
    ],
)
def test_no_config(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


def test_a_config_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"architecture": "\xff"}')
    assert "cannot be read as JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("below", "changes", "message"),
    [
        (None, {"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (None, {"params": 1.5}, "params: "),
        (None, {"versions": None}, "versions: "),
        ("pretrained_cfg", {"url": "https://example.com"}, "pretrained_cfg.url"),
        ("pretrained_cfg", {"file": "/etc/passwd"}, "pretrained_cfg.file"),
        ("model_args", {"surprise": 1}, "model_args.surprise"),
        ("model_args", {"library": "huggingface"}, "model_args.library"),
        ("model_args", {"library": None}, "library and base are given together"),
        ("model_args", {"ranks": {"layer1.0.conv1": [0, 4]}}, "greater than 0, got '0'"),
        ("model_args", {"ranks": {"layer1.0.conv1": [4, -1]}}, "greater than 0, got '-1'"),
        ("model_args", {"ranks": {"layer1.0.conv1": [4]}}, "model_args.ranks.layer1.0.conv1.1"),
        ("model_args", {"biased": ["fc"]}, "biased names 'fc', which has no ranks"),
        *(("model_args", {"args": {key: 1}}, "model_args.args") for key in ("checkpoint_path", "pretrained", "file")),
        ("model_args", {"args": {"num_classes": {"$ref": "x"}}}, "model_args.args.num_classes"),
        *(
            ("model_args", {"base": base}, "model_args.base: String should match pattern")
            for base in ("../../x", "/etc/passwd", "local-dir:/etc", "hf-hub:x/y", "os.system", "resnet18\n", "")
        ),
    ],
)
def test_a_config_that_says_what_it_must_not(
    below: str | None, changes: dict[str, object], message: str, folder: Path
) -> None:
    change_config(folder, changes, below=below)
    found = refusal(folder)
    assert "is not a config of batude_fx" in found
    assert message in found
    assert "save the model again" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "no_such_model"}, "'no_such_model' is no architecture that timm registers"),
        ({"base": "batude_fx"}, "'batude_fx' is no architecture that timm registers"),
        ({"base": "batude_fx", "library": "torchvision"}, "'batude_fx' is no architecture that torchvision registers"),
        ({"base": "test_vit"}, "VisionTransformer is not the model that was saved"),
        ({"base": "resnet10t"}, "the weights are not those of this ResNet"),
        ({"args": {"num_classes": 7}}, "the weights are not those of this ResNet: 'fc.weight' is (1000, "),
        ({"args": {"num_classes": -1}}, "timm cannot build 'test_resnet'"),
        ({"args": {"num_classes": 10**30}}, "timm cannot build 'test_resnet'"),
        ({"args": {"num_classes": 2**50}}, "timm cannot build 'test_resnet'"),
        ({"args": {"in_chans": 0}}, "ResNet"),
        ({"args": {"in_chans": "../x"}}, "timm cannot build 'test_resnet'"),
        ({"args": {"output_stride": 0}}, "timm cannot build 'test_resnet'"),
        ({"args": {"img_size": 7}}, "timm cannot build 'test_resnet'"),
        ({"args": {"act_layer": "os.system"}}, "timm cannot build 'test_resnet'"),
        ({"args": {"norm_layer": "../x"}}, "timm cannot build 'test_resnet'"),
        ({"args": {"global_pool": "../x"}}, "timm cannot build 'test_resnet'"),
        ({"base": "test_vit", "args": {"img_size": 0}}, ""),
        ({"ranks": {"layer1.0.conv1": [10**6, 4]}}, "rank_out is 1 to"),
        ({"ranks": {"../../x": [4, 4]}}, "ResNet has no submodule '../../x'"),
        ({"ranks": {"": [4, 4]}}, "ResNet is not the model that was saved"),
        ({"ranks": {"layer1": [4, 4]}}, "ResNet is not the model that was saved"),
        ({"ranks": {"layer1.0.__class__": [4, 4]}}, "ResNet has no submodule"),
        ({"ranks": {}}, "the weights are not those of this ResNet"),
    ],
)
def test_a_config_of_no_model(changes: dict[str, object], message: str, folder: Path) -> None:
    change_config(folder, {"biased": [], **changes}, below="model_args")
    assert message in refusal(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.bias": None}, "1 tensors are missing and 0 are unknown, 'fc.bias' first"),
        ({"extra": torch.zeros(1)}, "0 tensors are missing and 1 are unknown, 'extra' first"),
        ({"fc.bias": torch.zeros(3)}, "'fc.bias' is (3,) of torch.float32 where the model has (1000,)"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.int32)}, "'fc.bias' is (1000,) of torch.int32"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.complex64)}, "'fc.bias' is (1000,) of torch.complex64"),
        ({"bn1.num_batches_tracked": torch.tensor(1.0)}, "'bn1.num_batches_tracked' is () of torch.float32"),
        ({"bn1.num_batches_tracked": torch.tensor(1j)}, "'bn1.num_batches_tracked' is () of torch.complex64"),
    ],
)
def test_weights_of_something_else(changes: dict[str, Tensor | None], message: str, folder: Path) -> None:
    merged = {**tensors_of(folder), **changes}
    kept = {name: value for name, value in merged.items() if value is not None}
    safetensors.torch.save_file(kept, folder / "model.safetensors")
    found = refusal(folder)
    assert message in found
    assert "Give a folder and a model that belong together" in found


def test_a_fresh_model_of_another_class(folder: Path) -> None:
    assert "Toy is not the model that was saved" in refusal(folder, Toy())


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_truncated_weights(length: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "is broken: " in refusal(folder)


class Bomb:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def mined(folder: Path) -> Iterator[Path]:
    """A folder whose weights are gone and that has pickles under all names that timm knows; none may be read."""
    marker = folder / "marker"
    (folder / "bomb").write_bytes(pickle.dumps(Bomb(marker)))
    pickle.loads((folder / "bomb").read_bytes())  # noqa: S301 - the bomb works
    marker.unlink()
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "pytorch_model.pth"):
        (folder / name).symlink_to(folder / "bomb")
    yield folder
    assert not marker.exists()


READERS: dict[str, Callable[[Path], nn.Module]] = {
    "batude_fx": batude_fx.load,
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "torchvision": lambda folder: torchvision.models.get_model("batude_fx", folder=folder),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_pickle_is_never_opened(read: Callable[[Path], nn.Module], mined: Path) -> None:
    assert isinstance(read(mined), nn.Module)
    (mined / "model.safetensors").unlink()
    with pytest.raises(SavedModelError, match="is missing"):
        read(mined)
    (mined / "model.safetensors").symlink_to(mined / "bomb")
    with pytest.raises(SavedModelError, match="is broken"):
        read(mined)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some bytes overwritten, most often near the start, where the structure is, and sometimes the end cut off."""
    at = st.one_of(st.integers(0, 200), st.integers(0, 3000), st.integers(0, 10**6))
    edits = draw(st.dictionaries(at, st.one_of(st.integers(0, 255), st.sampled_from(b'0159-."[]{},:eE')), max_size=4))
    end = draw(st.one_of(st.none(), at))

    def damage(data: bytes) -> bytes:
        result = bytearray(data)
        for position, value in edits.items():
            result[position % len(data)] = value
        return bytes(result[:end])

    return damage


@given(damage=damages(), name=st.sampled_from(["config.json", "model.safetensors"]))
@settings(max_examples=120, deadline=None)
def test_damaged_bytes_give_an_error_of_ours_or_a_network(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes], name: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for file, data in contents(sound).items():
        (folder / file).write_bytes(damage(data) if file == name else data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(batude_fx.load(folder), nn.Module)
    except SavedModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
