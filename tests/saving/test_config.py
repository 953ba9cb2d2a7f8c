"""A config.json that cannot be trusted is refused in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import batude_fx
from batude_fx.errors import SavedModelError
from batude_fx.graph.example_inputs import timm_config
from tests.saving.networks import compressed, timm_net


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


_DEEP = json.loads("[" * 900 + "]" * 900)
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
    "a huge image": (_set("pretrained_cfg", "input_size", value=[3, 30000, 30000]), "3 x 30000 x 30000 values"),
    "a long image": (_set("pretrained_cfg", "input_size", value=[1, 8193, 1]), "8192 to a side"),
    "an image without width": (_set("pretrained_cfg", "input_size", value=[224, 224]), "pretrained_cfg.input_size"),
    "a size of no image": (_set("pretrained_cfg", "input_size", value=[3, 0, 224]), "pretrained_cfg.input_size.1"),
    "a tiny crop": (_set("pretrained_cfg", "crop_pct", value=1e-3), "pretrained_cfg.crop_pct"),
    "a mean of text": (_set("pretrained_cfg", "mean", value="abc"), "pretrained_cfg.mean"),
    "a mean beyond numbers": (_set("pretrained_cfg", "mean", value=[1e308] * 3), "pretrained_cfg.mean.0"),
    "a deviation of zero": (_set("pretrained_cfg", "std", value=[0, 1, 1]), "pretrained_cfg.std.0"),
    "a resampling of nobody": (_set("pretrained_cfg", "interpolation", value="magic"), "pretrained_cfg.interpolation"),
    "unknown image key": (_set("pretrained_cfg", "loader", value="os.system"), "loader"),
    "a huge positional embedding": (_set("model_args", "args", value={"img_size": 28000}), "model_args.args.img_size"),
    "a deep config": (
        _set("pretrained_cfg", "notes", value=json.loads("[" * 900 + "]" * 900)),
        "not a config of batude_fx",
    ),
    "many classes": (_set("model_args", "args", value={"num_classes": 10**9}), "model_args.args.num_classes"),
    "an escape as site": (_set("model_args", "ranks", value={"\x1b[2Jx": [8, 8]}), r"\x1b[2Jx"),
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


def test_a_wrong_number_of_parameters_is_refused(folder: Path) -> None:
    _edit(folder, _set("params", value=1))
    with pytest.raises(SavedModelError, match=r"config\.json says 1 parameters, the network has [0-9,]{7,}"):
        batude_fx.load(folder)


def test_the_largest_images_can_be_saved_and_loaded(tmp_path: Path) -> None:
    small = compressed(timm_net("resnet10t", num_classes=5))
    vars(small)["pretrained_cfg"] = {**timm_config(small), "input_size": (3, 1800, 1800)}
    batude_fx.save(small, tmp_path / "out")
    assert batude_fx.load(tmp_path / "out").pretrained_cfg["input_size"] == (3, 1800, 1800)


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
    with pytest.raises(SavedModelError, match="more than 16777216 bytes"):
        batude_fx.load(folder)
