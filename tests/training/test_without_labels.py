"""Recipes for images without labels: the original teaches, and what is measured is how far the network is from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

import batude_fx
from batude_fx import TrainingError
from batude_fx.graph.provenance import attached_record
from batude_fx.training import phase
from batude_fx.training.recipe import Finalize
from tests.training.tiny_recipe import tiny_recipe

_TEACHER = {"weight": 1, "temperature": 1, "stages": 1}
_FINALIZE = {
    "epochs": "8 steps", "optimizer": "adam", "lr": 1e-3, "weight_decay": 0, "distillation": _TEACHER,
    "weights_lr": 1e-4, "fixed_statistics": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def unlabelled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of both splits without folders of classes."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for photo in photos.glob("*/*/*.png"):
        split = folder / photo.parts[-3]
        split.mkdir(exist_ok=True)
        shutil.copy(photo, split / f"{photo.parts[-2]}-{photo.name}")
    return folder


def _recipe(folder: Path, **changes: Any) -> batude_fx.Recipe:
    settings = {"pretrain": None, "one_shot": {"epochs": 0, "calibration_images": 24}, "finalize": _FINALIZE}
    return tiny_recipe(folder, data__labels=False, eval={"interval": "2 steps", "checkpoint": "1 steps"},
                       **(settings | changes))  # fmt: skip


def test_the_run_ends_with_the_closest_network(unlabelled: Path, tmp_path: Path) -> None:
    result = batude_fx.run(_recipe(unlabelled), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    distances = [record["distance"] for record in log if record["phase"] == "finalize"]
    assert len(distances) == 5
    assert result.accuracy is result.original_accuracy is None
    assert result.quality.images == 9
    assert result.quality.distance == pytest.approx(min(distances), rel=1e-4)
    assert distances[0] > min(distances)
    report = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert report["quality"]["divergence"]["mean"] == result.quality.divergence.mean
    assert attached_record(batude_fx.load(tmp_path / "run" / "model")).quality == result.quality


def test_without_training_it_is_the_calibrated_network(unlabelled: Path) -> None:
    recipes = [
        _recipe(unlabelled, finalize={"epochs": 0}, one_shot={"epochs": 0, "calibration_images": count})
        for count in (0, 24)
    ]
    weights_only, calibrated = (batude_fx.run(recipe) for recipe in recipes)
    assert calibrated.quality.distance < weights_only.quality.distance
    assert calibrated.flops <= 0.5 * calibrated.dense_flops


def test_a_run_that_was_interrupted_ends_at_the_same_weights(
    unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folders = _recipe(unlabelled), (tmp_path / "whole", tmp_path / "parts")
    batude_fx.run(recipe, folders[0])
    step = phase._Trainer.step

    def failing(self: Any, index: int, *arguments: Any) -> Any:
        if index == 5:
            raise OSError("the disk is gone")
        return step(self, index, *arguments)

    monkeypatch.setattr(phase._Trainer, "step", failing)
    with pytest.raises(TrainingError, match="the disk is gone"):
        batude_fx.run(recipe, folders[1])
    monkeypatch.undo()
    batude_fx.run(recipe, folders[1], resume=True)
    whole, parts = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_ranks_are_learned_from_the_original_alone(unlabelled: Path) -> None:
    one_shot = {"epochs": 1, "interval": "1 steps", "calibration_images": 8, "distillation": {"weight": 1}}
    result = batude_fx.run(_recipe(unlabelled, one_shot=one_shot))
    assert result.flops <= 0.5 * result.dense_flops
    assert result.rounds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": {"epochs": 1}}, "pretrain needs labels"),
        ({"finalize": {"epochs": 1}}, "set finalize.distillation.weight: 1"),
        ({"one_shot": {"epochs": 1, "distillation": {}}}, "set one_shot.distillation.weight: 1"),
    ],
)
def test_what_needs_labels_is_refused(unlabelled: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _recipe(unlabelled, **changes)


@pytest.mark.parametrize(("weights_lr", "rates"), [(0, [0.01, 0]), (1e-4, [0.01, 1e-4]), (None, [0.01, 0.01])])
def test_weights_have_a_learning_rate_of_their_own(weights_lr: float | None, rates: list[float]) -> None:
    settings = Finalize(epochs="10 steps", optimizer="adam", lr=0.01, weights_lr=weights_lr, scheduler="cosine")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = phase._build_optimizer(settings, model)
    scheduler = phase._build_scheduler(settings, optimizer, steps_per_epoch=10)
    by_parameter: dict[Any, float] = {}
    for step, share in ((0, 1.0), (5, 0.5)):
        scheduler.step_update(step)
        for group in optimizer.param_groups:
            by_parameter |= dict.fromkeys(group["params"], group["lr"])
        conv, norm = model
        assert [by_parameter[norm.weight], by_parameter[conv.weight]] == pytest.approx([share * r for r in rates])
        assert by_parameter[conv.bias] == by_parameter[norm.bias] == by_parameter[norm.weight]
