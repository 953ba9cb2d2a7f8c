"""A recipe that trains for a few steps on tiny images, the images, and what several tests do with them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from batude_fx import Recipe
from batude_fx.tucker.modules import TuckerModule

CLASSES, TRAIN, HELD_OUT = 3, 24, 9
SETTINGS = {
    "model": {"name": "test_resnet", "args": {"num_classes": CLASSES}},
    "data": {"image_size": 32, "batch_size": 8, "workers": 0, "scale": [0.5, 1.0]},
    "budget": 0.5,
    "pretrain": {"epochs": 1, "ema": 0.9},
    "one_shot": {"epochs": 2, "interval": "2 steps", "calibration_images": 8, "distillation": {}},
    "finalize": {"epochs": 1, "clip_grad": 1, "batch_norm_images": 16, "ema": 0.5},
    "eval": {"interval": 1, "checkpoint": "1 steps"},
}


def write_images(folder: Path) -> None:
    """Write coloured noise of three classes into folders for training and validation."""
    values = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", HELD_OUT)):
        for index in range(count):
            place = folder / split / f"class{index % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = values.integers(0, 120, (40, 40, 3), np.uint8)
            pixels[..., index % CLASSES] += 120
            Image.fromarray(pixels).save(place / f"{index}.png")


def tiny_recipe(photos: Path, **changes: Any) -> Recipe:
    """Return the recipe of `SETTINGS`; `section__key=value` changes a key of it, `section=value` a whole section."""
    settings: dict[str, Any] = copy.deepcopy(SETTINGS)
    settings["data"]["root"] = photos
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section] = {**settings[section], name: value} if name else value
    return Recipe.model_validate(settings)


def composed_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of all layers, Tucker modules multiplied out, as factors are unique up to their signs."""
    tucker = {
        name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, TuckerModule)
    }
    weights = {
        n: p.detach() for n, p in model.named_parameters() if not n.startswith(tuple(f"{name}." for name in tucker))
    }
    return weights | tucker
