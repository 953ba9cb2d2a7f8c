"""The network that a recipe names: its weights, and how its images are normalized."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_model
from timm.data import resolve_data_config

import batude_fx
from batude_fx import RecipeError
from tests.training.tiny_recipe import CLASSES, SETTINGS, tiny_recipe


def test_a_network_of_grey_images_is_saved_with_how_they_are_normalized(photos: Path, tmp_path: Path) -> None:
    section = {"name": "test_resnet", "args": {"num_classes": CLASSES, "in_chans": 1}}
    short = {"pretrain": None, "one_shot__epochs": "1 steps", "finalize__epochs": "1 steps"}
    result = batude_fx.run(tiny_recipe(photos, model=section, data__image_size=None, **short), tmp_path / "run")
    for model in (result.model, batude_fx.load(tmp_path / "run" / "model")):
        config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
        assert (config["input_size"], config["mean"], config["std"]) == ((1, 160, 160), (0.5,), (0.5,))


def test_weights_kept_in_half_precision_train_in_float32(photos: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    save_model(model.bfloat16(), str(tmp_path / "half.safetensors"))
    torch.save(model.state_dict(), tmp_path / "pickled.pth")
    changes = {"pretrain": None, "one_shot__epochs": 0, "finalize__epochs": "1 steps"}
    section = {**SETTINGS["model"], "checkpoint": tmp_path / "half.safetensors"}  # type: ignore[dict-item]
    result = batude_fx.run(tiny_recipe(photos, **changes, model=section))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    with pytest.raises(RecipeError, match=r"pickled\.pth is broken.* becomes one of safetensors by safetensors"):
        batude_fx.run(tiny_recipe(photos, model={**section, "checkpoint": tmp_path / "pickled.pth"}))


@pytest.mark.parametrize("limit", [{"latency": 0.5}, {"agreement": 0.9}, {"score": 1.0}, {"max_drop": 0.1}])
def test_a_budget_that_training_cannot_meet_is_refused(limit: dict[str, float], photos: Path) -> None:
    with pytest.raises(RecipeError, match=rf"budget\.{next(iter(limit))}: training can limit flops and params only"):
        batude_fx.run(tiny_recipe(photos, budget=limit))
