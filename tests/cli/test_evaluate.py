"""`batude-fx evaluate` counts right answers and agreement."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import batude_fx
from tests.cli.commands import NAME, run, run_error, run_json
from tests.toy_networks import ConstantClassifier


@pytest.mark.usefixtures("named")
def test_evaluate_counts_right_answers_and_agreement(class_folders: Path) -> None:
    assert run_json("evaluate", "zero", "--data", class_folders) == {
        "images": 6, "top1": pytest.approx(1 / 3), "top5": 1.0
    }  # fmt: skip
    assert run_json("evaluate", "zero", "--data", class_folders, "--against", "zero")["agreement"] == 1
    assert run_json("evaluate", "zero", "--data", class_folders, "--against", "one")["agreement"] == 0
    assert run_json("evaluate", "zero", "--data", class_folders / "ant", "--against", "one") == {
        "images": 2,
        "agreement": 0,
    }
    assert "top1" in run("evaluate", "zero", "--data", class_folders).stdout


@pytest.mark.usefixtures("named")
def test_models_with_other_classes_cannot_agree(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batude_fx, "create", lambda name, **_: ConstantClassifier(0, classes=int(name)))
    assert "3 has 3 classes, 4 has 4" in run_error("evaluate", "3", "--data", class_folders, "--against", "4")


def test_accuracy_is_that_of_timms_own_images(folder: Path, class_folders: Path) -> None:
    model = batude_fx.load(folder)
    config = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    paths = sorted(class_folders.rglob("*.png"))
    logits = torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])  # (6, classes)
    # Class folders get the places of what the model says, so that it is right wherever images of a folder agree.
    data = folder.parent / "data"
    answers = logits.argmax(1).tolist()
    for place in range(logits.shape[1]):
        (data / f"{place:04}").mkdir(parents=True)
    for index, (path, answer) in enumerate(zip(paths, answers, strict=True)):
        wrong = index == 0
        target = data / f"{(answer - 1 if answer else 1) if wrong else answer:04}" / f"{index}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    facts = run_json("evaluate", folder, "--data", data, "--against", folder)
    assert facts["images"] == 6
    assert facts["top1"] == pytest.approx(5 / 6)
    assert facts["agreement"] == 1.0


@pytest.mark.usefixtures("named")
def test_evaluate_needs_labels_or_another_network(class_folders: Path, tmp_path: Path) -> None:
    assert "give --against MODEL" in run_error("evaluate", "zero", "--data", class_folders / "ant")
    for label in "abcd":
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes((class_folders / "ant" / "0.png").read_bytes())
    assert "has 4 class folders, the network has 3 classes" in run_error("evaluate", "zero", "--data", tmp_path)
    result = run("evaluate", "zero", "--data", tmp_path, "--against", "zero", "--json")
    assert json.loads(result.stdout) == {"images": 4, "agreement": 1.0}
    assert "has 4 class folders" in result.stderr


def test_evaluate_takes_classifiers_only(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ConstantClassifier(0)
    monkeypatch.setattr(dense, "forward", lambda x: {"out": x})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: dense)
    assert "ConstantClassifier is no classifier" in run_error("evaluate", "any", "--data", class_folders)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_networks_are_evaluated_in_their_own_precision(
    dtype: torch.dtype, class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model(NAME, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 64, 64)}).to(dtype)
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: network)
    assert run_json("evaluate", "any", "--data", class_folders, "--against", "any")["agreement"] == 1
