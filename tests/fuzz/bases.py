"""The valid files that are damaged: saved networks of several families, a trained run, its checkpoints, its images.

They are written once for each call of `make fuzz`, with fixed seeds, so that the seed of a case gives the same file
again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import timm
import torch
import torchvision
from torch import nn

import batude_fx
from batude_fx.report import html_page, sweep_points
from batude_fx.training import checkpoint_file
from batude_fx.training.checkpoint_file import Checkpoint
from tests.training.tiny_recipe import tiny_recipe, write_images

SIDE = 64
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=4, drop_rate=0.1),
    "byobnet": lambda: timm.create_model("test_byobnet", num_classes=3, act_layer="relu"),
    "vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=SIDE),
    "torchvision": lambda: torchvision.models.squeezenet1_1(num_classes=3),
}
PHOTOS, RUN = "photos", "run"
_POINTS = [
    sweep_points.Point(0.5, 50_000, 5000, 1.5, 0.75, 0.5, 1.0),
    sweep_points.Point(1.0, 100_000, 10_000, 2.5, 1.0, 0.75, 1.0),
]


def write_all(folder: Path) -> None:
    """Write `saved/NAME`, `run`, `checkpoints/PHASE-STEP`, `photos` and `recipes`."""
    for name, make in NETWORKS.items():
        _save(make(), folder / "saved" / name, layers="conv+linear" if name == "vit" else "conv")
    write_images(folder / PHOTOS)
    _train(folder)
    shutil.copytree(folder / RUN / "model", folder / "saved" / "trained")
    html_page.write_pages(folder / "saved" / "trained")
    recipes = folder / "recipes"
    shutil.copytree(Path(__file__).parents[2] / "recipes", recipes)
    (recipes / "tiny.yaml").write_text(tiny_recipe(Path(PHOTOS)).to_yaml())


def _save(model: nn.Module, folder: Path, *, layers: str) -> None:
    example = torch.zeros(1, 3, SIDE, SIDE)
    batude_fx.save(
        batude_fx.compress(model, 0.7, calibration=None, example_inputs=example, layers=layers, round_to=2).eval(),
        folder,
    )
    sweep_points.write(_POINTS, folder)


def _train(folder: Path) -> None:
    """Train by the tiny recipe, and keep every checkpoint that it writes."""
    checkpoints, original = folder / "checkpoints", checkpoint_file.write
    checkpoints.mkdir()

    def write(path: Path, checkpoint: Checkpoint) -> None:
        original(path, checkpoint)
        shutil.copy(path, checkpoints / f"{checkpoint.phase}-{checkpoint.step}")

    recipe = tiny_recipe(
        folder / PHOTOS, one_shot__epochs="2 steps", one_shot__interval="1 steps", finalize__epochs="2 steps",
        pretrain__epochs="2 steps",
    )  # fmt: skip
    with mock.patch.object(checkpoint_file, "write", write):
        batude_fx.run(recipe, folder / RUN)
    # The cases have the photos beside the run, and are started there.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": Path(PHOTOS)})})
    (folder / RUN / "recipe.yaml").write_text(recipe.to_yaml())
