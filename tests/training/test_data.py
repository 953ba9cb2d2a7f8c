"""Images of folders, of torchvision and of the caller: which are used, and which are refused."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import dataset_factory

import batude_fx
from batude_fx import Recipe, RecipeError, TrainingError
from batude_fx.training.data import Data, image_data
from batude_fx.training.problem import dense_network
from batude_fx.training.recipe import shipped
from tests.training.tiny_recipe import CLASSES, HELD_OUT, SETTINGS, tiny_recipe


def test_a_class_without_validation_images_is_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, some := tmp_path / "photos")
    shutil.rmtree(some / "validation" / "class0")
    with pytest.raises(TrainingError, match=r"classes in 'train' that 'validation' lacks: 'class0'\. The accuracy"):
        batude_fx.run(tiny_recipe(some))


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (4, 4)])
def test_a_batch_norm_is_not_trained_on_one_image(batch: int, parts: int, photos: Path) -> None:
    with pytest.raises(RecipeError, match=rf"data\.batch_size: {batch} in {parts} parts .* use at least {2 * batch}"):
        batude_fx.run(tiny_recipe(photos, data__batch_size=batch, data__accumulate=parts))


def test_images_of_the_caller_stay_as_they_are(photos: Path) -> None:
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % CLASSES
    before = images.clone()
    halves = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    data = Data(train=lambda _, skip: iter(halves[skip:]), evaluation=lambda: iter(halves), batches=2)
    batude_fx.run(tiny_recipe(photos, data__mixup=0.5), data=data)
    assert torch.equal(images, before)


def _data(count: int = 4, size: int = 32, label: int = 1, batches: int = 1) -> Data:
    images, labels = torch.randn(count, 3, size, size), torch.full((count,), label)

    def given(*_: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(images, labels)] if count else [])

    return Data(given, given, batches)


@pytest.mark.parametrize(("data", "words"), [
    (_data(count=0), "no images to train on, though 1 batches"),
    (_data(size=16), r"images are \(4, 3, 16, 16\), the network takes \(n, 3, 32, 32\)"),
    (replace(_data(), train=lambda *_: iter([(torch.zeros(0, 3, 32, 32), torch.zeros(0))])), r"images are \(0, 3"),
    (replace(_data(), train=lambda *_: iter([{}])), "images cannot be read: not enough values to unpack"),
    (_data(label=3), r"one class per image, 0 to 2; the first ones are tensor\(\[3"),
    (_data(label=-1), "one class per image"),
    (_data(batches=0), "an epoch has 0 batches, a step takes 1"),
    (replace(_data(), evaluation=_data(count=0).evaluation), "no images to measure accuracy on"),
])  # fmt: skip
def test_images_that_cannot_be_trained_on_are_refused(data: Data, words: str, photos: Path) -> None:
    with pytest.raises(TrainingError, match=words):
        batude_fx.run(tiny_recipe(photos, pretrain=None), data=data)


def test_grey_images_for_a_network_of_colour_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grey(_Torchvision):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.new("L", (32, 32))), index % 10

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "mnist", Grey)
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "name": "torch/mnist", "root": "data", "download": True}}  # type: ignore[dict-item]
    settings["model"] = {"name": "test_resnet", "args": {"num_classes": 10}}
    with pytest.raises(TrainingError, match="the first training images cannot be read: output with shape"):
        batude_fx.run(Recipe.model_validate(settings))


def test_a_validation_folder_of_another_name_must_be_named(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, folder := tmp_path / "photos")
    (folder / "validation").rename(folder / "test")
    with pytest.raises(TrainingError, match=r"has no folder 'validation'; .* by data\.val_split"):
        batude_fx.run(tiny_recipe(folder))
    recipe = tiny_recipe(folder, data__val_split="test")
    data = image_data(recipe, dense_network(recipe), (3, 32, 32), CLASSES, Accelerator())
    assert sum(len(labels) for _, labels in data.evaluation()) == HELD_OUT


class _Torchvision(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """As torchvision's datasets are made and asked, with noise for images and two names for each class."""

    class_to_idx: ClassVar = {f"{name} {index}": index for index in range(10) for name in ("tench", "Tinca")}

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert (root, download) == ("data", True)
        self.count = 128 if train else 20
        self.transform: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        image = Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), index % 10


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if "cifar" in path.stem])
def test_recipes_with_datasets_of_torchvision_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar10", _Torchvision)
    short = ["pretrain=null", "one_shot.epochs=1 steps", "finalize.epochs=1 steps", "data.workers=0"]
    recipe = Recipe.from_yaml(name, [*short, "model.precision=fp32", "model.name=resnet20_cifar", "budget=0.5"])
    result = batude_fx.run(recipe)
    assert result.flops <= 0.5 * result.dense_flops


def test_images_can_be_padded_before_they_are_cropped(photos: Path) -> None:
    changes = {"data__pad": 2, "data__image_size": 40, "one_shot__epochs": 0, "pretrain": None, "finalize__epochs": 0}
    assert batude_fx.run(tiny_recipe(photos, **changes)).rounds[-1]["keep"] <= 0.5
    with pytest.raises(TrainingError, match="size, 32 x 32, the first one has 40 x 40 pixels"):
        batude_fx.run(tiny_recipe(photos, **changes | {"data__image_size": 32}))
